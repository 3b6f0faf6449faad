"""ZipCache's scores, probes and arithmetic: the checks Z1 to Z4, Z11 and Z12.

Z5, Z7, Z8 and Z10 are in ``tests/kernels/test_paper_quantizers.py``, Z6 and Z9 with the codec.
"""

import pytest
import torch

from kvstrata.kernels.paper_quantizers import compression_ratio, num_parameters
from kvstrata.methods.token_scores import TokenScores
from kvstrata.methods.zipcache import ZipCache
from kvstrata.protos.errors import LimitError


def uniform(num_tokens: int, rows: torch.Tensor | None = None) -> TokenScores:
    rows = torch.arange(num_tokens) if rows is None else rows
    zeros = torch.zeros(1, 1, num_tokens, 4)
    return TokenScores.of(zeros[:, :, rows], rows, zeros, 1.0)


def test_z1_uniform_attention_over_eight_tokens():
    scores = uniform(8)
    sums = [2.71786, 1.71786, 1.21786, 0.88452, 0.63452, 0.43452, 0.26786, 0.125]
    means = [0.33973, 0.24541, 0.20298, 0.1769, 0.15863, 0.14484, 0.13393, 0.125]
    assert scores.accumulated().flatten().tolist() == pytest.approx(sums, abs=1e-5)
    assert scores.normalised().flatten().tolist() == pytest.approx(means, abs=1e-5)


def test_z2_equal_weights_score_equally_however_many_rows_see_the_token():
    # Column j gets weight w from every later row: only the count differs between columns.
    num_tokens, weight = 12, 0.05
    saliency = torch.full((1, 1, num_tokens), weight)
    scores = TokenScores(saliency, torch.arange(num_tokens))
    assert scores.normalised().unique().numel() == 1
    expected = weight * torch.arange(num_tokens, 0, -1)
    torch.testing.assert_close(scores.accumulated()[0, 0], expected)


def test_z3_parameters_at_the_papers_sizes():
    size = (8, 4096, 4096)
    assert 2 * num_parameters("groupwise", *size) == 16_777_216
    assert 2 * num_parameters("tokenwise", *size) == 131_072
    both = num_parameters("channelwise", *size) + num_parameters("separable", *size)
    assert both == 77_824
    assert num_parameters("groupwise", *size) == 8_388_608
    assert num_parameters("separable", *size) == 69_632


def ratio(salient: float, batch: int, num_tokens: int, width: int, classes: int) -> float:
    bits = ZipCache(salient=salient).mean_bits
    parameters = classes * num_parameters("channelwise", batch, num_tokens, width)
    parameters += num_parameters("separable", batch, num_tokens, width)
    return compression_ratio(2 * batch * num_tokens * width, bits, parameters)


def test_z4_compression_ratios_of_the_specification():
    elements = 2 * 8 * 4096 * 4096
    for group, expected in ((32, 3.200), (128, 3.765)):
        parameters = 2 * num_parameters("groupwise", 8, 4096, 4096, group)
        assert compression_ratio(elements, 4, parameters) == pytest.approx(expected, abs=5e-4)
    tokenwise = 2 * num_parameters("tokenwise", 8, 4096, 4096)
    assert compression_ratio(elements, 4, tokenwise) == pytest.approx(3.992, abs=5e-4)
    both = num_parameters("channelwise", 8, 4096, 4096) + num_parameters("separable", 8, 4096, 4096)
    assert compression_ratio(elements, 4, both) == pytest.approx(3.995, abs=5e-4)
    rows = [
        (0.6, 1, 4096, (4.985, 4.979)),
        (0.7, 1, 4096, (4.692, 4.687)),
        (0.286, 1, 4096, (6.197, 6.188)),
    ]
    for salient, batch, num_tokens, expected in rows:
        for classes in (1, 2):
            found = ratio(salient, batch, num_tokens, 4096, classes)
            assert found == pytest.approx(expected[classes - 1], abs=5e-4)
    assert ratio(0.6, 8, 840, 4096, 2) == pytest.approx(4.985, abs=1e-3)


def test_v10_the_ratio_at_zipvl_s_mean_share():
    assert 16 / ZipCache(salient=0.286).mean_bits == pytest.approx(6.221, abs=5e-4)
    for classes in (1, 2):
        assert 6.185 < ratio(0.286, 1, 4096, 4096, classes) < 6.205


def test_z11_with_all_rows_the_probe_count_is_the_paper_s_divisor():
    scores = uniform(50)
    torch.testing.assert_close(scores.normalised("full_nnz"), scores.normalised())


@pytest.mark.parametrize("num_tokens", [1, 2, 19, 20, 1000])
def test_z12_the_last_row_is_always_a_probe(num_tokens: int):
    rows = ZipCache().probes(num_tokens)
    assert rows[-1] == num_tokens - 1
    assert (rows.diff() > 0).all()
    assert torch.equal(rows, ZipCache().probes(num_tokens))
    if num_tokens == 1000:
        assert len(rows) == 100
        assert rows[50:].tolist() == list(range(950, 1000))
        assert not torch.equal(rows, ZipCache(seed=1).probes(num_tokens))


def test_probes_with_the_official_divisor_rank_otherwise():
    rows = ZipCache().probes(1000)
    scores = uniform(1000, rows)
    full = uniform(1000).normalised()[0, 0]
    lowest = set(full.argsort()[:400].tolist())
    ours = set(scores.normalised()[0, 0].argsort()[:400].tolist())
    official = set(scores.normalised("full_nnz")[0, 0].argsort()[:400].tolist())
    assert len(lowest & ours) > 380
    assert len(lowest & official) < 100


@pytest.mark.parametrize(("salient", "count"), [(0.6, 6), (0.0, 0), (1.0, 10), (0.35, 4)])
def test_the_least_salient_share_is_rounded_down(salient: float, count: int):
    scores = TokenScores(torch.rand(2, 3, 10), torch.arange(10))
    chosen = ZipCache(salient=salient).salient_tokens(scores)
    assert (chosen.sum(-1) == count).all()
    if 0 < count < 10:
        lowest_chosen = scores.saliency.masked_fill(~chosen, torch.inf).amin(-1)
        assert (lowest_chosen > scores.saliency.masked_fill(chosen, -1.0).amax(-1)).all()


def test_one_set_per_layer_or_one_per_head():
    scores = TokenScores(torch.rand(2, 3, 40), torch.arange(40))
    own = ZipCache().salient_tokens(scores)
    assert not torch.equal(own[:, 0], own[:, 1])
    shared = ZipCache(share_heads=True).salient_tokens(scores)
    assert torch.equal(shared[:, 0], shared[:, 1])
    mean = TokenScores(scores.saliency.mean(1, keepdim=True), scores.rows)
    assert torch.equal(shared[:, :1], ZipCache().salient_tokens(mean))


@pytest.mark.parametrize(
    "settings",
    [
        {"salient": 1.2},
        {"salient": -0.1},
        {"high_bits": 3},
        {"low_bits": 0},
        {"high_bits": 2, "low_bits": 4},
        {"recent_probes": -1},
        {"random_probes": 1.5},
        {"normaliser": "none"},
        {"quantiser": "kivi"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(LimitError, match="zipcache") as refusal:
        ZipCache(**settings)
    assert refusal.value.remedy
