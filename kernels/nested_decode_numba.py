# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decoding of nested blocks on CPU: from packed bytes to tensors, one KV head of a block at a time.

Everything between lies in a few KiB of first-level cache. Codes are unpacked 64 bytes at a time;
values are turned as int16, the high steps of the Hadamard transform while they are unpacked and
the others in registers (``nested_tiles_numba``). No fast-math: every operation is one that IEEE 754
rounds in one way, in the order of the reference, so bytes are the same on every machine.

Roofline of bf16: a key takes .63 bytes in and 2 out, a value .5 and 2. Written past the caches they
need a third of a copy's time, so the limit is instructions: per 32 elements about 13 of 64 bytes
for keys and 25 for values. A unit of 16 tokens is put together in first-level cache, since memory
takes whole runs twice as fast as the pieces of them that a tile gives.
"""

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch

from kvstrata.kernels.compiled import called, kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.lookups_numba import gather
from kvstrata.kernels.nested_layout import TOKENS, UNIT, NestedLayout, Rows
from kvstrata.kernels.nested_tiles_numba import (
    CHUNK,
    MAX_TILE,
    bytes_at,
    load_fp16,
    move,
    move_streamed,
    splat_fp16,
    step_codes,
    step_codes_streamed,
    turn_8,
    turn_16,
    turn_32,
    unpack_1,
    unpack_2,
    unpack_4,
    unpack_8,
    wait_for_stores,
)
from kvstrata.kernels.quantize import BASE_LEVELS, BASE_TOP, LEVELS, SCALE_FACTORS
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.vectors_numba import (
    LANES,
    load,
    load_ints,
    multiply,
    multiply_add,
    splat,
    store,
)

# Results of at least so many bytes are written past the caches, which they would fill.
STREAMED_BYTES = 1 << 24
_ALIGNMENT = 128
_FACTORS = np.array(SCALE_FACTORS, np.float32)
_BASE_CENTRE = np.float32(BASE_TOP / 2)
_FINE = np.array([*LEVELS, *(-level for level in LEVELS)], np.int8)
# By the codes of BASE alone, the lower two bits zero.
_COARSE = np.repeat(np.array([*BASE_LEVELS, *(-level for level in BASE_LEVELS)], np.int8), 4)


def decode_blocks_numba(
    base: Sequence[Rows],
    mid: Sequence[Rows] | None,
    layout: NestedLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write ``keys`` and ``values``, (L, H, N, T, D) contiguous; see ``decode_blocks``."""
    layers, _, num_blocks = keys.shape[:3]
    # No MID record reads like one of zeros.
    nothing = np.broadcast_to(np.zeros(layout.mid_bytes, np.uint8), (layers, layout.mid_bytes))
    fine = _places([nothing] * num_blocks if mid is None else mid)
    where = _places(base), fine, mid is not None, layout, layers
    out_keys, out_values = as_numpy(keys).reshape(-1), as_numpy(values).reshape(-1)
    streamed = keys.nbytes + values.nbytes >= STREAMED_BYTES and not any(
        tensor.data_ptr() % _ALIGNMENT for tensor in (keys, values)
    )
    norm = np.float32(layout.norm)

    def work(start: int, stop: int) -> None:
        _decode_keys(*where, out_keys, streamed, start, stop)
        _decode_values(*where, norm, out_values, streamed, start, stop)

    for_ranges(work, layers * num_blocks)


def _places(rows: Sequence[Rows]) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
    """Return each block's address and the distance of its rows, int64 (N, 2)."""
    found = [(block.__array_interface__["data"][0], block.strides[0]) for block in rows]
    return np.array(found, np.int64).reshape(-1, 2)


@kernel(error_model="numpy")
def _decode_keys(base, mid, is_fine, layout, layers, out, streamed, start, stop):
    """Decode the keys of (block, layer) pairs ``start`` to ``stop``, layer by layer."""
    dim, num_blocks = layout.dim, base.shape[0]
    period = dim * (CHUNK // gcd(dim, CHUNK)) + LANES
    minimum, step = np.empty(period, np.float32), np.empty(period, np.float32)
    for item in range(start, stop):
        i, n = item // num_blocks, item % num_blocks
        coarse = bytes_at(base[n, 0] + i * base[n, 1], layout.base_bytes)
        fine = bytes_at(mid[n, 0] + i * mid[n, 1], layout.mid_bytes)
        for h in range(layout.heads):
            at = ((i * layout.heads + h) * num_blocks + n) * TOKENS * dim
            _head_keys(coarse, fine, is_fine, layout, h, minimum, step, out, at, streamed)
    if streamed:
        wait_for_stores()


@kernel(error_model="numpy")
def _decode_values(base, mid, is_fine, layout, layers, norm, out, streamed, start, stop):
    """Decode the values of (block, layer) pairs ``start`` to ``stop``, layer by layer."""
    dim, num_blocks = layout.dim, base.shape[0]
    groups = dim // (dim & -dim)
    units, factors = np.empty(TOKENS * dim, np.int16), np.empty(TOKENS * groups, np.float32)
    unit = np.empty(UNIT * dim, out.dtype)
    for item in range(start, stop):
        i, n = item // num_blocks, item % num_blocks
        coarse = bytes_at(base[n, 0] + i * base[n, 1], layout.base_bytes)
        fine = bytes_at(mid[n, 0] + i * mid[n, 1], layout.mid_bytes)
        for h in range(layout.heads):
            at = ((i * layout.heads + h) * num_blocks + n) * TOKENS * dim
            place = units, factors, unit, out, at, streamed
            _head_values(coarse, fine, is_fine, layout, h, norm, *place)
    if streamed:
        wait_for_stores()


@called
def _head_keys(base, mid, is_fine, layout, head, minimum, step, out, at, streamed):
    """Decode the keys of one head, (64, D) from ``out[at]`` on."""
    heads, dim = layout.heads, layout.dim
    count, period = UNIT * dim, minimum.size - LANES
    for d in range(0, dim, LANES):  # what a last vector writes beyond is written again
        least = load_fp16(base, 2 * (head * dim + d))
        size = load_fp16(base, 2 * ((heads + head) * dim + d))
        if not is_fine:
            least = multiply_add(size, splat(_BASE_CENTRE), least)
        store(minimum, d, least)
        store(step, d, size)
    for copy in range(dim, period, dim):
        for d in range(0, dim, LANES):
            store(minimum, copy + d, load(minimum, d))
            store(step, copy + d, load(step, d))
    b, m = layout.keys + head * count, head * count
    c = layout.mid_bits + head * (count // 2)
    for w in range(2):
        for first in range(0, count // 2, period):
            for p in range(0, period, CHUNK):
                j = first + p
                k = w * (count // 2) + j
                if streamed:
                    step_codes_streamed(
                        base, b + k, mid, m + k, mid, c + j, w, minimum, step, p, out, at + k, count
                    )
                else:
                    step_codes(
                        base, b + k, mid, m + k, mid, c + j, w, minimum, step, p, out, at + k, count
                    )


@called
def _head_values(base, mid, is_fine, layout, head, norm, units, factors, unit, out, at, streamed):
    """Decode the values of one head, (64, D) from ``out[at]`` on."""
    heads, dim = layout.heads, layout.dim
    count, size = UNIT * dim, dim & -dim
    groups = dim // size
    peak = splat_fp16(base, 2 * (2 * heads * dim + head))
    for t in range(0, TOKENS, LANES):
        share = gather(_FACTORS, load_ints(base, layout.scales + head * TOKENS + t))
        store(factors, t, multiply(multiply(peak, share), splat(norm)))
    for t in range(TOKENS - 1, -1, -1):
        for g in range(groups - 1, -1 if groups > 1 else 0, -1):
            factors[t * groups + g] = factors[t]
    tile = min(size, MAX_TILE)
    apart, row = tile * UNIT * groups, UNIT * groups
    b, m = layout.values + head * count, layout.mid_values + head * count
    levels = _FINE if is_fine else _COARSE
    for j in range(0, apart, CHUNK):
        if size <= MAX_TILE:
            unpack_1(base, b + j, mid, m + j, apart, levels, units, j, count)
        elif size == 2 * MAX_TILE:
            unpack_2(base, b + j, mid, m + j, apart, levels, units, j, count)
        elif size == 4 * MAX_TILE:
            unpack_4(base, b + j, mid, m + j, apart, levels, units, j, count)
        else:
            unpack_8(base, b + j, mid, m + j, apart, levels, units, j, count)
    for u in range(4):
        for q in range(0, row, UNIT):
            for first in range(0, size, tile):
                source, f, to = u * count + first * row + q, u * row + q, q * size + first
                if size == 8:
                    turn_8(units, source, row, factors, f, unit, to, size)
                elif size == 16:
                    turn_16(units, source, row, factors, f, unit, to, size)
                else:
                    turn_32(units, source, row, factors, f, unit, to, size)
        for j in range(0, count, CHUNK // 2):
            if streamed:
                move_streamed(unit, j, out, at + u * count + j)
            else:
                move(unit, j, out, at + u * count + j)
