"""Presets and settings: one value for everything, and clear refusals."""

from dataclasses import replace

import pytest

from kvstrata.methods import ExactCodec, FallbackCodec, Method
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.calibrated_pages import is_readable_in_place
from kvstrata.methods.predicted import PredictedCodec
from kvstrata.methods.presets import (
    DEFAULT_PRESET,
    PAPERS,
    PREDICTED_BITS,
    PREDICTED_PRESET_BITS,
    PRESET_BITS,
    PRESETS,
    from_preset,
    from_settings,
)
from kvstrata.methods.profile import Profile, threshold_for_bits, threshold_for_kl
from kvstrata.protos.errors import LimitError, UnknownPresetError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import CacheScope
from kvstrata.protos.inference_pb2 import MethodSettings
from tests.methods.predictions import predicting_profile
from tests.methods.profiles import make_profile

BASE, MID, FINE, EXACT = (
    Stratum.STRATUM_BASE,
    Stratum.STRATUM_MID,
    Stratum.STRATUM_FINE,
    Stratum.STRATUM_EXACT,
)
NAN = float("nan")


@pytest.fixture(scope="module")
def profile() -> Profile:
    return make_profile()


def _calibrated(settings: MethodSettings, profile: Profile) -> CalibratedCodec:
    codec = from_settings(settings, profile).codec
    assert isinstance(codec, CalibratedCodec)
    assert codec.profile is profile
    return codec


@pytest.mark.parametrize("name", ["exact", *PRESET_BITS])
def test_without_a_profile_every_lossy_preset_is_the_fallback_codec(name: str) -> None:
    codec = from_preset(name).codec
    if name == "exact":
        assert isinstance(codec, ExactCodec)
    else:
        assert codec == FallbackCodec(4)
    assert from_preset(name).reads_all


@pytest.mark.parametrize("name", ["exact", *PRESET_BITS])
def test_with_a_profile_every_lossy_preset_is_calibrated(name: str, profile: Profile) -> None:
    codec = from_preset(name, profile).codec
    if name == "exact":
        assert isinstance(codec, ExactCodec)
        return
    assert isinstance(codec, CalibratedCodec)
    assert (codec.profile, codec.form) == (profile, "pre")
    assert codec.threshold == profile.threshold_for_bits(PRESET_BITS[name])
    again = from_preset(name, profile).codec
    assert again.settings() == codec.settings()


def test_presets_predict_where_the_profile_can_and_the_default_never_does() -> None:
    profile = predicting_profile(2, 2, 32)
    without = replace(profile, prediction=None)
    assert profile.prediction is not None
    for name in PRESET_BITS:
        codec, plain = (from_preset(name, p).codec for p in (profile, without))
        assert isinstance(plain, CalibratedCodec)
        assert not isinstance(plain, PredictedCodec)
        if name in PREDICTED_PRESET_BITS:
            assert isinstance(codec, PredictedCodec)
            wanted = threshold_for_bits(profile.prediction.rates, PREDICTED_PRESET_BITS[name])
            assert codec.threshold == wanted
            assert codec.strata == plain.strata  # coarse reads go on
        else:
            assert codec.settings() == plain.settings()
            assert not isinstance(codec, PredictedCodec)
    assert DEFAULT_PRESET not in PREDICTED_PRESET_BITS
    assert set(PREDICTED_PRESET_BITS) < set(PRESET_BITS)


def test_predicted_settings_are_taken_as_given_or_refused(profile: Profile) -> None:
    predicting = predicting_profile(2, 2, 32)
    assert predicting.prediction is not None
    rates = predicting.prediction.rates
    for fields, threshold in (
        ({"bits": 2.0}, threshold_for_bits(rates, 2.0)),
        ({"max_kl": 0.01}, threshold_for_kl(rates, 0.01)),
        ({}, threshold_for_bits(rates, PREDICTED_BITS)),
    ):
        settings = MethodSettings(codec="predicted", **fields)  # type: ignore[arg-type]
        codec = from_settings(settings, predicting).codec
        assert isinstance(codec, PredictedCodec)
        assert codec.threshold == threshold
        assert not is_readable_in_place(codec)
    with pytest.raises(UnknownPresetError, match="cannot predict"):
        from_settings(MethodSettings(codec="predicted"), profile)
    with pytest.raises(UnknownPresetError, match="no profile"):
        from_settings(MethodSettings(codec="predicted"))
    with pytest.raises(LimitError, match="no key_form"):
        from_settings(MethodSettings(codec="predicted", key_form="pre"), predicting)
    with pytest.raises(LimitError, match=r"0\.5 to 8"):
        from_settings(MethodSettings(codec="predicted", bits=0.1), predicting)


def test_presets_are_these_and_finer_ones_have_smaller_thresholds(profile: Profile) -> None:
    assert set(PRESETS) == {"exact", *PRESET_BITS, *PAPERS}
    assert sorted(PRESETS) == list(PRESETS)
    assert DEFAULT_PRESET in PRESETS
    order = ("near-lossless", "balanced", "small")
    thresholds = [profile.threshold_for_bits(PRESET_BITS[name]) for name in order]
    assert thresholds == sorted(set(thresholds))


def test_the_empty_name_is_the_default(profile: Profile) -> None:
    assert from_preset("") == from_preset(DEFAULT_PRESET)
    default = from_preset(DEFAULT_PRESET, profile)
    assert _scope(from_preset("", profile)) == _scope(default)


@pytest.mark.parametrize("name", ["Exact", "fallback", " exact", "x" * 10_000, "\N{SNOWMAN}"])
def test_an_unknown_preset_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownPresetError) as refusal:
        from_preset(name)
    assert refusal.value.remedy == f"use one of {', '.join(PRESETS)}"
    assert len(refusal.value.message) < 120
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None


@pytest.mark.parametrize("name", ["", "balanced", "x" * 10_000])
def test_an_unknown_codec_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownPresetError, match="unknown codec") as refusal:
        from_settings(MethodSettings(codec=name))
    for codec in ("calibrated", "exact", "fallback"):
        assert repr(codec) in refusal.value.remedy
    assert len(refusal.value.message) < 120


@pytest.mark.parametrize("sinks", [0, 1, 64])
def test_sink_tokens_are_taken_as_given_also_zero(sinks: int) -> None:
    settings = MethodSettings(codec="fallback", sink_tokens=sinks)
    assert from_settings(settings).codec == FallbackCodec(sinks)


def test_unset_fields_take_the_codecs_defaults(profile: Profile) -> None:
    method = from_settings(MethodSettings(codec="fallback"))
    assert method == from_preset("balanced")
    assert method.finest is None
    assert isinstance(from_settings(MethodSettings(codec="exact")).codec, ExactCodec)
    given = from_settings(MethodSettings(codec="calibrated"), profile)
    assert _scope(given) == _scope(from_preset(DEFAULT_PRESET, profile))


@pytest.mark.parametrize("sinks", [65, 2**32 - 1])
def test_too_many_sinks_are_refused_with_the_range(sinks: int) -> None:
    with pytest.raises(LimitError, match=f"0 to 64, got {sinks}"):
        from_settings(MethodSettings(codec="fallback", sink_tokens=sinks))


@pytest.mark.parametrize(
    ("codec", "field", "value", "taker"),
    [
        (codec, *rest)
        for codec in ("exact", "fallback", "calibrated")
        for rest in (
            ("sink_tokens", 0, "fallback"),
            ("sink_tokens", 4, "fallback"),
            ("bits", 0.0, "calibrated"),
            ("bits", 2.0, "calibrated"),
            ("max_kl", 0.0, "calibrated"),
            ("key_form", "frame", "calibrated"),
        )
        if codec != rest[-1]
    ],
)
def test_a_field_of_another_codec_is_refused(
    codec: str, field: str, value: object, taker: str, profile: Profile
) -> None:
    settings = MethodSettings(codec=codec, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(LimitError, match=f"no {field}") as refusal:
        from_settings(settings, profile)
    assert repr(taker) in refusal.value.remedy


def test_calibrated_settings_without_a_profile_say_what_to_do() -> None:
    with pytest.raises(UnknownPresetError, match="no profile") as refusal:
        from_settings(MethodSettings(codec="calibrated"))
    assert "kvstrata calibrate" in refusal.value.remedy


def test_bits_divergence_and_form_are_taken_as_given(profile: Profile) -> None:
    bits = _calibrated(MethodSettings(codec="calibrated", bits=3.0), profile)
    assert bits.threshold == profile.threshold_for_bits(3.0)
    divergence = _calibrated(MethodSettings(codec="calibrated", max_kl=0.01), profile)
    assert divergence.threshold == profile.threshold_for_kl(0.01)
    frame = _calibrated(MethodSettings(codec="calibrated", key_form="frame"), profile)
    assert frame.form == "frame"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0.4}, "0.5 to 8"),
        ({"bits": 8.1}, "0.5 to 8"),
        ({"bits": NAN}, "0.5 to 8"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"max_kl": -1.0}, "max_kl"),
        ({"max_kl": NAN}, "max_kl"),
        ({"max_kl": float("inf")}, "max_kl"),
        ({"bits": 2.0, "max_kl": 0.1}, "both"),
        ({"key_form": "post"}, "no form 'post'"),
        ({"key_form": "x" * 10_000}, "no form"),
    ],
)
def test_calibrated_values_out_of_range_are_refused(
    fields: dict[str, float], message: str, profile: Profile
) -> None:
    settings = MethodSettings(codec="calibrated", **fields)  # type: ignore[arg-type]
    with pytest.raises(LimitError, match=message) as refusal:
        from_settings(settings, profile)
    assert refusal.value.remedy
    assert len(refusal.value.message) <= 200


def test_a_form_that_the_profile_lacks_is_refused() -> None:
    settings = MethodSettings(codec="calibrated", key_form="frame")
    with pytest.raises(LimitError, match="use one of pre"):
        from_settings(settings, make_profile(forms=("pre",)))


@pytest.mark.parametrize(
    ("codec", "stratum"),
    [
        ("fallback", FINE),
        ("fallback", EXACT),
        ("exact", BASE),
        ("exact", MID),
        ("calibrated", FINE),
        ("calibrated", EXACT),
        ("fallback", 77),
    ],
)
def test_a_stratum_that_the_codec_does_not_have_is_refused(
    codec: str, stratum: Stratum, profile: Profile
) -> None:
    with pytest.raises(LimitError, match="has no stratum"):
        from_settings(MethodSettings(codec=codec, read_stratum=stratum), profile)


@pytest.mark.parametrize(
    ("codec", "finest", "wanted"),
    [
        ("fallback", None, (BASE, MID)),
        ("fallback", MID, (BASE, MID)),
        ("fallback", BASE, (BASE,)),
        ("calibrated", None, (BASE, MID)),
        ("calibrated", BASE, (BASE,)),
        ("exact", None, (EXACT,)),
        ("exact", EXACT, (EXACT,)),
    ],
)
def test_the_strata_to_fetch_end_at_the_finest(
    codec: str, finest: Stratum | None, wanted: tuple[Stratum, ...], profile: Profile
) -> None:
    settings = MethodSettings(codec=codec)
    if finest is not None:
        settings.read_stratum = finest
    method = from_settings(settings, profile)
    assert method.wanted == wanted
    assert method.reads_all == (wanted == method.codec.strata)


def _scope(method: Method, **others: str | bytes) -> CacheScope:
    arguments: dict[str, str | bytes] = {"model": b"m" * 16, "kv_dtype": "bfloat16", **others}
    return method.scope(**arguments)  # type: ignore[arg-type]


def _digest(method: Method, **others: str | bytes) -> bytes:
    return _scope(method, **others).digest()


def test_a_scope_names_everything_that_changes_the_stored_bytes() -> None:
    scope = Method(FallbackCodec(7)).scope(
        model=b"m" * 16, kv_dtype="float16", salt=b"tenant", adapter="tuned"
    )
    assert scope == CacheScope(
        b"m" * 16,
        "float16",
        f"fallback/{FallbackCodec.version}",
        "sink_tokens=7",
        "tuned",
        b"tenant",
    )


def test_representatives_are_part_of_the_name_and_their_absence_is_not() -> None:
    plain = from_settings(MethodSettings(codec="fallback", representatives="none"))
    assert plain == from_preset("balanced")
    assert _digest(plain) == _digest(Method(FallbackCodec()))
    some, same, every = [
        from_settings(MethodSettings(codec="fallback", representatives=text))
        for text in ("5,14", "14, 5", "all")
    ]
    assert some == same == Method(FallbackCodec(), represented="5,14")
    assert len({_digest(plain), _digest(some), _digest(every)}) == 3
    with pytest.raises(LimitError, match="'none', 'all' or layers"):
        from_settings(MethodSettings(codec="fallback", representatives="some"))


def test_methods_with_other_bytes_have_other_scopes(profile: Profile) -> None:
    methods = [Method(FallbackCodec(n)) for n in (0, 4, 5)] + [Method(ExactCodec())]
    methods += [
        Method(CalibratedCodec(profile, 0.1)),
        Method(CalibratedCodec(profile, 0.1001)),
        Method(CalibratedCodec(profile, 0.1, "frame")),
        Method(CalibratedCodec(make_profile(seed=1), 0.1)),
    ]
    digests = {_digest(method) for method in methods}
    digests |= {
        _digest(methods[0], model=b"n" * 16),
        _digest(methods[0], kv_dtype="float16"),
        _digest(methods[0], salt=b"tenant"),
        _digest(methods[0], adapter="tuned"),
    }
    assert len(digests) == 12


def test_how_finely_a_block_is_read_does_not_change_its_name() -> None:
    assert _digest(Method(FallbackCodec(), BASE)) == _digest(Method(FallbackCodec()))
