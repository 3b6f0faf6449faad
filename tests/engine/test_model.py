"""The engine computes what transformers computes, whichever way a prompt is cut."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from kvstrata.engine import Model, SamplingParams, SequenceCache, encode_text, sample
from tests.engine.families import FAMILIES, ROTARY_FAMILIES, VOCAB_SIZE

PROMPT = torch.randint(3, VOCAB_SIZE, (90,), generator=torch.Generator().manual_seed(1)).tolist()


def _all_logits(model: Model, cuts: list[int]) -> tuple[SequenceCache, torch.Tensor]:
    cache = model.new_cache(8)
    parts = [model.forward_all(cache, PROMPT[first:last]) for first, last in pairwise(cuts)]
    return cache, torch.cat(parts)


def _greedy(model: Model, token_ids: list[int], num_tokens: int) -> list[int]:
    cache = model.new_cache(8)
    logits = model.forward(cache, token_ids)
    result: list[int] = []
    for step in range(num_tokens):
        result.append(sample(logits, SamplingParams(), step))
        logits = model.forward(cache, result[-1:])
    return result


@torch.no_grad()
def _reference_greedy(reference: Any, token_ids: list[int], num_tokens: int) -> list[int]:
    output = reference.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(token_ids) :].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "cuts", [[0, 90], [0, 1, 2, 90], [0, 37, 64, 65, 90]], ids=["whole", "singles", "chunks"]
)
def test_logits_equal_those_of_transformers(
    family: str, cuts: list[int], models: dict[str, Model], references: dict[str, Any]
) -> None:
    with torch.no_grad():
        expected = references[family](torch.tensor([PROMPT])).logits[0]
    cache, logits = _all_logits(models[family], cuts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.dtype == torch.float32
    assert cache.length == len(PROMPT)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_generate(
    family: str, models: dict[str, Model], references: dict[str, Any]
) -> None:
    expected = _reference_greedy(references[family], PROMPT[:40], 30)
    assert _greedy(models[family], PROMPT[:40], 30) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_returns_the_last_row_of_forward_all(family: str, models: dict[str, Model]) -> None:
    model = models[family]
    last = model.forward(model.new_cache(8), PROMPT)
    torch.testing.assert_close(last, model.forward_all(model.new_cache(8), PROMPT)[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_first_layer_kv_equals_what_the_cache_holds(family: str, models: dict[str, Model]) -> None:
    cache, _ = _all_logits(models[family], [0, 50, 90])
    keys, values = models[family].first_layer_kv(PROMPT[20:70], 20)
    held_keys, held_values = cache.read(20, 70)
    torch.testing.assert_close(keys, held_keys[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, held_values[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_rotation_and_its_inverse_cancel(family: str, models: dict[str, Model]) -> None:
    cache, _ = _all_logits(models[family], [0, 90])
    keys, _ = cache.read(11, 90)
    back = models[family].rotate(keys, 11, inverse=True)
    assert not torch.allclose(back, keys, atol=1e-2)
    torch.testing.assert_close(models[family].rotate(back, 11), keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_keys_rotated_elsewhere_equal_keys_computed_there(
    family: str, models: dict[str, Model]
) -> None:
    model = models[family]
    here, _ = model.first_layer_kv(PROMPT, 3)
    there, _ = model.first_layer_kv(PROMPT, 120)
    moved = model.rotate(model.rotate(here, 3, inverse=True), 120)
    torch.testing.assert_close(moved, there, rtol=1e-4, atol=1e-4)


def test_positions_may_be_given_one_by_one(models: dict[str, Model]) -> None:
    model = models["llama"]
    keys, _ = model.first_layer_kv(PROMPT, 0)
    order = torch.arange(90).flip(0)
    expected = model.rotate(keys, 0).flip(1)
    torch.testing.assert_close(model.rotate(keys.flip(1), order), expected)


def test_a_model_without_rotation_refuses_to_rotate(models: dict[str, Model]) -> None:
    assert models["opt"].spec.rope == "none"
    with pytest.raises(ValueError, match="does not rotate"):
        models["opt"].rotate(torch.zeros(1, 2, 8), 0)


def test_a_failed_pass_leaves_the_cache_as_it_was(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["llama"]
    cache, logits = _all_logits(model, [0, 50])
    original = SequenceCache.append
    monkeypatch.setattr(SequenceCache, "append", _fail_in_layer_1)
    with pytest.raises(ConnectionError):
        model.forward(cache, PROMPT[60:80])
    monkeypatch.setattr(SequenceCache, "append", original)
    assert cache.length == 50
    rest = model.forward_all(cache, PROMPT[50:])
    torch.testing.assert_close(torch.cat([logits, rest]), _all_logits(model, [0, 90])[1])


def _fail_in_layer_1(
    cache: SequenceCache, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if layer == 1:
        raise ConnectionError
    cache.keys[layer, :, cache.length : cache.length + keys.shape[1]] = 99
    return keys, values


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "at least one"),
        ([5, VOCAB_SIZE], "0..96, not 97"),
        ([-1], "not -1"),
        ([5] * 257, "limit is 256"),
    ],
)
def test_wrong_tokens_are_refused(
    token_ids: list[int], message: str, models: dict[str, Model]
) -> None:
    with pytest.raises(ValueError, match=message):
        models["llama"].forward(models["llama"].new_cache(8), token_ids)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_smollm2_generates_the_tokens_of_transformers(smollm2: Model) -> None:
    text = "The cache holds keys and values. Each block is stored once and read at any precision. "
    prompt = encode_text(smollm2.tokenizer, text * 30)[:300]
    reference = smollm2._hf_model
    reference.set_attn_implementation("sdpa")
    try:
        expected = _reference_greedy(reference, prompt, 64)
    finally:
        reference.set_attn_implementation("kvstrata")
    assert _greedy(smollm2, prompt, 64) == expected
