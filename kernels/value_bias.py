"""The mean error of a block's base-class tokens, as one 4-bit vector per block and head.

Errors of values add up over tokens where those of keys cancel in the softmax, so the mean error,
weighted by how much each token is read, is stored and given back to every base-class token. It is
coded in components times their deviation, so that an error weighs the same in each: q * step with
q in -8..7, stored as q + 8, component i in the low half of byte i and i + D/2 in the high half.
One byte s tells the step, 2 ** ((s - 192) / 16); s = 0 means no bias.
"""

from functools import cache
from typing import NamedTuple

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.block_planes import (
    KEPT_MULTIPLE,
    PlaneLayout,
    check_components,
    check_words,
    decode_block_planes_reference,
)
from kvstrata.kernels.token_masks import check_masks, to_flags

LOWEST, HIGHEST = -8, 7
# Tables, because exp2 and log2 differ in the last bit between machines, and blocks must not.
STEPS = (0.0, *(2.0 ** ((s - 192) / 16) for s in range(1, 256)))
BORDERS = tuple(2.0 ** ((s + 0.5 - 192) / 16) for s in range(1, 255))


@cache
def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


class ValueBias(NamedTuple):
    """Biases as stored: nibbles uint8 (N, H, D/2) and scales uint8 (N, H)."""

    nibbles: torch.Tensor
    scales: torch.Tensor


def encode_value_bias(
    y: torch.Tensor,
    words: torch.Tensor,
    layout: PlaneLayout,
    *,
    weights: torch.Tensor,
    base: torch.Tensor,
    deviation: torch.Tensor,
) -> ValueBias:
    """Return the weighted mean error of the tokens in ``base``.

    Args:
        y: bf16, fp16 or fp32 (H, N, 64, D): the numbers that were encoded.
        words: int64 (N, W), from ``encode_block_planes``.
        layout: What was encoded with; D is even.
        weights: float32 (H, N, 64), at least 0: how much each token is read.
        base: int64 masks (H, N).
        deviation: float32 (H, D), above 0, what components are multiplied by when read.

    Raises:
        ValueError: Shapes or types do not fit, or a weight is negative.
    """
    check_components(y, layout)
    check_words(words, layout)
    check_masks("base masks", base, layout.num_heads, y.shape[1])
    if words.shape[0] != y.shape[1]:
        raise ValueError(f"{words.shape[0]} blocks of words, but {y.shape[1]} of components")
    if layout.dim % 2:
        raise ValueError(f"a bias needs an even number of components, not {layout.dim}")
    if weights.shape != y.shape[:3] or weights.dtype != torch.float32 or (weights < 0).any():
        raise ValueError(f"weights must be float32 {tuple(y.shape[:3])} and not negative")
    if deviation.shape != layout.widths.shape or deviation.dtype != torch.float32:
        raise ValueError(f"deviation must be float32 {tuple(layout.widths.shape)}")
    backend = backend_of(y, words, weights, base, deviation)
    if backend == "triton":
        from kvstrata.kernels.value_bias_triton import encode_value_bias_triton

        return encode_value_bias_triton(y, words, layout, weights, base, deviation)
    if backend == "numba" and layout.dim % KEPT_MULTIPLE == 0:
        from kvstrata.kernels.value_bias_numba import mean_errors_numba, to_nibbles_numba

        means = mean_errors_numba(y, words, layout, weights, base)
        return to_nibbles_numba(means * deviation[:, None])
    means = mean_errors_reference(y, words, layout, weights, base)
    return to_nibbles_reference(means * deviation[:, None])


def mean_errors_reference(
    y: torch.Tensor,
    words: torch.Tensor,
    layout: PlaneLayout,
    weights: torch.Tensor,
    base: torch.Tensor,
) -> torch.Tensor:
    """Return float32 (H, N, D): weighted means of y - base value, NaN where nothing has weight."""
    rest = y.float().clone()
    read = decode_block_planes_reference(words, layout, None, torch.float32)
    rest[..., : read.shape[-1]] -= read.unflatten(1, (-1, rest.shape[2]))
    chosen = weights * to_flags(base)
    return (chosen[..., None] * rest).sum(2) / chosen.sum(2)[..., None]


def to_nibbles_reference(bias: torch.Tensor) -> ValueBias:
    """Return the codes of float32 (H, N, D)."""
    bias = bias.transpose(0, 1)
    peak = bias.abs().amax(-1)
    usable = torch.isfinite(peak) & (peak > 0)
    borders = _table(BORDERS, bias.device)
    scales = (1 + torch.bucketize(peak / HIGHEST, borders, right=True)).masked_fill_(~usable, 0)
    steps = _table(STEPS, bias.device)
    step = steps[scales].masked_fill_(~usable, 1.0)
    codes = (bias.masked_fill(~usable[..., None], 0.0) / step[..., None]).round_()
    codes = (codes.clamp_(LOWEST, HIGHEST) - LOWEST).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return ValueBias(low | high << 4, scales.to(torch.uint8))


def decode_value_bias(bias: ValueBias) -> torch.Tensor:
    """Return float32 (N, H, D): biases of components times their deviation.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    nibbles, scales = bias
    if nibbles.dtype != torch.uint8 or nibbles.ndim != 3:
        raise ValueError(f"nibbles must be uint8 (N, H, D/2), not {tuple(nibbles.shape)}")
    if scales.dtype != torch.uint8 or scales.shape != nibbles.shape[:2]:
        raise ValueError(f"scales must be uint8 {tuple(nibbles.shape[:2])}")
    backend = backend_of(nibbles, scales)
    if backend == "triton":
        from kvstrata.kernels.value_bias_triton import decode_value_bias_triton

        return decode_value_bias_triton(bias)
    if backend == "numba":
        from kvstrata.kernels.value_bias_numba import decode_value_bias_numba

        return decode_value_bias_numba(bias)
    return decode_value_bias_reference(bias)


def decode_value_bias_reference(bias: ValueBias) -> torch.Tensor:
    """Return what ``decode_value_bias`` returns; the definition."""
    nibbles, scales = bias
    steps = _table(STEPS, scales.device)
    codes = torch.cat([nibbles & 15, nibbles >> 4], -1).float()
    return codes.add_(LOWEST).mul_(steps[scales.long()][..., None])
