"""Passes over given keys and values: the same numbers as over a cache, and gradients."""

import pytest
import torch

from kvstrata.engine import Model
from tests.engine.families import FAMILIES, VOCAB_SIZE

PROMPT = torch.randint(3, VOCAB_SIZE, (90,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("cached", "new"), [(70, 20), (70, 1), (0, 20), (1, 2)])
def test_it_equals_a_pass_over_a_cache_with_the_same_content(
    family: str, cached: int, new: int, models: dict[str, Model]
) -> None:
    model = models[family]
    cache = model.new_cache(100)
    if cached:
        model.forward(cache, PROMPT[:cached])
    keys, values = (part.clone() for part in cache.read(0, cached))
    rest = PROMPT[cached : cached + new]
    with torch.no_grad():
        logits = model.continue_over(keys, values, rest)
    torch.testing.assert_close(logits, model.forward_all(cache, rest), rtol=1e-4, atol=1e-4)
    assert (logits.shape, logits.dtype) == ((new, VOCAB_SIZE), model.spec.dtype)


def test_what_is_given_is_what_is_attended_and_stays_as_it_is(models: dict[str, Model]) -> None:
    model = models["llama"]
    generator = torch.Generator().manual_seed(0)
    spec = model.spec
    shape = (spec.num_layers, spec.num_kv_heads, 30, spec.head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    cache = model.new_cache(64)
    cache.write(0, keys, values)
    kept = keys.clone(), values.clone()
    with torch.no_grad():
        logits = model.continue_over(list(keys), list(values), PROMPT[:10])
    torch.testing.assert_close(logits, model.forward_all(cache, PROMPT[:10]), rtol=1e-4, atol=1e-4)
    assert torch.equal(keys, kept[0])
    assert torch.equal(values, kept[1])


def test_gradients_reach_every_layer_and_only_where_asked(models: dict[str, Model]) -> None:
    model = models["qwen3"]
    cache = model.new_cache(100)
    model.forward(cache, PROMPT[:70])
    keys, values = ([layer.clone() for layer in part] for part in cache.read(0, 70))
    keys[1].requires_grad_()
    values[2].requires_grad_()
    model.continue_over(keys, values, PROMPT[70:]).sum().backward()
    for layer in range(3):
        assert (keys[layer].grad is not None) == (layer == 1)
        assert (values[layer].grad is not None) == (layer == 2)
    assert keys[1].grad is not None
    assert keys[1].grad.abs().amax(-1).min() > 0
    assert all(p.grad is None for p in model._hf_model.parameters())


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [([], "at least one"), ([VOCAB_SIZE], "0..96"), ([5] * 187, "limit is 256")],
)
def test_wrong_tokens_are_refused(
    token_ids: list[int], message: str, models: dict[str, Model]
) -> None:
    model = models["llama"]
    keys = torch.zeros(3, model.spec.num_kv_heads, 70, model.spec.head_dim)
    with pytest.raises(ValueError, match=message):
        model.continue_over(keys, keys, token_ids)
