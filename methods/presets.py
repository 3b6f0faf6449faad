"""Presets and explicit settings, resolved to one value that says all about a request's KV."""

from dataclasses import dataclass

from kvstrata.methods.codec import BlockCodec
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.protos.errors import LimitError, UnknownPresetError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import CacheScope
from kvstrata.protos.inference_pb2 import MethodSettings

DEFAULT_PRESET = "balanced"


@dataclass(frozen=True, slots=True)
class Method:
    """What happens to a request's KV.

    Attributes:
        codec: How blocks are stored.
        finest: The finest stratum to read; None reads all that is stored.
    """

    codec: BlockCodec
    finest: Stratum | None = None

    @property
    def wanted(self) -> tuple[Stratum, ...]:
        """The strata to fetch."""
        return tuple(s for s in self.codec.strata if self.finest is None or s <= self.finest)

    @property
    def reads_all(self) -> bool:
        """Whether blocks are read as precisely as stored; only then may successors be stored."""
        return self.wanted == self.codec.strata

    def scope(
        self, *, model: bytes, kv_dtype: str, salt: bytes = b"", adapter: str = ""
    ) -> CacheScope:
        """Return the cache scope of this method under a model and a tenant."""
        return CacheScope(
            model=model,
            kv_dtype=kv_dtype,
            codec=f"{self.codec.name}/{self.codec.version}",
            method=self.codec.settings(),
            adapter=adapter,
            salt=salt,
        )


PRESETS: dict[str, Method] = {
    "exact": Method(ExactCodec()),
    # Until a model has a calibrated profile, balanced is the codec that needs none.
    "balanced": Method(FallbackCodec()),
}


def from_preset(name: str) -> Method:
    """Return the method of a preset; the empty name is the default.

    Raises:
        UnknownPresetError: No preset has this name.
    """
    try:
        return PRESETS[name or DEFAULT_PRESET]
    except KeyError:
        raise UnknownPresetError(
            f"unknown preset {name[:64]!r}", f"use one of {', '.join(sorted(PRESETS))}"
        ) from None


def from_settings(settings: MethodSettings) -> Method:
    """Return the method of explicit settings.

    Raises:
        UnknownPresetError: No codec has this name.
        LimitError: A value outside its range, or a stratum that the codec does not have.
    """
    codec: BlockCodec
    if settings.codec == ExactCodec.name:
        if settings.HasField("sink_tokens"):
            raise LimitError("codec 'exact' has no sink_tokens", "leave it out or use 'fallback'")
        codec = ExactCodec()
    elif settings.codec == FallbackCodec.name:
        try:
            codec = (
                FallbackCodec(settings.sink_tokens)
                if settings.HasField("sink_tokens")
                else FallbackCodec()
            )
        except ValueError as error:
            raise LimitError(str(error), "use a value in that range") from error
    else:
        raise UnknownPresetError(
            f"unknown codec {settings.codec[:64]!r}",
            f"use {ExactCodec.name!r} or {FallbackCodec.name!r}, or give a preset",
        )
    finest = settings.read_stratum or None
    if finest is not None and finest not in codec.strata:
        raise LimitError(
            f"codec {codec.name!r} has no stratum {finest}", "leave read_stratum out to read all"
        )
    return Method(codec, finest)
