"""Presets and explicit settings, resolved to one value that says all about a request's KV."""

from dataclasses import dataclass

from kvstrata.methods.calibrated import CalibratedCodec, calibrated_codec
from kvstrata.methods.codec import BlockCodec
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.profile import Profile
from kvstrata.methods.representatives import parse_choice
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
        represented: Layers whose mean keys are stored beside the blocks, for ``Retrieve``: "",
            "all" or "5,14". Part of the identity: a hit has them.
    """

    codec: BlockCodec
    finest: Stratum | None = None
    represented: str = ""

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
            method=self._settings,
            adapter=adapter,
            salt=salt,
        )

    @property
    def _settings(self) -> str:
        """All settings that change stored bytes, as text."""
        settings = self.codec.settings()
        return f"{settings};represented={self.represented}" if self.represented else settings


PRESETS = ("balanced", "exact", "near-lossless", "small")
# Stored bits per element that the calibrated presets aim at, everything counted.
PRESET_BITS = {"near-lossless": 2.83, "balanced": 2.22, "small": 1.64}
MIN_BITS, MAX_BITS = 0.5, 8.0
CODECS = (CalibratedCodec.name, ExactCodec.name, FallbackCodec.name)


def from_preset(name: str, profile: Profile | None = None) -> Method:
    """Return the method of a preset; the empty name is the default.

    Args:
        name: One of ``PRESETS``.
        profile: Of the served model. Without one every preset but ``exact`` is the fallback codec.

    Raises:
        UnknownPresetError: No preset has this name.
    """
    name = name or DEFAULT_PRESET
    if name not in PRESETS:
        raise UnknownPresetError(
            f"unknown preset {name[:64]!r}", f"use one of {', '.join(PRESETS)}"
        )
    if name == ExactCodec.name:
        return Method(ExactCodec())
    if profile is None:
        return Method(FallbackCodec())
    return Method(calibrated_codec(profile, profile.threshold_for_bits(PRESET_BITS[name])))


def from_settings(settings: MethodSettings, profile: Profile | None = None) -> Method:
    """Return the method of explicit settings.

    Raises:
        UnknownPresetError: No codec has this name, or the model has no profile for it.
        LimitError: A value outside its range, or a stratum that the codec does not have.
    """
    codec: BlockCodec
    if settings.codec not in CODECS:
        raise UnknownPresetError(
            f"unknown codec {settings.codec[:64]!r}",
            f"use {', '.join(map(repr, CODECS))}, or give a preset",
        )
    _refuse_foreign(settings)
    if settings.codec == ExactCodec.name:
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
        codec = _calibrated(settings, profile)
    finest = settings.read_stratum or None
    if finest is not None and finest not in codec.strata:
        raise LimitError(
            f"codec {codec.name!r} has no stratum {finest}", "leave read_stratum out to read all"
        )
    return Method(codec, finest, parse_choice(settings.representatives))


def _refuse_foreign(settings: MethodSettings) -> None:
    """Raise if a field is set that the codec does not have."""
    takers = {
        "sink_tokens": FallbackCodec.name,
        "bits": CalibratedCodec.name,
        "max_kl": CalibratedCodec.name,
        "key_form": CalibratedCodec.name,
    }
    for field, taker in takers.items():
        is_set = bool(settings.key_form) if field == "key_form" else settings.HasField(field)
        if is_set and settings.codec != taker:
            raise LimitError(
                f"codec {settings.codec!r} has no {field}", f"leave it out or use {taker!r}"
            )


def _calibrated(settings: MethodSettings, profile: Profile | None) -> CalibratedCodec:
    if profile is None:
        raise UnknownPresetError(
            "the served model has no profile, which codec 'calibrated' needs",
            "run `kvstrata calibrate`, or use codec 'fallback'",
        )
    has_bits, has_kl = settings.HasField("bits"), settings.HasField("max_kl")
    if has_bits and has_kl:
        raise LimitError("bits and max_kl are both given", "give one target")
    if has_bits and not MIN_BITS <= settings.bits <= MAX_BITS:
        raise LimitError(
            f"bits must be {MIN_BITS} to {MAX_BITS}, not {settings.bits}",
            "use a value in that range",
        )
    if has_kl and not 0 < settings.max_kl < 100:
        raise LimitError(f"max_kl must be above 0, not {settings.max_kl}", "use one such as 0.01")
    if has_kl:
        threshold = profile.threshold_for_kl(settings.max_kl)
    else:
        bits = settings.bits if has_bits else PRESET_BITS[DEFAULT_PRESET]
        threshold = profile.threshold_for_bits(bits)
    try:
        return calibrated_codec(profile, threshold, settings.key_form or "pre")
    except ValueError as error:
        raise LimitError(str(error)[:200], "leave key_form out for the default") from error
