"""A pass over several sequences gives each what it would get alone, however they are mixed."""

import random
from collections.abc import Sequence
from typing import Self

import pytest
import torch

from kvstrata.engine import Model, SequenceCache
from kvstrata.engine.attention import AttentionState, LayerRows
from kvstrata.engine.batch import BatchState, Span, begin_pass
from tests.engine.families import FAMILIES, VOCAB_SIZE

LENGTHS = (1, 2, 65, 90, 17)


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def alone(model: Model, token_ids: list[int]) -> torch.Tensor:
    return model.forward(model.new_cache(8), token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_any_length_share_a_pass(family: str, models: dict[str, Model]) -> None:
    model = models[family]
    expected = torch.stack([alone(model, ids) for ids in prompts()])
    caches = [model.new_cache(8) for _ in LENGTHS]
    logits = model.forward_batch([Span(c, ids) for c, ids in zip(caches, prompts(), strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert [cache.length for cache in caches] == list(LENGTHS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_chunks_and_steps_equals_each_sequence_alone(
    family: str, seed: int, models: dict[str, Model]
) -> None:
    """In each pass a random part of the sequences gets a random number of tokens."""
    rng, model, whole = random.Random(seed), models[family], prompts()
    caches = [model.new_cache(8) for _ in whole]
    last: dict[int, torch.Tensor] = {}
    while len(last) < len(whole):
        spans, chosen = [], []
        for i, (cache, ids) in enumerate(zip(caches, whole, strict=True)):
            if cache.length < len(ids) and rng.random() < 0.7:
                count = min(rng.choice((1, 1, 1, 2, 7, 33)), len(ids) - cache.length)
                is_last = cache.length + count == len(ids)
                spans.append(Span(cache, ids[cache.length :][:count], wants_logits=is_last))
                chosen += [i] if is_last else []
        if spans:
            last.update(zip(chosen, model.forward_batch(spans), strict=True))
    for i, ids in enumerate(whole):
        torch.testing.assert_close(last[i], alone(model, ids), rtol=1e-4, atol=1e-4)


def test_a_pass_that_wants_no_logits_computes_none(models: dict[str, Model]) -> None:
    model, cache = models["llama"], models["llama"].new_cache(8)
    logits = model.forward_batch([Span(cache, [5, 6], wants_logits=False)])
    assert logits.shape == (0, VOCAB_SIZE)
    assert cache.length == 2


class Stepping(SequenceCache):
    """Counts the calls that serve several sequences at once."""

    together: Sequence[int] = ()

    @classmethod
    def begin_step(cls, caches: Sequence[Self], rows: Sequence[LayerRows]) -> AttentionState:
        cls.together = [*cls.together, len(caches)]
        return BatchState([(1, c.begin(1, r)) for c, r in zip(caches, rows, strict=True)])


def test_single_tokens_of_one_kind_of_cache_are_attended_together(models: dict[str, Model]) -> None:
    model = models["llama"]
    caches: list[SequenceCache] = [model.new_cache(8)]
    caches += [Stepping(model.spec, 8) for _ in range(3)]
    expected = [alone(model, ids) for ids in ([5], [6], [7, 8], [9])]
    tokens = ([5], [6], [7, 8], [9])
    logits = model.forward_batch([Span(c, ids) for c, ids in zip(caches, tokens, strict=True)])
    assert Stepping.together == [2]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_sequences_that_skip_other_layers_share_a_pass(models: dict[str, Model]) -> None:
    """One runs everything, one leaves out the middle layer, one runs the first token only there."""
    model = models["llama"]
    some = torch.arange(1)
    whole: LayerRows = ()
    skipping: LayerRows = (None, torch.arange(0), None)
    partly: LayerRows = (None, some, some)
    chosen = ((whole, [5, 6, 7]), (skipping, [8]), (partly, [9, 10]), (skipping, [11]))
    expected = [model.forward(model.new_cache(8), ids, rows) for rows, ids in chosen]
    logits = model.forward_batch(
        [Span(Stepping(model.spec, 8), ids, rows=rows) for rows, ids in chosen]
    )
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)
    nobody = model.forward_batch(
        [Span(model.new_cache(8), [i], rows=skipping) for i in range(8, 10)]
    )
    torch.testing.assert_close(nobody[0], expected[1], rtol=1e-4, atol=1e-4)


def test_spans_that_do_not_belong_together_are_refused(models: dict[str, Model]) -> None:
    model = models["llama"]
    cache, other = model.new_cache(8), model.new_cache(8)
    with pytest.raises(ValueError, match="one span"):
        begin_pass([Span(cache, [5]), Span(cache, [6])])
    with pytest.raises(ValueError, match="at least one span"):
        model.forward_batch([])
    with pytest.raises(ValueError, match="at least one token"):
        model.forward_batch([Span(other, [5]), Span(cache, [])])
    assert (cache.length, other.length) == (0, 0)
