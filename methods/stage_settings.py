"""From the wire's settings of the papers' stages to a pipeline, and to the codec that it needs."""

from dataclasses import fields, replace
from typing import Any

from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.gate_weights import GATES, GateError, GateWeights
from kvstrata.methods.pipeline import STAGES, Pipeline
from kvstrata.methods.profile import Profile
from kvstrata.methods.skipdecode import SkipDecode
from kvstrata.methods.stage import Stage
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.protos.errors import LimitError, MethodConflictError, UnknownPresetError
from kvstrata.protos.inference_pb2 import MethodSettings, SkipDecodeSettings

DEFAULT_SPEEDUP = 2.0  # of SkipDecode
COUNT = "_tokens"  # "heavy" is a share of the prompt, "heavy_tokens" a count of tokens


def pipeline_of(settings: MethodSettings) -> Pipeline:
    """Return the stages that ``settings`` name; a stage's unset fields take the paper's values.

    Raises:
        LimitError: A value outside its range, or a share and a count for the same thing.
    """
    stages = [
        _stage(kind, getattr(settings, name))
        for name, kind in STAGES.items()
        if settings.HasField(name)
    ]
    if settings.codec == ZipCacheCodec.name and not settings.HasField("zipcache"):
        stages.append(ZipCache(quantiser="published"))
    return Pipeline.of(*stages)


def _stage(kind: type[Stage], message: Any) -> Stage:
    given = {field.name: value for field, value in message.ListFields()}
    sent = message.DESCRIPTOR.fields_by_name
    given |= {
        f.name: getattr(message, f.name)
        for f in fields(kind)
        if f.name in sent and message.HasField(f.name)
    }
    for name in [name for name in given if name.endswith(COUNT)]:
        amount = name.removesuffix(COUNT)
        if amount not in {f.name for f in fields(kind)}:
            continue  # a field of this very name, such as min_tokens
        if amount in given:
            raise LimitError(
                f"{kind.name} has both {amount} and {name}", "give a share or a count, not both"
            )
        given[amount] = given.pop(name)
    return kind(**given)


def schedule_of(settings: SkipDecodeSettings, num_layers: int) -> SkipDecode:
    """Return the schedule of layers that ``settings`` name, for a model of so many layers.

    Raises:
        InvalidRequestError: It is none, or not of this model.
        LimitError: A speed-up beside layers, or one of the two numbers of layers alone.
    """
    given = {field.name: value for field, value in settings.ListFields()}
    numbers = ("max_layers", "min_layers")
    named = [name for name in numbers if settings.HasField(name)]
    speedup = given.pop("speedup", DEFAULT_SPEEDUP)
    if not named:
        schedule = replace(SkipDecode.for_speedup(num_layers, speedup), **given)
    elif settings.HasField("speedup") or len(named) < len(numbers):
        raise LimitError(
            "skipdecode has only one of max_layers and min_layers, or a speedup beside them",
            "give both numbers of layers, or a speedup",
        )
    else:
        schedule = SkipDecode(**{name: getattr(settings, name) for name in numbers} | given)
    schedule.check(num_layers)
    return schedule


def with_gates(pipeline: Pipeline, profile: Profile | None, gates: GateWeights | None) -> Pipeline:
    """Return the pipeline whose gate, if it has one, names the gates that it decides by.

    Args:
        pipeline: As it was asked for.
        profile: Of the served model, if there is one.
        gates: Of the served model, if there are some.

    Raises:
        UnknownPresetError: The model has no gates, or none are here by that name.
        MethodConflictError: Those that are named are another model's.
    """
    stage = pipeline.gate
    if stage is None:
        return pipeline
    chosen = gates
    if stage.gates:
        try:
            chosen = GATES.by_id(stage.gates)
        except GateError as error:
            raise UnknownPresetError(
                f"no gates {stage.gates[:64]!r} here", "leave gates out, or copy their file"
            ) from error
    if chosen is None:
        raise UnknownPresetError(
            "the served model has no gates, which attention_gate needs", "run `kvstrata tune gate`"
        )
    models = {tables.model_id for tables in (profile, gates) if tables is not None}
    if models and chosen.model_id not in models:
        raise MethodConflictError(
            f"gates {chosen.gates_id} are those of another model",
            "leave gates out to use the served model's",
            rule="foreign_gates",
        )
    return replace(
        pipeline,
        gate=replace(stage, gates=chosen.gates_id, whole_prompt=chosen.needs_whole_prompt),
    )


def zipcache_codec(stage: ZipCache, codec: str, profile: Profile | None) -> str:
    """Return the name of the codec that ZipCache quantises by.

    Args:
        stage: Its settings.
        codec: The codec that was asked for; empty for none.
        profile: Of the served model.

    Raises:
        MethodConflictError: Another codec was asked for.
        UnknownPresetError: ``strata`` without a profile.
    """
    is_published = stage.quantiser == "published"
    wanted = ZipCacheCodec.name if is_published else CalibratedCodec.name
    if codec not in ("", wanted):
        raise MethodConflictError(
            f"zipcache with quantiser {stage.quantiser!r} stores by codec {wanted!r}, "
            f"not {codec[:64]!r}",
            "leave codec out, or choose the other quantiser",
            rule="zipcache_quantiser",
        )
    if not is_published and profile is None:
        raise UnknownPresetError(
            "the served model has no profile, which zipcache's quantiser 'strata' needs",
            "run `kvstrata calibrate`, or use quantiser 'published'",
        )
    return wanted
