"""Layers that run for some rows: SkipDecode through real models (papers.md, S4, S5, S7, S8)."""

from collections import Counter

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.attention import LayerRows
from kvstrata.methods.skipdecode import SkipDecode, running_rows
from tests.engine.families import FAMILIES

PROMPT = list(range(5, 25))
ANSWER = list(range(30, 42))
SCHEDULE = SkipDecode(max_layers=3, min_layers=1, decay_tokens=6, warmup_layers=0)


def rows_of(first: int, count: int, schedule: SkipDecode = SCHEDULE) -> LayerRows:
    """Rows of tokens ``first`` to ``first + count`` - 1 of PROMPT + ANSWER."""
    indices = range(first - len(PROMPT), first - len(PROMPT) + count)
    picked = running_rows([schedule] * count, indices, 3)
    return [None if rows is None else torch.tensor(rows, dtype=torch.int64) for rows in picked]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_over_all_tokens_equals_step_by_step_decode(
    models: dict[str, Model], family: str
) -> None:
    model, ids = models[family], PROMPT + ANSWER
    cache = model.new_cache(len(ids))
    steps = [model.forward(cache, PROMPT)]
    for number, token_id in enumerate(ANSWER):
        steps.append(model.forward(cache, [token_id], rows_of(len(PROMPT) + number, 1)))
    whole = model.forward_once(ids, rows_of(0, len(ids)))[len(PROMPT) - 1 :]
    torch.testing.assert_close(torch.stack(steps), whole, atol=2e-5, rtol=2e-5)
    dense = model.forward_once(ids)[len(PROMPT) - 1 :]
    assert not torch.allclose(dense[3:], whole[3:], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_on_top_of_a_cache_equal_one_pass(models: dict[str, Model], family: str) -> None:
    model, ids = models[family], PROMPT + ANSWER
    cache = model.new_cache(len(ids))
    parts = [
        model.forward_all(cache, ids[first:last], rows_of(first, last - first))
        for first, last in ((0, 9), (9, 23), (23, 32))
    ]
    whole = model.forward_once(ids, rows_of(0, len(ids)))
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-5, rtol=2e-5)


def test_all_layers_for_all_tokens_is_the_dense_model(models: dict[str, Model]) -> None:
    model, ids = models["llama"], PROMPT + ANSWER
    rows = rows_of(0, len(ids), SkipDecode(3, 3))
    assert list(rows) == [None] * 3
    assert torch.equal(model.forward_once(ids, rows), model.forward_once(ids))


def test_every_layer_runs_as_often_as_the_schedule_says(models: dict[str, Model]) -> None:
    model, ran = models["llama"], Counter[int]()
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, n=n: ran.update({n: kwargs["hidden_states"].shape[1]}),
            with_kwargs=True,
        )
        for n, layer in enumerate(model._hf_model.model.layers)
    ]
    cache = model.new_cache(64)
    model.forward(cache, PROMPT)
    for number, token_id in enumerate(ANSWER):
        model.forward(cache, [token_id], rows_of(len(PROMPT) + number, 1))
    for handle in handles:
        handle.remove()
    assert sum(ran.values()) == 3 * len(PROMPT) + SCHEDULE.executions(len(ANSWER))
    cached = SCHEDULE.num_cached(len(ANSWER), 3)
    assert [ran[n] for n in range(3)] == [len(PROMPT) + n for n in cached]


def test_gradients_reach_the_weights_of_layers_that_ran(models: dict[str, Model]) -> None:
    model = models["llama"]
    weights = [layer.mlp.down_proj.weight for layer in model._hf_model.model.layers]
    for weight in weights:
        weight.requires_grad_(True)
    rows: LayerRows = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64), None]
    loss = model.forward_once([5, 6, 7], rows).logsumexp(-1).sum()
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    assert [g is not None and bool(g.abs().sum() > 0) for g in found] == [True, False, True]
