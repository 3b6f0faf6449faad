"""Stages inside a pass: scores of the rows that were asked, what heads keep, what matters."""

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.staged_cache import StagedCache
from kvstrata.methods.attention_gate import AttentionGate
from kvstrata.methods.gate_weights import GateWeights
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.token_scores import TokenScores
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipvl import ZipVL
from tests.engine.calibrating import tokens_of
from tests.methods.gates import random_gates

IDS = tokens_of(150)


def run(
    model: Model,
    pipeline: Pipeline,
    chunks: tuple[int, ...] = (150,),
    kept=None,
    gates=None,
    ids=IDS,
):
    """Return the logits of all tokens and the staged cache."""
    cache = model.new_cache(150)
    staged = StagedCache(cache, pipeline, kept, gates)
    staged.expect(150)
    first, logits = 0, []
    for size in chunks:
        logits.append(model.forward_all(staged, ids[first : first + size]))
        first += size
    return torch.cat(logits), staged


def expected_scores(model: Model, rows: torch.Tensor) -> TokenScores:
    cache = model.new_cache(150, 150)
    cache.expect_probes(0, 150)
    model.forward(cache, IDS)
    queries, _ = cache.probes()
    keys = cache.read(0, 150)[0].contiguous()
    asked = queries[:, :, rows].contiguous()
    return TokenScores.of(asked, rows, keys, model.attention_scaling)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("chunks", [(150,), (64, 50, 36)], ids=str)
@pytest.mark.parametrize("stage", [H2O(), ZipCache()], ids=["all rows", "probes"])
def test_scores_are_those_of_the_asked_rows_however_the_prompt_is_cut(
    models, family, chunks, stage
):
    model, pipeline = models[family], Pipeline.of(stage)
    logits, staged = run(model, pipeline, chunks)
    rows = pipeline.probes(150)
    assert rows is not None
    found, expected = staged.scores(), expected_scores(model, rows)
    assert found is not None
    assert torch.equal(found.rows, rows)
    torch.testing.assert_close(found.saliency, expected.saliency, atol=1e-5, rtol=1e-4)
    dense = model.forward_all(model.new_cache(150), IDS)
    torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)


def test_a_pass_that_fails_leaves_no_scores_behind(models):
    model = models["llama"]
    staged = StagedCache(model.new_cache(150), Pipeline.of(H2O()))
    staged.expect(150)
    state = staged.begin(100)
    q, k = torch.randn(6, 100, 8), torch.randn(2, 100, 8)
    state.attend(0, q, k, k, 1.0)  # and the pass ends here
    model.forward(staged, IDS)
    found = staged.scores()
    assert found is not None
    torch.testing.assert_close(
        found.saliency, expected_scores(model, torch.arange(150)).saliency, atol=1e-5, rtol=1e-4
    )


def test_rows_see_what_their_head_keeps_and_themselves(models):
    model = models["qwen2"]
    kept = torch.rand(model.spec.num_layers, model.spec.num_kv_heads, 150) < 0.5
    together, _ = run(model, Pipeline(), kept=kept)
    in_parts, _ = run(model, Pipeline(), (1, 70, 79), kept=kept)
    torch.testing.assert_close(together, in_parts, atol=1e-4, rtol=1e-4)
    # What nobody keeps changes nothing for others: another token there, the same logits elsewhere.
    kept[:, :, 10] = False
    first, _ = run(model, Pipeline(), kept=kept)
    others = list(IDS)
    others[10] = (others[10] + 1) % 90
    cache = StagedCache(model.new_cache(150), Pipeline(), kept)
    second = model.forward_all(cache, others)
    different = (first - second).abs().amax(-1) > 1e-4
    assert different.nonzero().flatten().tolist() == [10]


def test_v3_all_tokens_matter_with_tau_one(models):
    model = models["llama"]
    logits, staged = run(model, Pipeline.of(ZipVL.neutral()))
    torch.testing.assert_close(
        logits, model.forward_all(model.new_cache(150), IDS), atol=1e-5, rtol=1e-5
    )
    assert staged.important is not None
    assert staged.important.all()


def test_zipvl_finds_a_ratio_per_layer_and_never_drops_the_last_row(models):
    model = models["llama"]
    _, staged = run(model, Pipeline.of(ZipVL(tau=0.6, min_tokens=10)))
    assert staged.important is not None
    assert staged.important.shape == (model.spec.num_layers, 150)
    assert staged.important[:, -1].all()
    ratios = staged.important.float().mean(1)
    assert (ratios < 0.95).any()
    assert ratios.unique().numel() > 1


class PlainZipVL:
    """Algorithm 1 written down as it is printed, over the whole attention matrix."""

    def __init__(self, stage: ZipVL) -> None:
        self.stage = stage
        self.keys: list[torch.Tensor] = []
        self.important: list[torch.Tensor] = []

    def rows(self, _: int) -> None:
        return None

    def attend(self, _, queries, keys, values, scaling):
        self.keys.append(keys)
        count = queries.shape[1]
        k, v = (x.repeat_interleave(len(queries) // len(keys), 0) for x in (keys, values))
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        logits = (queries @ k.mT * scaling).masked_fill(later, -torch.inf)
        rows = self.stage.probes(count)
        received = logits.softmax(-1)[:, rows].sum(1).mean(0)
        seen_by = torch.tensor([int((rows >= token).sum()) for token in range(count)])
        running = received.double().sort(descending=True).values.cumsum(0)
        number = int((running < self.stage.tau * running[-1]).sum()) + 1
        important = torch.zeros(count, dtype=torch.bool)
        important[(received / seen_by).topk(number).indices] = True
        important[-1] = True
        self.important.append(important)
        among = logits.masked_fill(~important[None, None], -torch.inf).softmax(-1) @ v
        return torch.where(important[:, None], among, 0.0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_zipvl_s_pass_is_the_algorithm_as_printed(models, family, tau):
    model, stage = models[family], ZipVL(tau=tau, min_tokens=10, recent_probes=20, random_probes=9)
    logits, staged = run(model, Pipeline.of(stage))
    plain = PlainZipVL(stage)
    expected = model.forward_through(plain, IDS)
    assert staged.important is not None
    assert staged.important.tolist() == torch.stack(plain.important).tolist()
    assert not staged.important.all()
    torch.testing.assert_close(logits, expected.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        staged.held.read(0, 150)[0], torch.stack(plain.keys), atol=1e-4, rtol=1e-4
    )


def gates_of(model: Model, **settings) -> GateWeights:
    shape = (model.spec.num_layers, model.spec.num_kv_heads, model.width)
    return random_gates(model.model_id, shape, **settings)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_g1_a_threshold_below_every_gate_changes_nothing(models, family):
    model = models[family]
    pipeline = Pipeline.of(AttentionGate.neutral())
    logits, staged = run(model, pipeline, gates=gates_of(model))
    assert staged.kept is not None
    assert staged.kept.all()
    dense = model.forward_all(model.new_cache(150), IDS)
    torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)


def test_g2_rows_see_the_first_token_and_themselves_at_the_highest_threshold(models):
    model = models["llama"]
    logits, staged = run(model, Pipeline.of(AttentionGate(tau=1.0)), gates=gates_of(model))
    assert logits.isfinite().all()
    assert staged.kept is not None
    assert staged.kept[..., 0].all()
    assert not staged.kept[..., 1:].any()


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_gated_prompts_may_be_cut_between_windows(models, family):
    model = models[family]
    pipeline, gates = Pipeline.of(AttentionGate()), gates_of(models[family])
    together, whole = run(model, pipeline, gates=gates)
    in_parts, parts = run(model, pipeline, (64, 64, 22), gates=gates)
    assert whole.kept is not None
    assert 0.2 < whole.kept.float().mean() < 0.9
    assert torch.equal(whole.kept, parts.kept)
    torch.testing.assert_close(together, in_parts, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 64])
def test_g6_a_causal_gate_decides_without_what_follows(models, window):
    model, gates = models["llama"], gates_of(models["llama"], window=window)
    others = list(IDS)
    others[70] = (others[70] + 1) % 90
    pipeline = Pipeline.of(AttentionGate())
    _, before = run(model, pipeline, gates=gates)
    _, after = run(model, pipeline, gates=gates, ids=others)
    assert before.kept is not None
    assert after.kept is not None
    assert torch.equal(before.kept[..., :70], after.kept[..., :70])
    assert not torch.equal(before.kept[..., 70:], after.kept[..., 70:])


def test_a_bidirectional_gate_sees_its_window_and_no_further(models):
    model, gates = models["llama"], gates_of(models["llama"], bidirectional=True)
    others = list(IDS)
    others[127] = (others[127] + 1) % 90
    pipeline = Pipeline.of(AttentionGate())
    _, before = run(model, pipeline, gates=gates)
    _, after = run(model, pipeline, gates=gates, ids=others)
    assert before.kept is not None
    assert after.kept is not None
    assert torch.equal(before.kept[..., :64], after.kept[..., :64])
    assert not torch.equal(before.kept[..., 64:127], after.kept[..., 64:127])


def test_short_prompts_and_what_follows_a_prompt_attend_densely(models):
    model = models["llama"]
    dense = model.forward_all(model.new_cache(150), IDS)
    logits, staged = run(model, Pipeline.of(ZipVL(tau=0.3, min_tokens=151)))
    torch.testing.assert_close(logits, dense, atol=1e-4, rtol=1e-4)
    assert staged.important is None


def test_stages_of_several_sequences_stay_apart_in_one_batch(models):
    from kvstrata.engine.batch import Span

    model = models["llama"]
    alone = [run(model, Pipeline.of(stage)) for stage in (H2O(), ZipVL(tau=0.6, min_tokens=10))]
    caches = []
    for stage in (H2O(), ZipVL(tau=0.6, min_tokens=10)):
        caches.append(StagedCache(model.new_cache(150), Pipeline.of(stage)))
        caches[-1].expect(150)
    found = model.forward_batch([Span(cache, IDS) for cache in caches])
    for row, (logits, staged), cache in zip(found, alone, caches, strict=True):
        torch.testing.assert_close(row, logits[-1], atol=1e-4, rtol=1e-4)
        theirs, ours = staged.scores(), cache.scores()
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.saliency, theirs.saliency, atol=1e-5, rtol=1e-4)
