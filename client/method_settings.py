"""Explicit method settings: those of a codec, and those of the papers' stages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.descriptor import FieldDescriptor

from kvstrata.client.validation import check_integer, check_number, check_text
from kvstrata.protos import frame_pb2, inference_pb2
from kvstrata.protos.errors import InvalidRequestError

StratumName = Literal["base", "mid", "fine", "exact"]
# A stage's numbers by their names in ``inference.proto``: {"heavy": 0.2, "sinks": 4}
StageSettings = Mapping[str, object]

STRATA: dict[str, frame_pb2.Stratum] = {
    "base": frame_pb2.STRATUM_BASE,
    "mid": frame_pb2.STRATUM_MID,
    "fine": frame_pb2.STRATUM_FINE,
    "exact": frame_pb2.STRATUM_EXACT,
}
STAGES = ("attention_gate", "zipvl", "h2o", "zipcache", "skipdecode")
MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1
MAX_FLOAT64 = 1.7e308


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """Explicit method settings, in place of a preset. None takes the default.

    ``MethodSettings(h2o={"heavy": 0.2, "recent": 0.1, "sinks": 4})`` evicts from the running cache,
    ``MethodSettings(h2o={}, zipcache={"quantiser": "published"})`` composes two papers with their
    own values. What a stage's numbers mean, ``inference.proto`` says.

    Attributes:
        codec: "exact", "fallback", "calibrated", "predicted" or "zipcache"; may be left out with a
            stage.
        sink_tokens: Fallback codec: how many first tokens are kept at 8 bits.
        read_stratum: Finest stratum to read; None reads all that is stored.
        representatives: Layers whose mean keys are stored beside the blocks, so that a store can be
            searched with a query: "all", or such as "5,14"; None stores none.
        bits: Calibrated or predicted codec: stored bits per element to aim at.
        attention_gate: Keep flags before attention.
        zipvl: Attention of the prompt over the tokens that matter.
        h2o: Eviction from the running cache.
        zipcache: More bits for salient tokens.
        skipdecode: Fewer layers for later tokens, such as ``{"speedup": 2}``, of a service that
            runs an adapter tuned for it.
    """

    codec: str = ""
    sink_tokens: int | None = None
    read_stratum: StratumName | None = None
    representatives: str | None = None
    bits: float | None = None
    attention_gate: StageSettings | None = None
    zipvl: StageSettings | None = None
    h2o: StageSettings | None = None
    zipcache: StageSettings | None = None
    skipdecode: StageSettings | None = None


def set_method(
    request: inference_pb2.GenerateRequest, preset: str | None, settings: MethodSettings | None
) -> None:
    """Write a preset or settings into ``request``.

    Raises:
        InvalidRequestError: Both, an empty name, or a value that no server takes.
    """
    if preset is not None and settings is not None:
        raise InvalidRequestError("both preset and settings are given", "give one of the two")
    if preset is not None:
        request.preset = check_text("preset", preset)
        if not preset:
            raise InvalidRequestError("the preset is empty", "name one or leave it out")
    if settings is not None:
        _set(request.settings, settings)


def _set(message: inference_pb2.MethodSettings, settings: MethodSettings) -> None:
    stages = {name: given for name in STAGES if (given := getattr(settings, name)) is not None}
    message.codec = check_text("codec", settings.codec)
    if not settings.codec and not stages:
        raise InvalidRequestError(
            "neither a codec nor a stage is given", 'name a codec such as "exact", or a stage'
        )
    if settings.sink_tokens is not None:
        message.sink_tokens = check_integer("sink_tokens", settings.sink_tokens, 0, MAX_UINT32)
    if settings.bits is not None:
        message.bits = check_number("bits", settings.bits, 0.0, 64.0)
    if settings.read_stratum is not None:
        message.read_stratum = stratum_of("read_stratum", settings.read_stratum)
    if settings.representatives is not None:
        message.representatives = check_text("representatives", settings.representatives)
    for name, given in stages.items():
        _set_stage(name, getattr(message, name), given)


def stratum_of(name: str, stratum: object) -> frame_pb2.Stratum:
    """Return the stratum of that name; ``name`` is the option's, for the message."""
    if not isinstance(stratum, str) or stratum not in STRATA:
        raise InvalidRequestError(
            f"unknown {name} {str(stratum)[:40]!r}", f"use one of {', '.join(STRATA)}"
        )
    return STRATA[stratum]


def _set_stage(name: str, message: Any, given: object) -> None:
    """Write a stage's numbers; an empty mapping means the paper's own."""
    if not isinstance(given, Mapping):
        raise InvalidRequestError(
            f"{name} is a {type(given).__name__}", 'give a mapping such as {"tau": 0.9}, or {}'
        )
    message.SetInParent()
    known = message.DESCRIPTOR.fields_by_name
    for key, value in given.items():
        if key not in known:
            raise InvalidRequestError(
                f"{name} has no setting {str(key)[:40]!r}", f"use {', '.join(known)}"
            )
        setattr(message, key, _checked(f"{name}.{key}", known[key], value))


def _checked(name: str, field: Any, value: object) -> object:
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return check_number(name, value, -MAX_FLOAT64, MAX_FLOAT64)
    if field.type == FieldDescriptor.TYPE_STRING:
        return check_text(name, value)
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise InvalidRequestError(f"{name} is not a truth value", "give True or False")
        return value
    highest = MAX_UINT64 if field.type == FieldDescriptor.TYPE_UINT64 else MAX_UINT32
    return check_integer(name, value, 0, highest)
