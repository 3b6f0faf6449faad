"""Biases of values on a CPU: weighted sums of components less those of their base values.

Roofline per element, D = 64, 1.8 bits on average: reads 2 bytes and takes a quarter of a vector
instruction of 16 lanes for the components, a tenth for the words. Nibbles are a 64th of that work.
Divisions and roundings are those of the reference, so nibbles have its bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import torch

from kvstrata.kernels.attend_tables_numba import SIGNS, add_values, fill_tables
from kvstrata.kernels.attend_tokens_numba import stage_words
from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.compiled import VECTORS, kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.plane_plans_numba import plan_of
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.token_masks import TOKENS
from kvstrata.kernels.value_bias import BORDERS, HIGHEST, LOWEST, STEPS, ValueBias
from kvstrata.kernels.vectors_numba import (
    LANES,
    add,
    choose,
    load,
    multiply,
    multiply_add,
    splat,
    splat_at,
    store,
    subtract,
    sum_lanes,
)
from kvstrata.kernels.word_vectors_numba import lanes_of

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
    room = -(-int(layout.words_per_head.max()) // LANES) * LANES + LANES
    for_ranges(
        lambda a, b: _mean_errors(
            flat, *arrays, plan, np.zeros(room, np.int64), np.zeros(2 * room, np.int32), SIGNS,
            np.empty(TOKENS * LANES // 4, np.float32), np.empty(TOKENS, np.float32),
            np.zeros(room, np.float32), sums.numpy(), totals.numpy(), dim, a, b,
        ),
        heads * blocks,
        _GRAIN,
    )  # fmt: skip
    return sums / totals[..., None]


@kernel(**VECTORS)
def _mean_errors(
    y, weights, base, words, plan, own, halves, signs, tables, chosen, counted, sums, totals, dim,
    first, last,
):  # fmt: skip
    """Add up weights and weighted errors of the (head, block) pairs ``first`` to ``last``.

    A word's weights, those of its set bits less those of the others, are looked up four at a time.
    """
    num_blocks = words.shape[0]
    zero = splat(_ZERO)
    for item in range(first, last):
        h, n = item // num_blocks, item % num_blocks
        whole, mask, own_weights = zero, np.uint64(base[h, n]), weights[h, n]
        for t in range(0, TOKENS, LANES):
            weight = choose(lanes_of(mask, t), load(own_weights, t), zero)
            store(chosen, t, weight)
            whole = add(whole, weight)
        totals[h, n] = sum_lanes(whole)
        count = 0
        for plane in range(MAX_WIDTH):
            count += plan.sizes[h * MAX_WIDTH + plane]
        stage_words(words[n], plan.offsets[h * MAX_WIDTH], count, own, halves)
        for i in range(0, count, LANES):
            store(counted, i, zero)
        fill_tables(chosen, TOKENS, 1, signs, tables)
        add_values(1, halves, count, tables, signs[0], counted)
        start, target = item * TOKENS * dim, sums[h, n]
        for c in range(0, dim, LANES):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for t in range(0, TOKENS, 4):
                at = start + t * dim + c
                s0 = multiply_add(splat_at(chosen, t), load(y, at), s0)
                s1 = multiply_add(splat_at(chosen, t + 1), load(y, at + dim), s1)
                s2 = multiply_add(splat_at(chosen, t + 2), load(y, at + 2 * dim), s2)
                s3 = multiply_add(splat_at(chosen, t + 3), load(y, at + 3 * dim), s3)
            total = add(add(s0, s1), add(s2, s3))
            for plane in range(np.int64(plan.widths[h * dim + c])):
                place = h * MAX_WIDTH + plane
                at = plan.offsets[place] - plan.offsets[h * MAX_WIDTH] + c
                step = load(plan.steps, place * dim + c)
                total = subtract(total, multiply(step, load(counted, at)))
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
