"""Normalised saliency against a naive computation over the full matrix."""

import pytest
import torch

from kvstrata.engine.saliency import saliency


def _naive(
    queries: torch.Tensor, positions: list[int], keys: torch.Tensor, scaling: float
) -> torch.Tensor:
    num_layers, num_heads, _, _ = queries.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    per_head = torch.zeros(num_layers, num_heads, num_keys)
    for layer in range(num_layers):
        for head in range(num_heads):
            sums, counts = torch.zeros(num_keys), torch.zeros(num_keys)
            for row, position in enumerate(positions):
                visible = min(position + 1, num_keys)
                seen_keys = keys[layer, head * num_kv_heads // num_heads, :visible]
                scores = seen_keys @ queries[layer, head, row]
                sums[:visible] += torch.softmax(scores * scaling, dim=0)
                counts[:visible] += 1
            per_head[layer, head] = sums / counts
    grouped = per_head.view(num_layers, num_kv_heads, -1, num_keys).mean(dim=2)
    for column in grouped.view(-1, num_keys):
        column[column.isnan()] = column[~column.isnan()].min()
    return grouped


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "positions", "num_keys"),
    [
        (6, 2, list(range(20, 30)), 30),
        (4, 4, [3, 9, 17], 25),
        (1, 1, [0], 1),
        (3, 1, list(range(11)), 11),
    ],
    ids=["last-rows", "unseen-columns", "one", "all-rows"],
)
def test_it_equals_the_naive_computation(
    num_heads: int, num_kv_heads: int, positions: list[int], num_keys: int
) -> None:
    torch.manual_seed(0)
    queries = torch.randn(2, num_heads, len(positions), 8)
    keys = torch.randn(2, num_kv_heads, num_keys, 8)
    scores = saliency(queries, torch.tensor(positions), keys, 0.4)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, _naive(queries, positions, keys, 0.4))


def test_uniform_attention_scores_fall_from_a_third_to_an_eighth() -> None:
    scores = saliency(torch.zeros(1, 1, 8, 4), torch.arange(8), torch.zeros(1, 1, 8, 4), 1.0)
    expected = [sum(1 / (i + 1) for i in range(j, 8)) / (8 - j) for j in range(8)]
    torch.testing.assert_close(scores[0, 0], torch.tensor(expected))
    assert scores[0, 0, 0].item() == pytest.approx(0.340, abs=5e-4)
    assert scores[0, 0, 7].item() == pytest.approx(0.125)


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 2, 5, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    positions = torch.arange(4, 9)
    exact = saliency(queries.float(), positions, keys.float(), 0.3)
    torch.testing.assert_close(saliency(queries, positions, keys, 0.3), exact)


def test_inputs_that_do_not_fit_are_refused() -> None:
    queries, keys = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 9, 8)
    with pytest.raises(ValueError, match="at least one probe row"):
        saliency(queries[:, :, :0], torch.arange(0), keys, 1.0)
    with pytest.raises(ValueError, match="3 probe rows but positions"):
        saliency(queries, torch.arange(2), keys, 1.0)
    with pytest.raises(ValueError, match="do not fit keys"):
        saliency(queries[:, :3], torch.arange(3), keys, 1.0)
