"""Presets and explicit settings, resolved to one value that says all about a request's KV."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstrata.methods.attention_gate import AttentionGate
from kvstrata.methods.calibrated import CalibratedCodec, calibrated_codec
from kvstrata.methods.codec import BlockCodec
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.gate_weights import GateWeights
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline, check
from kvstrata.methods.predicted import PredictedCodec, predicted_codec
from kvstrata.methods.profile import Profile, threshold_for_bits, threshold_for_kl
from kvstrata.methods.representatives import parse_choice
from kvstrata.methods.skipdecode import SkipDecode
from kvstrata.methods.stage_settings import pipeline_of, schedule_of, with_gates, zipcache_codec
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.errors import LimitError, MethodConflictError, UnknownPresetError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import CacheScope, digest, pack_token_ids
from kvstrata.protos.inference_pb2 import MethodSettings

DEFAULT_PRESET = "balanced"
NO_STAGES = Pipeline()


@dataclass(frozen=True, slots=True)
class Method:
    """What happens to a request's KV.

    Attributes:
        codec: How blocks are stored.
        finest: The finest stratum to read; None reads all that is stored.
        represented: Layers whose mean keys are stored beside the blocks, for ``Retrieve``: "",
            "all" or "5,14". Part of the identity: a hit has them.
        pipeline: The papers' stages that act on it.
        skip: Which layers run for generated tokens; None runs all.

    Raises:
        MethodConflictError: Codec, stages and schedule exclude each other.
    """

    codec: BlockCodec
    finest: Stratum | None = None
    represented: str = ""
    pipeline: Pipeline = NO_STAGES
    skip: SkipDecode | None = None

    def __post_init__(self) -> None:
        check(self.pipeline, self.codec)
        if self.skip is not None and self.pipeline.stages:
            raise MethodConflictError(
                f"skipdecode with {self.pipeline.stages[0].name}: stages keep caches of their own, "
                "in which every layer has every token",
                "leave out one of the two",
                rule="skipdecode_with_stages",
            )

    @property
    def wanted(self) -> tuple[Stratum, ...]:
        """The strata to fetch."""
        return tuple(s for s in self.codec.strata if self.finest is None or s <= self.finest)

    @property
    def reads_all(self) -> bool:
        """Whether blocks are read as precisely as stored; only then may successors be stored."""
        return self.wanted == self.codec.strata

    def scope(
        self,
        *,
        model: bytes,
        kv_dtype: str,
        salt: bytes = b"",
        adapter: str = "",
        prompt_ids: Sequence[int] = (),
    ) -> CacheScope:
        """Return the cache scope of this method under a model and a tenant.

        Args:
            model: Fingerprint.
            kv_dtype: Name of the cache's dtype.
            salt: The tenant's.
            adapter: In use.
            prompt_ids: Of the request. They count if a stage lets blocks depend on what follows
                them in the prompt: what was chosen for one question serves no other.
        """
        settings = [self.codec.settings()]
        if self.represented:
            settings.append(f"represented={self.represented}")
        if self.pipeline.settings():
            settings.append(self.pipeline.settings())
        if self.pipeline.needs_whole_prompt:
            ids = pack_token_ids(prompt_ids)
            settings.append(f"prompt={digest('prompt', [ids]).hex()}")
        return CacheScope(
            model=model,
            kv_dtype=kv_dtype,
            codec=f"{self.codec.name}/{self.codec.version}",
            method=";".join(settings),
            adapter=adapter,
            salt=salt,
        )


# The papers by name, with their own values. H2O and gates act on blocks of the default preset.
PUBLISHED = ZipCache(quantiser="published")
PAPERS = {
    "attention-gate": Pipeline(gate=AttentionGate()),
    "zipcache": Pipeline(quantise=ZipCache()),
    "zipcache-published": Pipeline(quantise=PUBLISHED),
    "h2o": Pipeline(evict=H2O()),
    "zipvl": Pipeline(attention=ZipVL(), quantise=PUBLISHED),
}
# Stored bits per element that presets aim at with the calibrated codec, everything counted,
PRESET_BITS = {"near-lossless": 2.83, "balanced": 2.22, "small": 1.64}
# and with the predicted one, where the profile can predict. The default stays with the faster.
PREDICTED_PRESET_BITS = {"near-lossless": 2.2, "small": 1.38}
# And those that explicit settings of the predicted codec aim at if they name no target.
PREDICTED_BITS = 1.4
PRESETS = tuple(sorted((ExactCodec.name, *PRESET_BITS, *PAPERS)))
MIN_BITS, MAX_BITS = 0.5, 8.0
CODECS = (
    CalibratedCodec.name, ExactCodec.name, FallbackCodec.name, PredictedCodec.name,
    ZipCacheCodec.name,
)  # fmt: skip


def from_preset(
    name: str, profile: Profile | None = None, gates: GateWeights | None = None
) -> Method:
    """Return the method of a preset; the empty name is the default.

    Args:
        name: One of ``PRESETS``.
        profile: Of the served model. Without one lossy presets are the fallback codec; with one
            that cannot predict, all of them are the calibrated one.
        gates: Of the served model.

    Raises:
        UnknownPresetError: No preset has this name, or the model lacks the tables for it.
    """
    name = name or DEFAULT_PRESET
    if name not in PRESETS:
        raise UnknownPresetError(
            f"unknown preset {name[:64]!r}", f"use one of {', '.join(PRESETS)}"
        )
    if name == ExactCodec.name:
        return Method(ExactCodec())
    if name in PAPERS:
        pipeline = with_gates(PAPERS[name], profile, gates)
        return Method(_codec(MethodSettings(), pipeline, profile), pipeline=pipeline)
    if profile is None:
        return Method(FallbackCodec())
    prediction, bits = profile.prediction, PREDICTED_PRESET_BITS.get(name)
    if prediction is not None and bits is not None:
        return Method(predicted_codec(profile, threshold_for_bits(prediction.rates, bits)))
    return Method(calibrated_codec(profile, profile.threshold_for_bits(PRESET_BITS[name])))


def from_settings(
    settings: MethodSettings,
    profile: Profile | None = None,
    gates: GateWeights | None = None,
    *,
    num_layers: int = 0,
) -> Method:
    """Return the method of explicit settings; other arguments as for ``from_preset``.

    Args:
        settings: As they came.
        profile: Of the served model.
        gates: Of the served model.
        num_layers: Of the served model; only a schedule of layers needs it.

    Raises:
        UnknownPresetError: No codec has this name, or the model lacks the tables for it.
        LimitError: A value outside its range, or a stratum that the codec does not have.
        MethodConflictError: Stages and codec exclude each other, or gates are another model's.
        InvalidRequestError: A schedule that is none, or not of this model.
    """
    pipeline = with_gates(pipeline_of(settings), profile, gates)
    skip = schedule_of(settings.skipdecode, num_layers) if settings.HasField("skipdecode") else None
    codec = _codec(settings, pipeline, profile)
    finest = settings.read_stratum or None
    if finest is not None and finest not in codec.strata:
        raise LimitError(
            f"codec {codec.name!r} has no stratum {finest}", "leave read_stratum out to read all"
        )
    return Method(codec, finest, parse_choice(settings.representatives), pipeline, skip)


def _codec(settings: MethodSettings, pipeline: Pipeline, profile: Profile | None) -> BlockCodec:
    """Return the codec of settings whose stages are ``pipeline``."""
    name = settings.codec
    is_named_by_others = bool(pipeline.stages) or settings.HasField("skipdecode")
    if name not in CODECS and not (name == "" and is_named_by_others):
        raise UnknownPresetError(
            f"unknown codec {name[:64]!r}",
            f"use {', '.join(map(repr, CODECS))}, or give a preset",
        )
    if pipeline.quantise is not None:
        wanted = zipcache_codec(pipeline.quantise, name, profile)
        _refuse_foreign(settings, wanted)
        if wanted == ZipCacheCodec.name:
            return ZipCacheCodec(pipeline.quantise)
        return _calibrated(settings, wanted, profile, pipeline.quantise.mean_bits)
    if not name:
        without = ZipCacheCodec.name if pipeline.leaves_out else FallbackCodec.name
        name = without if profile is None else CalibratedCodec.name
    _refuse_foreign(settings, name)
    if name == ExactCodec.name:
        return ExactCodec()
    if name in (CalibratedCodec.name, PredictedCodec.name):
        return _calibrated(settings, name, profile)
    if name == ZipCacheCodec.name:
        return ZipCacheCodec(PUBLISHED)
    try:
        if settings.HasField("sink_tokens"):
            return FallbackCodec(settings.sink_tokens)
        return FallbackCodec()
    except ValueError as error:
        raise LimitError(str(error), "use a value in that range") from error


def _refuse_foreign(settings: MethodSettings, codec: str) -> None:
    """Raise if a field is set that the codec does not have."""
    takers = {
        "sink_tokens": (FallbackCodec.name,),
        "bits": (CalibratedCodec.name, PredictedCodec.name),
        "max_kl": (CalibratedCodec.name, PredictedCodec.name),
        "key_form": (CalibratedCodec.name,),
    }
    for field, names in takers.items():
        is_set = bool(settings.key_form) if field == "key_form" else settings.HasField(field)
        if is_set and codec not in names:
            raise LimitError(
                f"codec {codec!r} has no {field}",
                f"leave it out or use {' or '.join(map(repr, names))}",
            )


def _calibrated(
    settings: MethodSettings, name: str, profile: Profile | None, bits: float | None = None
) -> CalibratedCodec:
    """Return the codec of a profile; ``bits`` are aimed at where the settings have no target."""
    if profile is None:
        raise UnknownPresetError(
            f"the served model has no profile, which codec {name!r} needs",
            "run `kvstrata calibrate`, or use codec 'fallback'",
        )
    predicts = name == PredictedCodec.name
    if predicts and profile.prediction is None:
        raise UnknownPresetError(
            f"the served model's profile cannot predict, which codec {name!r} needs",
            "run `kvstrata calibrate --extend`, or use codec 'calibrated'",
        )
    rates = profile.prediction.rates if predicts and profile.prediction else profile.rates
    has_bits, has_kl = settings.HasField("bits"), settings.HasField("max_kl")
    if has_bits and has_kl:
        raise LimitError("bits and max_kl are both given", "give one target")
    if has_kl and not 0 < settings.max_kl < 100:
        raise LimitError(f"max_kl must be above 0, not {settings.max_kl}", "use one such as 0.01")
    default = bits or (PREDICTED_BITS if predicts else PRESET_BITS[DEFAULT_PRESET])
    if has_kl:
        threshold = threshold_for_kl(rates, settings.max_kl)
    else:
        threshold = threshold_for_bits(rates, _bits(settings) if has_bits else default)
    if predicts:
        return predicted_codec(profile, threshold)
    try:
        return calibrated_codec(profile, threshold, settings.key_form or "pre")
    except ValueError as error:
        raise LimitError(str(error)[:200], "leave key_form out for the default") from error


def _bits(settings: MethodSettings) -> float:
    """Return the bits per element that are aimed at."""
    if not MIN_BITS <= settings.bits <= MAX_BITS:
        raise LimitError(
            f"bits must be {MIN_BITS} to {MAX_BITS}, not {settings.bits}",
            "use a value in that range",
        )
    return settings.bits
