"""Stages by request: what is set arrives, what is not set is the paper's, nonsense has a name."""

import dataclasses
import math

import pytest

from kvstrata.methods.attention_gate import AttentionGate
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.gate_weights import GATES, GateWeights
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import STAGES, Pipeline
from kvstrata.methods.presets import PAPERS, from_preset, from_settings
from kvstrata.methods.profile import Profile
from kvstrata.methods.skipdecode import SkipDecode
from kvstrata.methods.stage_settings import with_gates
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.errors import (
    InvalidRequestError,
    LimitError,
    MethodConflictError,
    UnknownPresetError,
)
from kvstrata.protos.inference_pb2 import MethodSettings
from tests.methods.gates import random_gates
from tests.methods.profiles import make_profile


@pytest.fixture(scope="module")
def profile() -> Profile:
    return make_profile()


@pytest.fixture(scope="module")
def gates(profile: Profile) -> GateWeights:
    return random_gates(profile.model_id, (3, 2, 16))


def settings_of(codec: str = "", **stages: dict[str, object]) -> MethodSettings:
    settings = MethodSettings(codec=codec)
    for name, given in stages.items():
        message = getattr(settings, name)
        message.SetInParent()
        for key, value in given.items():
            setattr(message, key, value)
    return settings


@pytest.mark.parametrize("name", STAGES)
def test_every_field_of_every_stage_can_be_sent(name: str):
    message = getattr(MethodSettings(), name)
    known = set(message.DESCRIPTOR.fields_by_name)
    own = {field.name for field in dataclasses.fields(STAGES[name])}
    assert own - {"whole_prompt"} <= known  # which the named gates say
    assert {field.removesuffix("_tokens") for field in known - own} <= own


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_only_named_has_the_paper_s_values(name: str, profile, gates):
    method = from_settings(settings_of(**{name: {}}), profile, gates)
    given = {"gates": gates.gates_id} if name == "attention_gate" else {}
    assert method.pipeline == Pipeline.of(STAGES[name](**given))
    assert isinstance(method.codec, CalibratedCodec)


def test_shares_and_counts_are_told_apart(profile: Profile):
    given = {"heavy": 0.25, "recent_tokens": 64, "decay": 0.98, "grace": 16, "sinks": 4}
    method = from_settings(settings_of("exact", h2o=given), profile)
    assert method.pipeline.evict == H2O(0.25, 64, 0.98, 16, 4)
    zipvl = {"recent_probes": 0.5, "min_tokens": 7, "tau": 0.5, "rest": "evict"}
    method = from_settings(settings_of("calibrated", zipvl=zipvl), profile)
    assert method.pipeline.attention == ZipVL(0.5, 0.5, rest="evict", min_tokens=7)
    with pytest.raises(LimitError, match="both heavy and heavy_tokens"):
        from_settings(settings_of(h2o={"heavy": 0.1, "heavy_tokens": 3}), profile)


BAD = [
    {"h2o": {"heavy": 0.0, "recent": 0.0}},
    {"h2o": {"heavy": 1.5}},
    {"h2o": {"positions": "sideways"}},
    {"zipvl": {"tau": 0.0}},
    {"zipvl": {"tau": 1.5}},
    {"attention_gate": {"tau": 3.0}},
    {"zipcache": {"high_bits": 5}},
    {"zipcache": {"salient": float("nan")}},
]


@pytest.mark.parametrize("stages", BAD, ids=str)
def test_nonsense_is_refused_by_name(stages, profile: Profile):
    with pytest.raises(LimitError) as refusal:
        from_settings(settings_of(**stages), profile)
    assert refusal.value.remedy


def test_zipcache_brings_its_codec(profile: Profile):
    strata = from_settings(settings_of(zipcache={}), profile).codec
    assert isinstance(strata, CalibratedCodec)
    assert strata.threshold == profile.threshold_for_bits(3.2)
    finer = from_settings(settings_of(zipcache={"salient": 1.0}), profile).codec
    assert finer.threshold == profile.threshold_for_bits(4.0)
    named = settings_of("calibrated", zipcache={})
    named.bits = 2.0
    assert from_settings(named, profile).codec.threshold == profile.threshold_for_bits(2.0)
    published = from_settings(settings_of(zipcache={"quantiser": "published"}), None)
    assert published.codec == ZipCacheCodec(ZipCache(quantiser="published"))
    assert from_settings(settings_of("zipcache"), None) == published


def test_zipcache_takes_every_setting_of_its_codec_or_refuses_it(profile: Profile):
    aimed = settings_of(zipcache={})
    aimed.max_kl = 0.01
    aimed.key_form = "frame"
    codec = from_settings(aimed, profile).codec
    assert isinstance(codec, CalibratedCodec)
    assert (codec.threshold, codec.form) == (profile.threshold_for_kl(0.01), "frame")
    for field, value in (("bits", 2.0), ("max_kl", 0.01), ("key_form", "frame")):
        published = settings_of(zipcache={"quantiser": "published"})
        setattr(published, field, value)
        with pytest.raises(LimitError, match=field):
            from_settings(published, profile)
    for field, value in (("max_kl", -1.0), ("key_form", "none"), ("bits", 99.0)):
        wrong = settings_of(zipcache={})
        setattr(wrong, field, value)
        with pytest.raises(LimitError):
            from_settings(wrong, profile)


@pytest.mark.parametrize(
    ("codec", "quantiser"),
    [("exact", "strata"), ("fallback", "published"), ("zipcache", "strata")],
)
def test_zipcache_with_another_codec_is_a_conflict(codec: str, quantiser: str, profile: Profile):
    with pytest.raises(MethodConflictError, match="zipcache") as refusal:
        from_settings(settings_of(codec, zipcache={"quantiser": quantiser}), profile)
    assert refusal.value.metadata == {"rule": "zipcache_quantiser"}


def test_without_a_profile_stages_that_leave_tokens_out_store_as_published(gates):
    gated = from_settings(settings_of(attention_gate={}), None, gates)
    assert isinstance(gated.codec, ZipCacheCodec)
    assert from_settings(settings_of(h2o={})).codec == FallbackCodec()
    with pytest.raises(UnknownPresetError, match="profile"):
        from_settings(settings_of(zipcache={}))
    with pytest.raises(MethodConflictError):
        from_settings(settings_of("fallback", attention_gate={}), None, gates)


def test_a_gate_names_the_gates_that_it_decides_by(profile, gates):
    stage = from_settings(settings_of(attention_gate={}), profile, gates).pipeline.gate
    assert stage == AttentionGate(gates=gates.gates_id)
    named = random_gates(profile.model_id, (3, 2, 16), window=0, seed=1)
    GATES.add(named)
    asked = settings_of(attention_gate={"gates": named.gates_id})
    stage = from_settings(asked, profile, gates).pipeline.gate
    assert stage == AttentionGate(gates=named.gates_id, whole_prompt=True)
    assert from_settings(asked, profile, gates).pipeline.needs_whole_prompt


def test_gates_that_are_not_there_or_of_another_model_are_refused(profile, gates):
    with pytest.raises(UnknownPresetError, match="no gates") as refusal:
        from_settings(settings_of(attention_gate={}), profile)
    assert "tune gate" in refusal.value.remedy
    with pytest.raises(UnknownPresetError, match="no gates 'nowhere'"):
        from_settings(settings_of(attention_gate={"gates": "nowhere"}), profile, gates)
    with pytest.raises(UnknownPresetError, match="no gates"):
        from_preset("attention-gate", profile)
    foreign = random_gates(bytes(16), (3, 2, 16), seed=2)
    GATES.add(foreign)
    asked = settings_of(attention_gate={"gates": foreign.gates_id})
    for known in ((profile, gates), (profile, None), (None, gates)):
        with pytest.raises(MethodConflictError, match="another model") as conflict:
            from_settings(asked, *known)
        assert conflict.value.metadata == {"rule": "foreign_gates"}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_are_presets(name: str, profile: Profile, gates):
    method = from_preset(name, profile, gates)
    assert method.pipeline == with_gates(PAPERS[name], profile, gates)
    assert len(method.pipeline.stages) == len(PAPERS[name].stages)


def test_scopes_differ_where_blocks_do(profile: Profile, gates):
    def scope(
        settings: MethodSettings, ids: tuple[int, ...] = (1, 2, 3), known: GateWeights = gates
    ) -> bytes:
        method = from_settings(settings, profile, known)
        return method.scope(model=bytes(16), kv_dtype="float32", prompt_ids=ids).digest()

    plain = scope(settings_of("calibrated"))
    assert scope(settings_of("calibrated", h2o={})) == plain
    assert scope(settings_of("calibrated", attention_gate={})) != plain
    assert scope(settings_of("calibrated", attention_gate={"tau": 0.4})) != scope(
        settings_of("calibrated", attention_gate={})
    )
    others = random_gates(profile.model_id, (3, 2, 16), seed=3)
    gate = settings_of("calibrated", attention_gate={})
    assert scope(gate, known=others) != scope(gate)
    zipvl = settings_of("calibrated", zipvl={})
    assert scope(zipvl) == scope(zipvl)
    assert scope(zipvl) != scope(zipvl, (1, 2, 4))
    assert scope(settings_of("calibrated"), (9,)) == plain


def skipped(num_layers: int = 30, **given: object) -> SkipDecode | None:
    return from_settings(settings_of(skipdecode=given), num_layers=num_layers).skip


def test_a_schedule_comes_from_a_speedup_or_from_layers():
    assert skipped() == SkipDecode(20, 10)
    assert skipped(speedup=3.0, decay_tokens=40, warmup_layers=2) == SkipDecode(13, 7, 40, 2)
    assert skipped(max_layers=12, min_layers=12) == SkipDecode(12, 12)
    assert from_settings(settings_of("exact"), num_layers=30).skip is None


def test_a_schedule_changes_no_block_s_name():
    plain, skip = (
        from_settings(settings_of("exact", **stages), num_layers=30)
        for stages in ({}, {"skipdecode": {}})
    )
    names = [method.scope(model=b"m" * 16, kv_dtype="float32") for method in (plain, skip)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"max_layers": 3}, LimitError),
        ({"min_layers": 3}, LimitError),
        ({"max_layers": 3, "min_layers": 2, "speedup": 2.0}, LimitError),
        ({"max_layers": 2, "min_layers": 3}, InvalidRequestError),
        ({"max_layers": 31, "min_layers": 3}, InvalidRequestError),
        ({"speedup": 0.5}, InvalidRequestError),
        ({"speedup": math.nan}, InvalidRequestError),
        ({"speedup": 100.0}, InvalidRequestError),
        ({"warmup_layers": 12}, InvalidRequestError),
        ({"decay_tokens": 0}, InvalidRequestError),
    ],
)
def test_what_is_no_schedule_is_refused(given: dict[str, object], kind: type[Exception]):
    with pytest.raises(kind):
        skipped(**given)


def test_stages_and_a_schedule_exclude_each_other():
    with pytest.raises(MethodConflictError) as caught:
        from_settings(settings_of(h2o={}, skipdecode={}), num_layers=30)
    assert caught.value.metadata["rule"] == "skipdecode_with_stages"
