"""The cache that evicts: H1, H4, H6 and H8 on real models, and that memory falls."""

from typing import Any

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.kept_cache import KeptCache
from kvstrata.methods.h2o import H2O
from kvstrata.methods.token_scores import TokenScores
from tests.engine.calibrating import tokens_of
from tests.engine.families import ROTARY_FAMILIES

PROMPT = 40
PROMPT_IDS, NEXT_IDS = tokens_of(PROMPT), tokens_of(12, seed=2)


def prefill(model: Model, ids: tuple[int, ...] = PROMPT_IDS) -> tuple[SequenceCache, TokenScores]:
    """Return a prompt's cache and the scores of all of its rows."""
    cache = model.new_cache(len(ids), len(ids))
    cache.expect_probes(0, len(ids))
    model.forward(cache, ids)
    queries, rows = cache.probes()
    keys = cache.read(0, len(ids))[0]
    return cache, TokenScores.of(queries, rows, keys, model.attention_scaling)


def keep_all(model: Model, num_tokens: int = PROMPT) -> torch.Tensor:
    spec = model.spec
    return torch.ones(spec.num_layers, spec.num_kv_heads, num_tokens, dtype=torch.bool)


def stepwise(model: Model, cache: Any, ids: tuple[int, ...] = NEXT_IDS) -> torch.Tensor:
    return torch.stack([model.forward(cache, [token]) for token in ids])


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama-yarn", "opt"])
@pytest.mark.parametrize("stage", [None, H2O.neutral()], ids=["kept", "h2o"])
def test_h1_what_evicts_nothing_equals_the_dense_cache(models, family: str, stage: H2O | None):
    model = models[family]
    dense, scores = prefill(model)
    kept = KeptCache(dense, keep_all(model), evict=stage, scores=scores.accumulated())
    expected = stepwise(model, dense)
    torch.testing.assert_close(stepwise(model, kept), expected, atol=1e-4, rtol=1e-4)
    assert kept.kept_fraction == 1.0
    assert kept.positions(0) == [list(range(PROMPT + 12))] * model.spec.num_kv_heads


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_h1_rolling_positions_are_the_true_ones_while_nothing_leaves(models, family: str):
    model = models[family]
    dense, scores = prefill(model)
    stage = H2O(heavy=1 << 20, recent=0, positions="rolling")
    kept = KeptCache(
        dense, keep_all(model), evict=stage, scores=scores.accumulated(), rotate=model.rotate
    )
    torch.testing.assert_close(stepwise(model, kept), stepwise(model, dense), atol=2e-4, rtol=2e-4)


def test_several_new_tokens_at_once_see_each_other_in_order(models):
    model = models["llama"]
    dense, scores = prefill(model)
    for stage in (None, H2O.neutral()):
        kept = KeptCache(dense, keep_all(model), evict=stage, scores=scores.accumulated())
        found = model.forward_all(kept, NEXT_IDS)
        expected = model.forward_all(dense, NEXT_IDS)
        dense.truncate(PROMPT)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Simulation:
    """H2O written out as the paper has it: one head of one layer, lists and loops."""

    def __init__(self, stage: H2O, scores: list[float]) -> None:
        self.stage, self.seats = stage, stage.seats(len(scores))
        self.scores = dict(enumerate(scores))
        self._evict()

    def _evict(self) -> None:
        while len(self.scores) > self.seats.total:
            newest = sorted(self.scores)[len(self.scores) - self.seats.recent :]
            rest = [p for p in self.scores if p not in newest]
            least = min(self.scores[p] for p in rest)
            del self.scores[max(p for p in rest if self.scores[p] == least)]

    def step(self, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Take one token: queries (G, D) at the last position of keys (n, D)."""
        self.scores[len(keys) - 1] = 0.0
        held = sorted(self.scores)
        weights = (queries @ keys[held].T * scaling).softmax(-1).mean(0)
        for position, weight in zip(held, weights.tolist(), strict=True):
            self.scores[position] = self.scores[position] + weight
        self._evict()


def test_h4_every_step_evicts_what_the_paper_s_algorithm_does(models):
    model = models["llama"]
    dense, scores = prefill(model)
    stage = H2O(heavy=6, recent=5)
    kept = KeptCache(dense, keep_all(model), evict=stage, scores=scores.accumulated())
    layer, head, group = 0, 1, model.spec.num_heads // model.spec.num_kv_heads
    simulation = Simulation(stage, scores.accumulated()[layer, head].tolist())
    assert kept.positions(layer)[head] == sorted(simulation.scores)
    for token in NEXT_IDS:
        # Layer 0's queries and keys depend on tokens alone, so a dense cache has the same.
        dense.expect_probes(dense.length, dense.length + 1)
        model.forward(kept, [token])
        model.forward(dense, [token])
        keys = dense.read(0, dense.length)[0][layer, head]
        queries = dense.probes()[0][layer, head * group : (head + 1) * group, 0]
        simulation.step(queries, keys, model.attention_scaling)
        assert kept.positions(layer)[head] == sorted(simulation.scores)
        assert len(kept.positions(layer)[head]) == 11
        recorded = kept.scores(layer)[head]
        assert recorded == pytest.approx(simulation.scores, abs=1e-4)
        assert kept.positions(layer)[head][-5:] == list(range(dense.length - 5, dense.length))


def test_a_head_that_keeps_other_tokens_attends_to_those_alone(models):
    model = models["qwen3"]
    dense, _ = prefill(model)
    flags = torch.rand(keep_all(model).shape) < 0.5
    flags[..., 0] = True
    kept = KeptCache(dense, flags)
    # The same by a mask: what a head does not keep gets keys that no query likes.
    found = stepwise(model, kept, NEXT_IDS[:1])
    masked = MaskedCache(dense, flags)
    expected = stepwise(model, masked, NEXT_IDS[:1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for layer in range(model.spec.num_layers):
        expected_positions = [h.nonzero().flatten().tolist() for h in flags[layer]]
        assert [p[:-1] for p in kept.positions(layer)] == expected_positions


class MaskedCache:
    """Dense attention under a mask per head, to compare with."""

    def __init__(self, dense: SequenceCache, flags: torch.Tensor) -> None:
        self.dense, self.flags, self.length = dense, flags, dense.length

    def begin(self, num_tokens: int, rows=()) -> "MaskedCache":
        return self

    def rows(self, layer: int) -> None:
        return None

    def attend(self, layer, queries, keys, values, scaling):
        k, v = self.dense.append(layer, queries, keys, values)
        flags = torch.cat([self.flags[layer], torch.ones(len(keys), keys.shape[1]).bool()], 1)
        logits = queries.unflatten(0, (len(keys), -1)) @ k[:, None].transpose(2, 3) * scaling
        rows = logits.masked_fill(~flags[:, None, None], -torch.inf).softmax(-1)
        return (rows @ v[:, None]).flatten(0, 1)

    def advance(self, num_tokens: int) -> None:
        pass


def test_h6_rolling_output_does_not_depend_on_where_the_sequence_stands(models):
    model = models["llama"]
    stage = H2O(heavy=6, recent=6, positions="rolling")
    outputs = []
    for shift in (0, 37):
        dense, scores = prefill(model)
        moved = model.new_cache(256)
        keys, values = dense.read(0, PROMPT)
        # The same prompt, standing at position ``shift``: what comes before is not kept.
        junk = torch.zeros_like(keys[:, :, :1]).expand(-1, -1, shift, -1)
        turned = model.rotate(model.rotate(keys, 0, inverse=True), shift)
        if shift:
            moved.write(0, junk, junk)
        moved.write(shift, turned, values)
        flags = torch.cat([torch.zeros(keep_all(model, shift).shape).bool(), keep_all(model)], -1)
        padded = torch.nn.functional.pad(scores.accumulated(), (shift, 0))
        kept = KeptCache(moved, flags, evict=stage, scores=padded, rotate=model.rotate)
        outputs.append(stepwise(model, kept))
        held = [[p - shift for p in head] for head in kept.positions(1)]
        outputs.append(torch.tensor(held, dtype=torch.float32))
    torch.testing.assert_close(outputs[0], outputs[2], atol=2e-4, rtol=2e-4)
    assert torch.equal(outputs[1], outputs[3])


def test_memory_falls_with_the_budget_and_stays(models):
    model = models["llama"]
    dense, scores = prefill(model, tokens_of(200))
    sizes = []
    for share in (0.05, 0.25, 0.5):
        kept = KeptCache(
            dense,
            keep_all(model, 200),
            evict=H2O(heavy=share / 2, recent=share / 2),
            scores=scores.accumulated(),
        )
        stepwise(model, kept)
        before = kept.nbytes
        stepwise(model, kept)
        assert kept.nbytes == before  # one more place than seats, whatever follows
        sizes.append(kept.nbytes)
        overhead = 12 / (2 * model.spec.head_dim * 4)  # a position and a score per token
        assert (
            kept.nbytes / (1 + overhead) <= (share + 1 / 200) * dense.nbytes * 200 / dense.capacity
        )
    assert sizes == sorted(sizes)


def test_a_pass_that_fails_half_way_may_be_repeated(models):
    model = models["llama"]
    dense, scores = prefill(model)
    caches = [
        KeptCache(dense, keep_all(model), evict=H2O(heavy=6, recent=5), scores=scores.accumulated())
        for _ in range(2)
    ]
    stepwise(model, caches[0])

    class BrokenError(Exception):
        pass

    attend, calls = caches[1].attend, 0

    def failing(layer, *args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise BrokenError
        return attend(layer, *args)

    caches[1].attend = failing  # type: ignore[method-assign]
    with pytest.raises(BrokenError):
        model.forward(caches[1], NEXT_IDS[:1])
    caches[1].attend = attend  # type: ignore[method-assign]
    found = stepwise(model, caches[1])
    assert caches[0].length == caches[1].length
    assert [caches[0].positions(i) for i in range(3)] == [caches[1].positions(i) for i in range(3)]
    dense.truncate(PROMPT)
    again = KeptCache(
        dense, keep_all(model), evict=H2O(heavy=6, recent=5), scores=scores.accumulated()
    )
    torch.testing.assert_close(found, stepwise(model, again))


def test_what_cannot_be_done_is_refused(models):
    dense, scores = prefill(models["opt"])
    everything = keep_all(models["opt"])
    with pytest.raises(ValueError, match="scores"):
        KeptCache(dense, everything, evict=H2O())
    with pytest.raises(ValueError, match="rotated"):
        KeptCache(
            dense,
            everything,
            evict=H2O(positions="rolling"),
            scores=scores.accumulated(),
            rotate=models["opt"].rotate,
        )
    kept = KeptCache(dense, everything)
    with pytest.raises(ValueError, match="positions"):
        models["opt"].forward(kept, tokens_of(250))
