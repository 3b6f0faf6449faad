"""Rows of mid tokens on a CPU: 16 components at a time, codes by a table in cache.

Roofline per element of a mid token: reads 2 bytes and takes a sixteenth of a gather, a nanosecond
or two of one core; other tokens cost nothing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import torch

from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.compiled import VECTORS, inlined, kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.lookups_numba import gather_bytes
from kvstrata.kernels.plane_plans_numba import plan_of
from kvstrata.kernels.sign_codes import GRID_PER_UNIT, GRID_SIZE, MAX_WIDTH, code_table
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.token_masks import TOKENS
from kvstrata.kernels.vectors_numba import (
    LANES,
    add_ints,
    floor,
    has_bits,
    larger,
    load,
    load_ints,
    multiply_add,
    smaller,
    splat,
    splat_int,
    to_ints,
    word_of,
)
from kvstrata.kernels.word_vectors_numba import lowest_bit, prefetch

_GRAIN = 64
_MIDDLE, _SCALE = np.float32(GRID_SIZE // 2), np.float32(GRID_PER_UNIT)
_CODES = np.concatenate(
    [code_table(w).numpy() for w in range(MAX_WIDTH + 1)] + [np.zeros(4, np.uint8)]
)


def pack_mid_rows_numba(
    y: torch.Tensor, masks: torch.Tensor, layout: PlaneLayout, starts: torch.Tensor
) -> torch.Tensor:
    """Return what ``pack_mid_rows_reference`` returns."""
    plan = plan_of(layout)
    rows = torch.empty(int(starts[-1]), dtype=torch.uint8)
    arguments = as_numpy(y.contiguous()).reshape(-1), masks.contiguous().numpy(), plan.counts
    for_ranges(
        lambda a, b: _pack_rows(
            *arguments, plan.grids, _CODES, starts.numpy(), rows.numpy(), layout.dim, a, b
        ),
        masks.numel(),
        _GRAIN,
    )
    return rows


@inlined
def _prefetch_rows(y, masks, item, dim):
    """Ask for the tokens that are packed next, which lie too far apart for a processor to guess."""
    num_heads, num_blocks = masks.shape
    n, h = item // num_heads, item % num_heads
    left, start = np.uint64(masks[h, n]), (h * num_blocks + n) * TOKENS * dim
    while left != 0:
        at = start + lowest_bit(left) * dim
        left &= left - np.uint64(1)
        for c in range(0, dim, 2 * LANES):
            prefetch(y, at + c)


@kernel(**VECTORS)
def _pack_rows(y, masks, counts, grids, codes, starts, rows, dim, first, last):
    """Pack the rows of the (block, head) pairs ``first`` to ``last``, blocks ascending."""
    num_heads, num_blocks = masks.shape
    middle, scale = splat(_MIDDLE), splat(_SCALE)
    zero, top = splat(np.float32(0)), splat(np.float32(GRID_SIZE - 1))
    for item in range(first, last):
        n, h = item // num_heads, item % num_heads
        at, count = starts[item], counts[h]
        if item + 1 < last:
            _prefetch_rows(y, masks, item + 1, dim)
        for t in range(TOKENS):
            if not (masks[h, n] >> t) & 1:
                continue
            start = ((h * num_blocks + n) * TOKENS + t) * dim
            for c in range(0, count, LANES):
                cell = floor(multiply_add(load(y, start + c), scale, middle))
                index = to_ints(smaller(larger(cell, zero), top))
                code = gather_bytes(codes, add_ints(index, load_ints(grids, h * dim + c)))
                high = word_of(has_bits(code, splat_int(np.int32(2))))
                low = word_of(has_bits(code, splat_int(np.int32(1))))
                byte = at + c // 8
                rows[byte], rows[byte + count // 8] = np.uint8(high), np.uint8(low)
                if c + 8 < count:
                    rows[byte + 1] = np.uint8(high >> np.uint64(8))
                    rows[byte + 1 + count // 8] = np.uint8(low >> np.uint64(8))
            at += count // 4
