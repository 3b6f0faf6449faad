"""Every stage keeps its promises to the pipeline, and the pipeline its order and rules."""

import dataclasses

import pytest
import torch

from kvstrata.methods.attention_gate import AttentionGate
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import STAGES, Pipeline, check
from kvstrata.methods.stage import Stage
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.errors import InvalidRequestError, MethodConflictError

each_stage = pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)


@each_stage
def test_a_stage_is_a_small_value_that_names_its_paper(kind: type[Stage]):
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    assert kind.paper in (__import__(kind.__module__, fromlist=["_"]).__doc__ + kind.__doc__)
    assert kind.neutral() != kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), dataclasses.fields(kind)[0].name, None)


@each_stage
def test_settings_name_every_field_so_that_equal_text_means_equal_blocks(kind: type[Stage]):
    text = kind().settings()
    assert text.startswith(f"{kind.name}(")
    for field in dataclasses.fields(kind):
        assert f"{field.name}=" in text
    assert text != kind.neutral().settings()


@each_stage
def test_a_pipeline_of_one_stage_holds_it(kind: type[Stage]):
    pipeline = Pipeline.of(kind())
    assert pipeline.stages == (kind(),)
    assert pipeline.needs_whole_prompt is (kind is ZipVL)
    assert (kind().settings() in pipeline.settings()) is kind.changes_blocks


def test_stages_act_in_their_one_order_however_they_are_given():
    given = (ZipCache(), H2O(), AttentionGate(), ZipVL())
    pipeline = Pipeline.of(*given)
    assert [type(stage) for stage in pipeline.stages] == list(STAGES.values())
    assert pipeline == Pipeline.of(*reversed(given))
    assert Pipeline().stages == ()
    assert Pipeline().settings() == ""


def test_scores_come_from_one_set_of_rows():
    both = Pipeline.of(ZipVL(seed=1), ZipCache(seed=2))
    rows = both.probes(1000)
    assert rows is not None
    assert torch.equal(rows, ZipCache(seed=2).probes(1000))
    alone = Pipeline.of(ZipVL(seed=1)).probes(1000)
    assert alone is not None
    assert torch.equal(alone, ZipVL(seed=1).probes(1000))
    every = Pipeline.of(H2O()).probes(1000)
    assert every is not None
    assert torch.equal(every, torch.arange(1000))
    assert Pipeline().probes(1000) is None


CONFLICTS = {
    "lossless_and_quantised": (Pipeline.of(ZipCache()), ExactCodec()),
    "left_out_of_dense_blocks": (Pipeline.of(AttentionGate()), FallbackCodec()),
}


@pytest.mark.parametrize(("rule", "pair"), CONFLICTS.items(), ids=CONFLICTS)
def test_what_excludes_each_other_is_refused_by_name(rule: str, pair):
    with pytest.raises(MethodConflictError, match="codec") as refusal:
        check(*pair)
    assert isinstance(refusal.value, InvalidRequestError)
    assert refusal.value.metadata == {"rule": rule}
    assert refusal.value.remedy


def test_evicting_the_rest_leaves_tokens_out_of_blocks_and_keeping_it_in_low_bits_does_not():
    evicting = Pipeline.of(ZipVL(rest="evict"))
    assert evicting.leaves_out
    assert not Pipeline.of(ZipVL(), H2O(), ZipCache()).leaves_out
    with pytest.raises(MethodConflictError):
        check(evicting, FallbackCodec())
    check(evicting, ZipCacheCodec(ZipCache()))


def test_what_composes_is_let_through():
    everything = Pipeline.of(AttentionGate(), ZipVL(), H2O(), ZipCache())
    check(everything, ZipCacheCodec(ZipCache()))
    check(Pipeline.of(H2O()), ExactCodec())
    check(Pipeline.of(ZipCache.neutral()), ExactCodec())
