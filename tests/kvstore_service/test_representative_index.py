"""Scores and choices agree with the readable reference; memory is bounded."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.kvstore_service.representative_index import (
    Representative,
    RepresentativeIndex,
    score,
    select,
)
from kvstrata.methods.representatives import scores as reference_scores
from kvstrata.methods.representatives import top_blocks
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest

SCOPE = ScopeDigest(b"s" * 16)


def key(number: int) -> BlockKey:
    return BlockKey(SCOPE, BlockHash(number.to_bytes(16, "big")))


def entry(
    seed: int, layers: tuple[int, ...] = (0, 3), heads: int = 2, dim: int = 4
) -> Representative:
    values = np.random.default_rng(seed).standard_normal((len(layers), heads, dim))
    return Representative(64 * seed, layers, values.astype(np.float16))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_scores_are_those_of_the_reference(cosine: bool, group: int) -> None:
    entries = [entry(seed) for seed in range(20)]
    query = np.random.default_rng(99).standard_normal(2 * group * 4).astype(np.float32)
    means = torch.from_numpy(np.stack([e.values[1] for e in entries]))
    wanted = reference_scores(torch.from_numpy(query).view(-1, 4), means, cosine=cosine)
    np.testing.assert_allclose(score(entries, [(3, query)], cosine=cosine)[0], wanted, rtol=1e-5)


def test_a_block_without_a_fitting_representative_has_no_score() -> None:
    query = np.ones(8, np.float32)
    entries = [entry(0), None, entry(1, layers=(0,)), entry(2, layers=()), entry(3, heads=3)]
    assert np.isnan(score(entries, [(3, query)], cosine=False)[0]).tolist() == [
        False,
        True,
        True,
        True,
        True,
    ]


def test_values_at_the_ends_of_their_types_give_finite_scores() -> None:
    values = np.full((1, 2, 4), np.finfo(np.float16).max, np.float16)
    query = np.full(8, np.finfo(np.float32).max, np.float32)
    for cosine in (False, True):
        found = score([Representative(0, (0,), values)], [(0, query)], cosine=cosine)
        assert np.isfinite(found).all()


def test_no_direction_has_no_cosine() -> None:
    zero = Representative(0, (0,), np.zeros((1, 2, 4), np.float16))
    assert score([zero], [(0, np.ones(8, np.float32))], cosine=True).tolist() == [[0.0]]
    assert score([entry(1)], [(0, np.zeros(8, np.float32))], cosine=True).tolist() == [[0.0]]


def chosen(scores: list[float], **options: int) -> list[int]:
    return select(np.array(scores), np.ones(len(scores), bool), **options).tolist()


def test_the_best_chunks_are_taken_whole_and_in_order() -> None:
    """R6 of papers.md."""
    assert chosen([1, 5, 2, 2, 9], top_k=4, chunk=2) == [0, 1, 4]


def test_chosen_blocks_ascend_and_sinks_and_recent_ones_are_always_among_them() -> None:
    """R5 of papers.md; chunks lie between sinks and recent blocks."""
    scores = [0, 0, 1, 9, 1, 9, 1, 0, 0]
    assert chosen(scores, top_k=2, sinks=2, recent=1) == [0, 1, 3, 5, 8]
    assert chosen(scores, top_k=2, chunk=2, sinks=1, recent=1) == [0, 3, 4, 8]
    assert chosen(scores, top_k=0, sinks=5, recent=5) == list(range(9))
    assert chosen(scores, top_k=100, sinks=50, recent=50) == list(range(9))
    assert chosen([], top_k=3, sinks=1, recent=1) == []


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_choices_are_those_of_the_reference(data: st.DataObject) -> None:
    # Scores are small integers, so that means are exact and ties are many.
    scores = data.draw(st.lists(st.sampled_from([None, 0, 1, 2, 4]), max_size=40))
    present = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    chunk = data.draw(st.sampled_from([1, 2, 4]))
    top_k = chunk * data.draw(st.integers(0, 12))
    sinks, recent = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    first = min(sinks, len(scores))
    last = max(first, len(scores) - recent)
    between = [s if p else None for s, p in zip(scores, present, strict=True)][first:last]
    wanted = [first + i for i in top_blocks(between, top_k, chunk)]
    wanted += [i for i in range(len(scores)) if not first <= i < last and present[i]]
    array = np.array([np.nan if s is None else s for s in scores], np.float64)
    mask = np.array(present, bool)
    found = select(array, mask, top_k=top_k, chunk=chunk, sinks=sinks, recent=recent)
    assert found.tolist() == sorted(wanted)


def test_memory_is_bounded_and_the_least_recently_searched_goes_first() -> None:
    one = entry(0).num_bytes
    index = RepresentativeIndex(3 * one)
    for number in range(3):
        index.expect(key(number))
        index.add(key(number), entry(number))
    assert index.find([key(0)])[0] is not None
    index.expect(key(3))
    index.add(key(3), entry(3))
    assert [e is not None for e in index.find([key(n) for n in range(4)])] == [
        True,
        False,
        True,
        True,
    ]
    assert (len(index), index.num_bytes) == (3, 3 * one)
    index.expect(key(4))
    index.add(key(4), entry(4, dim=4096))
    assert index.num_bytes == 3 * one


def test_what_changed_while_it_was_read_is_not_kept() -> None:
    index = RepresentativeIndex(1 << 20)
    index.expect(key(0))
    index.forget([key(0)])
    index.add(key(0), entry(0))
    assert (len(index), index.num_bytes) == (0, 0)
    index.expect(key(0))
    index.add(key(0), entry(0))
    index.forget([key(0), key(1)])
    assert (len(index), index.num_bytes) == (0, 0)
