"""Biases of values: the weighted mean error in 4 bits, on a GPU as in the reference."""

import pytest
import torch

from kvstrata.kernels.block_planes import encode_block_planes
from kvstrata.kernels.component_basis import encode_tokens
from kvstrata.kernels.token_masks import to_mask
from kvstrata.kernels.value_bias import (
    ValueBias,
    decode_value_bias,
    decode_value_bias_reference,
    encode_value_bias,
    mean_errors_reference,
    to_nibbles_reference,
)
from kvstrata.kernels.value_bias_numba import decode_value_bias_numba, to_nibbles_numba
from kvstrata.kernels.value_bias_triton import (
    decode_value_bias_triton,
    mean_errors_triton,
    to_nibbles_triton,
)
from tests.kernels.calibrated_layer import make_layer, make_layout


@pytest.mark.parametrize(
    ("heads", "blocks", "dim", "dtype"),
    [
        (1, 1, 32, torch.float32),
        (2, 3, 80, torch.bfloat16),
        (3, 1, 6, torch.float32),
        (1, 2, 64, torch.bfloat16),
        (2, 1, 96, torch.float16),
        (1, 1, 128, torch.bfloat16),
        (1, 1, 256, torch.float16),
    ],
    ids=str,
)
def test_triton_s_biases_are_the_reference_s(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    y = torch.randn(heads, blocks, 64, dim).to(dtype)
    layout = make_layout(heads, dim)
    words, _ = encode_block_planes(y, layout, torch.ones(heads, dim))
    weights, deviation = torch.rand(y.shape[:3]), torch.rand(heads, dim) + 0.1
    base = to_mask(torch.rand(y.shape[:3]) < 0.7)
    weights[-1, -1] = 0
    found = mean_errors_triton(y, words, layout, weights, base, deviation)
    told = mean_errors_reference(y, words, layout, weights, base) * deviation[:, None]
    torch.testing.assert_close(found, told, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.isnan(found[-1, -1]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize(
    ("heads", "blocks", "dim"), [(1, 1, 32), (3, 7, 80), (2, 9, 2), (1, 6, 256)]
)
def test_bias_bytes_are_those_of_the_same_means(heads: int, blocks: int, dim: int) -> None:
    sizes = torch.logspace(-5, 5, heads * blocks).view(heads, blocks, 1)
    means = sizes * torch.randn(heads, blocks, dim)
    flaws = (torch.nan, 0.0, torch.inf, 3.5, -7.5)
    for row, value in zip(means.view(-1, dim)[-5:], flaws, strict=False):
        row[dim // 2 - 1 :] = value
    told = to_nibbles_reference(means)
    for to_nibbles in (to_nibbles_triton, to_nibbles_numba):
        found = to_nibbles(means)
        assert torch.equal(found.nibbles, told.nibbles)
        assert torch.equal(found.scales, told.scales)
    read = decode_value_bias_reference(told)
    for decode in (decode_value_bias_triton, decode_value_bias_numba):
        assert torch.equal(decode(told), read)


@pytest.mark.parametrize("dim", [64, 80])
def test_bias_is_the_weighted_mean_error_within_half_a_step(dim: int) -> None:
    layer = make_layer(3, 5, dim, torch.bfloat16)
    y, words, _ = encode_tokens(layer.tokens, layer.basis, layer.weights)
    layout, deviation = layer.basis.layout, layer.basis.deviation
    weights = torch.rand(y.shape[:3])
    weights[0, 0] = 0
    bias = encode_value_bias(
        y, words, layout, weights=weights, base=layer.classes.base, deviation=deviation
    )
    told = mean_errors_reference(y, words, layout, weights, layer.classes.base)
    told = (told * deviation[:, None]).transpose(0, 1)
    read = decode_value_bias(bias)
    assert int(bias.scales[0, 0]) == 0
    assert not read[0, 0].any()
    told[0, 0] = 0
    step = told.abs().amax(-1, keepdim=True) / 7 * 2 ** (1 / 32)
    # the largest may be cut off by up to half a sixteenth of an octave
    assert ((read - told).abs() <= step * 0.5 + told.abs() * (1 - 2 ** (-1 / 32)) + 1e-6).all()


def test_every_bias_byte_decodes_to_its_step() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    nibbles = torch.full((256, 1, 1), 0x9 | 0x0 << 4, dtype=torch.uint8)
    read = decode_value_bias(ValueBias(nibbles, scales))
    assert not read[0].any()
    assert read[192, 0].tolist() == [1.0, -8.0]
    torch.testing.assert_close(read[208, 0], torch.tensor([2.0, -16.0]))
    assert torch.isfinite(read).all()
