"""Biases of values on a CPU: a block's base values are read 16 components at a time.

Roofline per element, D = 64, 1.8 bits on average: reads 2 bytes and takes half a vector instruction
of 16 lanes: an estimate of 6 GB/s of bf16 on one 2.5 GHz core, not a measurement. Nibbles are a
64th of that work. Divisions and roundings are those of the reference, so nibbles have its bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import torch

from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.block_planes_numba import plan_of, stage_words, write_columns
from kvstrata.kernels.compiled import VECTORS, kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.token_masks import TOKENS
from kvstrata.kernels.value_bias import BORDERS, HIGHEST, LOWEST, STEPS, ValueBias
from kvstrata.kernels.vectors_numba import (
    LANES,
    load,
    multiply_add,
    splat,
    splat_at,
    store,
    subtract,
)

_GRAIN, _GRAIN_ROWS = 16, 256
_BORDERS, _STEPS = np.array(BORDERS, np.float32), np.array(STEPS, np.float32)
_LOWEST, _HIGHEST, _ZERO = np.float32(LOWEST), np.float32(HIGHEST), np.float32(0)


def mean_errors_numba(
    y: torch.Tensor,
    words: torch.Tensor,
    layout: PlaneLayout,
    weights: torch.Tensor,
    base: torch.Tensor,
) -> torch.Tensor:
    """Return what ``mean_errors_reference`` returns."""
    plan, (heads, blocks, _, dim) = plan_of(layout), y.shape
    sums = torch.empty((heads, blocks, dim), dtype=torch.float32)
    totals = torch.empty((heads, blocks), dtype=torch.float32)
    flat = as_numpy(y.contiguous()).reshape(-1)
    arrays = [table.contiguous().numpy() for table in (weights, base, words)]
    for_ranges(
        lambda a, b: _mean_errors(
            flat, *arrays, plan, np.zeros(2 * MAX_WIDTH * dim, np.int32),
            np.empty(TOKENS * LANES, np.float32), np.empty(TOKENS, np.float32),
            sums.numpy(), totals.numpy(), dim, a, b,
        ),
        heads * blocks,
        _GRAIN,
    )  # fmt: skip
    return sums / totals[..., None]


@kernel(**VECTORS)
def _mean_errors(
    y, weights, base, words, plan, halves, read, chosen, sums, totals, dim, first, last
):  # fmt: skip
    """Add up weights and weighted errors of the (head, block) pairs ``first`` to ``last``."""
    num_blocks = words.shape[0]
    for item in range(first, last):
        h, n = item // num_blocks, item % num_blocks
        whole = np.float32(0)
        for t in range(TOKENS):
            chosen[t] = weights[h, n, t] if (base[h, n] >> t) & 1 else np.float32(0)
            whole += chosen[t]
        totals[h, n] = whole
        stage_words(words[n], plan, halves, dim, h)
        start, target = item * TOKENS * dim, sums[h, n]
        for c in range(0, dim, LANES):
            planes = np.int64(plan.widths[h * dim + c])
            write_columns(halves, plan.steps, planes, h, c, dim, read, 0, LANES)
            total = splat(np.float32(0))
            for t in range(TOKENS):
                rest = subtract(load(y, start + t * dim + c), load(read, t * LANES))
                total = multiply_add(splat_at(chosen, t), rest, total)
            store(target, c, total)


def to_nibbles_numba(bias: torch.Tensor) -> ValueBias:
    """Return what ``to_nibbles_reference`` returns."""
    heads, blocks, dim = bias.shape
    nibbles = torch.empty((blocks, heads, dim // 2), dtype=torch.uint8)
    scales = torch.empty((blocks, heads), dtype=torch.uint8)
    arrays = [table.contiguous().view(-1).numpy() for table in (bias, nibbles, scales)]
    for_ranges(
        lambda a, b: _to_nibbles(*arrays, _BORDERS, _STEPS, heads, blocks, dim, a, b),
        heads * blocks,
        _GRAIN_ROWS,
    )
    return ValueBias(nibbles, scales)


def decode_value_bias_numba(bias: ValueBias) -> torch.Tensor:
    """Return what ``decode_value_bias_reference`` returns."""
    half = bias.nibbles.shape[2]
    out = torch.empty((*bias.scales.shape, 2 * half), dtype=torch.float32)
    arrays = [table.contiguous().view(-1).numpy() for table in (*bias, out)]
    for_ranges(lambda a, b: _decode(*arrays, _STEPS, half, a, b), bias.scales.numel(), _GRAIN_ROWS)
    return out


@kernel(error_model="numpy")
def _to_nibbles(bias, nibbles, scales, borders, steps, heads, blocks, dim, first, last):
    """Write nibbles and scales of the rows (block, head) ``first`` to ``last``."""
    half = dim // 2
    for row in range(first, last):
        at, to = (row % heads * blocks + row // heads) * dim, row * half
        peak, finite = _ZERO, True
        for c in range(at, at + dim):
            size = abs(bias[c])
            finite &= size < np.inf
            peak = size if size > peak else peak
        if not finite or peak == _ZERO:
            scales[row] = 0
            for c in range(half):
                nibbles[to + c] = 0x88
            continue
        share, low, high = peak / _HIGHEST, 0, borders.size
        while low < high:
            middle = (low + high) // 2
            if borders[middle] <= share:
                low = middle + 1
            else:
                high = middle
        scales[row] = low + 1
        step = steps[low + 1]
        for c in range(half):
            x, y = np.rint(bias[at + c] / step), np.rint(bias[at + half + c] / step)
            x, y = min(max(x, _LOWEST), _HIGHEST), min(max(y, _LOWEST), _HIGHEST)
            nibbles[to + c] = np.int32(x - _LOWEST) | np.int32(y - _LOWEST) << 4


@kernel(error_model="numpy")
def _decode(nibbles, scales, out, steps, half, first, last):
    for row in range(first, last):
        step, to = steps[scales[row]], 2 * row * half
        for c in range(half):
            byte = nibbles[row * half + c]
            out[to + c] = (np.float32(byte & 15) + _LOWEST) * step
            out[to + half + c] = (np.float32(byte >> 4) + _LOWEST) * step
