"""Prediction from layer to layer: fast as in the reference, a step at a time and all at once."""

from typing import Any

import pytest
import torch

from kvstrata.kernels.layer_prediction import (
    LayerWeights,
    ReferenceRecursion,
    Rest,
    add_predictions,
    add_predictions_reference,
    steps,
)
from kvstrata.kernels.layer_prediction_numba import NumbaRecursion

SHAPES = [
    # layers, heads, dim, blocks
    (1, 1, 32, 1),
    (3, 2, 64, 3),
    (2, 3, 80, 2),
    (2, 1, 96, 2),
    (2, 1, 128, 1),
    (2, 1, 256, 1),
    (3, 2, 12, 2),
    (2, 1, 32, 19),
]
each_shape = pytest.mark.parametrize(("layers", "heads", "dim", "blocks"), SHAPES, ids=str)
# Sums of up to 1.5 C float32 terms, then the rounding of the output.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _weights(layers: int, heads: int, dim: int) -> LayerWeights:
    """Return weights that keep vectors about as large as they are."""
    torch.manual_seed(layers + heads + dim)
    channels = 2 * heads * dim
    head = torch.arange(channels) // dim
    across, within = (torch.randn(2, layers, channels, channels) / channels**0.5).half()
    within[:, head[:, None] >= head] = 0
    return LayerWeights(across, within, dim)


def _rest(weights: LayerWeights, blocks: int) -> Rest:
    size = (weights.num_layers * weights.heads, blocks, 64, weights.dim)
    masks = torch.randint(-(2**62), 2**62, size[:2])
    masks[0, 0], masks[-1, -1] = 0, -1
    base = torch.randn(size)
    return Rest(base, base + 0.1 * torch.randn(size), masks)


@each_shape
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_predictions_are_added_as_the_reference_does(
    layers: int, heads: int, dim: int, blocks: int, dtype: torch.dtype
) -> None:
    weights = _weights(layers, heads, dim)
    keys, values = _rest(weights, blocks), _rest(weights, blocks)
    found = add_predictions(keys, values, weights, dtype)
    expected = [torch.empty_like(keys.base, dtype=torch.float64) for _ in found]
    add_predictions_reference(keys, values, weights, expected[0], expected[1])
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == dtype
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype]


@each_shape
def test_heads_are_predicted_as_the_reference_does(
    layers: int, heads: int, dim: int, blocks: int
) -> None:
    weights = _weights(layers, heads, dim)
    reference = ReferenceRecursion(weights, blocks)
    entered = 0
    for recursion, (part, is_value, head) in steps(weights, blocks):
        assert isinstance(recursion, NumbaRecursion if dim % 16 == 0 else ReferenceRecursion)
        if part == 0:
            reference.enter_next_layer()
            entered += 1
        wanted = reference.predict(part)
        torch.testing.assert_close(recursion.predict(part), wanted, rtol=1e-5, atol=1e-5)
        assert is_value == (part < heads)
        assert head == (entered - 1) * heads + part % heads
        put = torch.randn(blocks, 64, dim)
        reference.put(part, put)
        recursion.put(part, put)
    assert entered == layers


def test_steps_and_all_at_once_give_equal_numbers_in_any_batch_and_on_any_threads() -> None:
    weights = _weights(4, 3, 64)
    keys, values = _rest(weights, 5), _rest(weights, 5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.stack(add_predictions(keys, values, weights, torch.float32)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    for n in range(5):
        own = [Rest(*(part[:, n : n + 1].contiguous() for part in rest)) for rest in (keys, values)]
        alone = torch.stack(add_predictions(own[0], own[1], weights, torch.float32))
        assert torch.equal(alone[:, :, 0], found[0][:, :, n])
    none = torch.zeros_like(keys.escape)
    read = add_predictions(
        Rest(keys.base, keys.base, none), Rest(values.base, values.base, none), weights,
        torch.float32,
    )  # fmt: skip
    for recursion, (part, is_value, head) in steps(weights, 5):
        ahead = recursion.predict(part)
        vectors = (keys, values)[is_value].base[head] + ahead
        assert torch.equal(vectors, read[is_value][head])
        recursion.put(part, vectors)


def test_what_does_not_fit_is_refused() -> None:
    weights = _weights(2, 1, 32)
    good = _rest(weights, 2)
    bad: list[tuple[dict[str, Any], torch.dtype]] = [
        ({"base": good.base.half()}, torch.float32),
        ({"fine": good.fine[:, :1]}, torch.float32),
        ({"escape": good.escape[:1]}, torch.float32),
        ({}, torch.float64),
    ]
    for changed, dtype in bad:
        with pytest.raises(ValueError, match=r"must be|decoded to"):
            add_predictions(good, good._replace(**changed), weights, dtype)
    with pytest.raises(ValueError, match="across"):
        LayerWeights(weights.across.float(), weights.within, 32)
    with pytest.raises(ValueError, match="heads of 24"):
        LayerWeights(weights.across, weights.within, 24)
