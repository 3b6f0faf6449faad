"""ZipCache's normalised scores and probe rows; the numbers are those of its specification."""

import pytest
import torch

from kvstrata.kernels.saliency import (
    normalise_sums,
    normalise_sums_reference,
    normalised_saliency,
    probe_rows,
    seeing_rows,
)
from kvstrata.kernels.saliency_numba import normalise_sums_numba
from kvstrata.kernels.saliency_triton import normalise_sums_triton


def _uniform(num_keys: int, positions: torch.Tensor, normaliser: str = "probe_nnz"):
    queries, keys = torch.zeros(1, 1, len(positions), 4), torch.zeros(1, 1, num_keys, 4)
    return normalised_saliency(queries, positions, keys, 1.0, normaliser)[0, 0]


def test_uniform_attention_over_eight_tokens():
    expected = [0.33973, 0.24541, 0.20298, 0.1769, 0.15863, 0.14484, 0.13393, 0.125]
    assert _uniform(8, torch.arange(8)).tolist() == pytest.approx(expected, abs=1e-5)


def test_with_all_rows_both_normalisers_agree():
    positions = torch.arange(50)
    assert torch.equal(seeing_rows(positions, 50), torch.arange(50, 0, -1))
    both = [_uniform(50, positions, name) for name in ("probe_nnz", "full_nnz")]
    torch.testing.assert_close(both[0], both[1])


def test_equal_weights_give_equal_scores_wherever_the_column_is():
    # Row i attends to itself with weight w and to column 0 with the rest: logits by hand.
    queries, keys = torch.zeros(1, 1, 6, 8), torch.zeros(1, 1, 6, 8)
    queries[0, 0, :, 0] = 1
    keys[0, 0, 3, 0] = 2.0  # one loud column: every row that sees it gives it the same logit
    scores = normalised_saliency(queries, torch.tensor([5] * 6), keys, 1.0)[0, 0]
    weight = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + 5)
    torch.testing.assert_close(scores[3], weight)
    torch.testing.assert_close(scores[[0, 1, 2, 4, 5]], torch.full((5,), (1 - weight.item()) / 5))


def test_the_official_divisor_favours_late_tokens_when_rows_are_probed():
    positions = probe_rows(1000, 50, 50, seed=1)
    full = _uniform(1000, torch.arange(1000))
    probed, official = (_uniform(1000, positions, n) for n in ("probe_nnz", "full_nnz"))
    assert (full[-1] / full[0]).item() == pytest.approx(0.134, abs=1e-3)
    assert official[-1] / official[300] > 1.2 * (probed[-1] / probed[300])
    lowest = set(full.argsort()[:400].tolist())
    assert len(lowest & set(probed.argsort()[:400].tolist())) > 380
    assert len(lowest & set(official.argsort()[:400].tolist())) < 100


def test_scores_are_means_over_the_query_heads_of_a_group():
    queries, keys = torch.randn(2, 6, 5, 64), torch.randn(2, 2, 30, 64)
    positions = torch.arange(25, 30)
    grouped = normalised_saliency(queries, positions, keys, 0.2)
    wide = keys.repeat_interleave(3, dim=1)
    single = normalised_saliency(queries, positions, wide, 0.2)
    torch.testing.assert_close(grouped, single.view(2, 2, 3, 30).mean(2))


@pytest.mark.parametrize("shape", [(2, 6, 2, 10, 30), (1, 4, 4, 3, 25), (1, 1, 1, 1, 1)], ids=str)
def test_columns_that_no_probe_sees_get_the_least_score_of_their_head(shape):
    layers, heads, kv_heads, rows, num_keys = shape
    queries, keys = (
        torch.randn(layers, heads, rows, 64),
        torch.randn(layers, kv_heads, num_keys, 64),
    )
    positions = torch.arange(rows) * 2
    scores = normalised_saliency(queries, positions, keys, 0.4)
    assert scores.shape == (layers, kv_heads, num_keys)
    assert scores.dtype == torch.float32
    seen = torch.arange(num_keys) <= positions[-1]
    least = scores[..., seen].amin(-1, keepdim=True)
    assert (scores[..., ~seen] == least).all()


@pytest.mark.parametrize("normalise", [normalise_sums_numba, normalise_sums_triton])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 3, 77), (1, 2, 4, 1030), (1, 1, 8, 2500), (0, 2, 1, 5)], ids=str
)
@pytest.mark.parametrize("seen", [0.01, 0.6, 1.0])
def test_fast_versions_divide_as_the_reference_does(normalise, shape, seen):
    sums, num_keys = torch.rand(shape), shape[3]
    counts = seeing_rows(torch.randint(max(1, int(seen * num_keys)), (20,)), num_keys)
    found, told = normalise(sums, counts), normalise_sums_reference(sums, counts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, told, rtol=1e-6, atol=0)
    if (counts == 0).any() and told.numel():
        assert (found[..., counts == 0] == found[..., counts > 0].amin(-1, keepdim=True)).all()
    torch.testing.assert_close(normalise(sums.mT.contiguous().mT, counts), found)


def test_sums_of_other_shapes_are_refused():
    sums, counts = torch.rand(1, 2, 3, 4), torch.ones(4, dtype=torch.int64)
    for wrong in (sums[0], sums.double(), sums[:, :, :0]):
        with pytest.raises(ValueError, match="sums must be"):
            normalise_sums(wrong, counts)
    for wrong in (counts[:3], counts.int()):
        with pytest.raises(ValueError, match="counts must be"):
            normalise_sums(sums, wrong)


def test_positions_in_any_order_count_alike():
    positions = torch.tensor([7, 1, 4])
    assert seeing_rows(positions, 9).tolist() == [3, 3, 2, 2, 2, 1, 1, 1, 0]
    torch.testing.assert_close(_uniform(9, positions), _uniform(9, positions.sort().values))


@pytest.mark.parametrize("num_tokens", [1, 2, 19, 100, 4097])
def test_probes_are_sorted_unique_and_end_with_the_last_row(num_tokens):
    rows = probe_rows(num_tokens)
    assert rows[-1] == num_tokens - 1
    assert (rows.diff() > 0).all()
    assert rows[0] >= 0
    assert torch.equal(rows, probe_rows(num_tokens))


def test_probes_are_a_twentieth_recent_and_a_twentieth_random():
    rows = probe_rows(1000, seed=3)
    assert rows.shape == (100,)
    assert torch.equal(rows[50:], torch.arange(950, 1000))
    assert not torch.equal(rows, probe_rows(1000, seed=4))


def test_counts_are_taken_as_they_are_and_cut_to_the_prompt():
    assert probe_rows(1000, 64, 64).shape == (128,)
    assert torch.equal(probe_rows(100, 64, 64), torch.arange(100))
    assert torch.equal(probe_rows(100, 0, 0), torch.tensor([99]))


def test_inputs_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        probe_rows(0)
    with pytest.raises(ValueError, match=r"recent must be .*not 1\.5"):
        probe_rows(10, recent=1.5)
    with pytest.raises(ValueError, match=r"random must be .*not -1"):
        probe_rows(10, random=-1)
    queries, keys = torch.zeros(1, 1, 0, 4), torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="at least one probe row"):
        normalised_saliency(queries, torch.zeros(0).long(), keys, 1.0)
    with pytest.raises(ValueError, match="'nnz'"):
        _uniform(3, torch.arange(3), "nnz")
