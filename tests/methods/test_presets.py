"""Presets and settings: one value for everything, and clear refusals."""

import pytest

from kvstrata.methods import ExactCodec, FallbackCodec, Method
from kvstrata.methods.presets import DEFAULT_PRESET, PRESETS, from_preset, from_settings
from kvstrata.protos.errors import LimitError, UnknownPresetError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import CacheScope
from kvstrata.protos.inference_pb2 import MethodSettings

BASE, MID, FINE, EXACT = (
    Stratum.STRATUM_BASE,
    Stratum.STRATUM_MID,
    Stratum.STRATUM_FINE,
    Stratum.STRATUM_EXACT,
)


def test_presets_are_these() -> None:
    assert isinstance(from_preset("exact").codec, ExactCodec)
    assert from_preset("balanced").codec == FallbackCodec(4)
    assert from_preset("") is from_preset(DEFAULT_PRESET)
    assert DEFAULT_PRESET in PRESETS
    assert all(method.reads_all for method in PRESETS.values())


@pytest.mark.parametrize("name", ["Exact", "fallback", " exact", "x" * 10_000, "\N{SNOWMAN}"])
def test_an_unknown_preset_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownPresetError) as refusal:
        from_preset(name)
    assert refusal.value.remedy == "use one of balanced, exact"
    assert len(refusal.value.message) < 120
    assert refusal.value.__suppress_context__


@pytest.mark.parametrize("name", ["", "balanced", "x" * 10_000])
def test_an_unknown_codec_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownPresetError, match="unknown codec") as refusal:
        from_settings(MethodSettings(codec=name))
    assert "'exact'" in refusal.value.remedy
    assert "'fallback'" in refusal.value.remedy
    assert len(refusal.value.message) < 120


@pytest.mark.parametrize("sinks", [0, 1, 64])
def test_sink_tokens_are_taken_as_given_also_zero(sinks: int) -> None:
    settings = MethodSettings(codec="fallback", sink_tokens=sinks)
    assert from_settings(settings).codec == FallbackCodec(sinks)


def test_unset_fields_take_the_codecs_defaults() -> None:
    method = from_settings(MethodSettings(codec="fallback"))
    assert method == from_preset("balanced")
    assert method.finest is None
    assert isinstance(from_settings(MethodSettings(codec="exact")).codec, ExactCodec)


@pytest.mark.parametrize("sinks", [65, 2**32 - 1])
def test_too_many_sinks_are_refused_with_the_range(sinks: int) -> None:
    with pytest.raises(LimitError, match=f"0 to 64, got {sinks}"):
        from_settings(MethodSettings(codec="fallback", sink_tokens=sinks))


@pytest.mark.parametrize("sinks", [0, 4])
def test_the_exact_codec_has_no_sinks(sinks: int) -> None:
    with pytest.raises(LimitError, match="no sink_tokens"):
        from_settings(MethodSettings(codec="exact", sink_tokens=sinks))


@pytest.mark.parametrize(
    ("codec", "stratum"),
    [("fallback", FINE), ("fallback", EXACT), ("exact", BASE), ("exact", MID), ("fallback", 77)],
)
def test_a_stratum_that_the_codec_does_not_have_is_refused(codec: str, stratum: Stratum) -> None:
    with pytest.raises(LimitError, match="has no stratum"):
        from_settings(MethodSettings(codec=codec, read_stratum=stratum))


@pytest.mark.parametrize(
    ("codec", "finest", "wanted"),
    [
        ("fallback", None, (BASE, MID)),
        ("fallback", MID, (BASE, MID)),
        ("fallback", BASE, (BASE,)),
        ("exact", None, (EXACT,)),
        ("exact", EXACT, (EXACT,)),
    ],
)
def test_the_strata_to_fetch_end_at_the_finest(
    codec: str, finest: Stratum | None, wanted: tuple[Stratum, ...]
) -> None:
    settings = MethodSettings(codec=codec)
    if finest is not None:
        settings.read_stratum = finest
    method = from_settings(settings)
    assert method.wanted == wanted
    assert method.reads_all == (wanted == method.codec.strata)


def _digest(method: Method, **others: str | bytes) -> bytes:
    arguments: dict[str, str | bytes] = {"model": b"m" * 16, "kv_dtype": "bfloat16", **others}
    return method.scope(**arguments).digest()  # type: ignore[arg-type]


def test_a_scope_names_everything_that_changes_the_stored_bytes() -> None:
    scope = Method(FallbackCodec(7)).scope(
        model=b"m" * 16, kv_dtype="float16", salt=b"tenant", adapter="tuned"
    )
    assert scope == CacheScope(
        b"m" * 16, "float16", "fallback/1", "sink_tokens=7", "tuned", b"tenant"
    )


def test_methods_with_other_bytes_have_other_scopes() -> None:
    methods = [Method(FallbackCodec(n)) for n in (0, 4, 5)] + [Method(ExactCodec())]
    digests = {_digest(method) for method in methods}
    digests |= {
        _digest(methods[0], model=b"n" * 16),
        _digest(methods[0], kv_dtype="float16"),
        _digest(methods[0], salt=b"tenant"),
        _digest(methods[0], adapter="tuned"),
    }
    assert len(digests) == 8


def test_how_finely_a_block_is_read_does_not_change_its_name() -> None:
    assert _digest(Method(FallbackCodec(), BASE)) == _digest(Method(FallbackCodec()))
