# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Encoding of nested blocks on CPU: one KV head of a block at a time, from tensors to bytes.

A head's numbers are widened to float32 once, in first- or second-level cache; keys are then seen
per channel, values transposed in units of 16 tokens, all 16 lanes at a time (``vectors_numba``,
``nested_cells_numba``). No fast-math: as in ``nested_decode_numba`` bytes are the same on every
machine, so every sum has the order of the reference.
"""

from functools import reduce
from operator import or_

import numpy as np
import torch

from kvstrata.kernels.compiled import called, kernel
from kvstrata.kernels.floats_numba import as_numpy, from_float, to_float
from kvstrata.kernels.lookups_numba import gather
from kvstrata.kernels.nested_cells_numba import (
    CHUNK,
    bits_of_floats,
    clamp_bytes,
    exceeds,
    fetch_ahead,
    square_root,
    store_bytes,
    store_cells,
    store_low_bytes,
    turn_high_1,
    turn_high_2,
    turn_high_4,
    turn_high_8,
    turn_high_16,
    turn_low_8,
    turn_low_16,
)
from kvstrata.kernels.nested_layout import TOKENS, UNIT, NestedLayout
from kvstrata.kernels.quantize import (
    KEY_TOP,
    LEVELS_PER_SIGMA,
    SCALE_BORDERS,
    SCALE_FACTORS,
    TINY,
)
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.vectors_numba import (
    LANES,
    absolute,
    add,
    add_ints,
    as_floats,
    both,
    choose,
    count_up,
    divide,
    larger,
    largest_lane,
    load,
    multiply,
    multiply_add,
    reaches,
    shift_left,
    smaller,
    splat,
    splat_at,
    splat_int,
    store,
    subtract,
    sum_lanes,
)
from kvstrata.kernels.word_vectors_numba import shift_right

_FACTORS = np.array(SCALE_FACTORS, np.float32)
_OCTAVE_BORDERS = np.array(SCALE_BORDERS[:16], np.float32)  # between 1 and 2; others repeat them
_SIGMA = np.float32(LEVELS_PER_SIGMA)
_TINY = np.float32(TINY)
_KEY_TOP = np.float32(KEY_TOP)
_HALF_END = np.float32(65520.0)  # the least that rounds to infinity in fp16
_ROUNDER = np.float32(2.0**23)  # added to a small number, leaves it rounded in the low bits
_FRACTION, _ONE_BITS = np.int32(0x7FFFFF), np.int32(0x3F800000)
# Bytes to shift by and to cut out: plain integers would make everything 64 bits wide.
_0, _1, _2, _3, _4, _6, _7 = (np.uint8(i) for i in (0, 1, 2, 3, 4, 6, 7))


def encode_blocks_numba(
    keys: torch.Tensor,
    values: torch.Tensor,
    num_sinks: int,
    layout: NestedLayout,
    base: torch.Tensor,
    mid: torch.Tensor,
) -> int:
    """Fill the records ``base`` and ``mid``, uint8 (N, L, bytes); return 0, or what is wrong.

    Bit 0: keys are not finite or beyond fp16; bit 1: values are.
    """
    layers, _, num_blocks, _, _ = keys.shape
    flat, strides = [], []
    for tensor in (keys, values):
        if tensor.stride()[-2:] != (tensor.shape[-1], 1):
            tensor = tensor.contiguous()
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat.append(as_numpy(tensor.as_strided((span,), (1,))))
        strides.append(tensor.stride()[:3])
    out, fine = base.numpy().reshape(-1), mid.numpy().reshape(-1)
    records = out, out.view(np.int16), base.shape[-1], fine
    faults = []

    def work(start: int, stop: int) -> None:
        span = start, stop, layers, num_blocks
        good = _encode_keys(flat[0], strides[0], *span, num_sinks, layout, *records)
        scaling = np.float32(layout.unit), np.float32(1 / layout.dim)
        fits = _encode_values(flat[1], strides[1], *span, layout, *scaling, *records)
        faults.append((0 if good else 1) | (0 if fits else 2))

    for_ranges(work, layers * num_blocks)
    return reduce(or_, faults, 0)


@called
def _widen(source, at, rows):
    """Write float32 from ``source[at]`` on to ``rows``, all but its last 16 numbers."""
    for j in range(0, rows.size - LANES, LANES):
        store(rows, j, load(source, at + j))
        fetch_ahead(source, at + j + rows.size - LANES)  # of the head's next block


@called
def _set_parameters(rows, first, halves, p, q, minimum, inverse):
    """Write fp16 minima and steps of channels, and what codes are computed from.

    ``rows`` are (64, D) and 16 numbers of padding, of which rows from ``first`` on count. Minima
    go to ``halves`` from ``p`` on, steps from ``q`` on. Lanes beyond the channels see those of the
    next row. Tells whether all numbers are finite, and the parameters fit fp16.
    """
    dim = (rows.size - LANES) // TOKENS
    zero = splat(np.float32(0))
    wrong, widest = zero, zero
    for d in range(0, dim, LANES):
        low, high = splat(np.float32(np.inf)), splat(np.float32(-np.inf))
        for j in range(first * dim + d, rows.size - LANES, dim):
            x = load(rows, j)
            low, high = smaller(x, low), larger(x, high)
            wrong = multiply_add(x, zero, wrong)  # NaN from what is not finite
        some = reaches(high, low)
        least = add(choose(some, low, zero), zero)  # which turns -0.0 into 0.0
        most = add(choose(some, high, zero), zero)
        store(halves, p + d, least)
        stored = load(halves, p + d)
        step = divide(subtract(most, stored), splat(_KEY_TOP))
        step = larger(step, splat(_TINY))
        store(halves, q + d, step)
        widest = larger(larger(absolute(least), step), widest)
        store(minimum, d, stored)
        store(inverse, d, divide(splat(np.float32(1)), load(halves, q + d)))
    return sum_lanes(wrong) == np.float32(0) and largest_lane(widest) < _HALF_END


@called
def _quantize_keys(rows, minimum, inverse, codes):
    dim = (rows.size - LANES) // TOKENS
    zero, top, rounder = splat(np.float32(0)), splat(_KEY_TOP), splat(_ROUNDER)
    for row in range(0, rows.size - LANES, dim):
        for d in range(0, dim, LANES):  # what goes beyond a row is written again
            scaled = subtract(load(rows, row + d), load(minimum, d))
            scaled = multiply(scaled, load(inverse, d))
            scaled = smaller(larger(scaled, zero), top)
            store_low_bytes(codes, row + d, add(scaled, rounder))


@called
def _pack_pairs(codes, shift, out):
    """Pack bits ``shift`` and above of each code, two of them: ``pack_planar`` of a whole block."""
    count = out.size
    c0, c1 = codes[:count], codes[count : 2 * count]
    c2, c3 = codes[2 * count : 3 * count], codes[3 * count :]
    for j in range(count):
        # Known to be below 8, the shift may be one of bytes.
        a, b = np.uint8(c0[j] >> (shift & _7)), np.uint8(c1[j] >> (shift & _7))
        c, d = np.uint8(c2[j] >> (shift & _7)), np.uint8(c3[j] >> (shift & _7))
        low = np.uint8(np.uint8(a & _3) | np.uint8(np.uint8(b & _3) << _2))
        high = np.uint8(np.uint8(np.uint8(c & _3) << _4) | np.uint8(d << _6))
        out[j] = np.uint8(low | high)


@called
def _pack_last_bits(codes, out):
    count = out.size
    for w in range(2):
        rest = codes[4 * w * count : 4 * (w + 1) * count]
        c0, c1 = rest[:count], rest[count : 2 * count]
        c2, c3 = rest[2 * count : 3 * count], rest[3 * count :]
        shift = np.uint8(4 * w)
        kept = _0 if w == 0 else np.uint8(15)
        for j in range(count):
            low = (c0[j] & _1) | ((c1[j] & _1) << _1)
            both = np.uint8(low | ((c2[j] & _1) << _2) | ((c3[j] & _1) << _3))
            out[j] = (out[j] & kept) | (both << shift)


@kernel(error_model="numpy")
def _encode_keys(
    keys,
    strides,
    start,
    stop,
    layers,
    num_blocks,
    num_sinks,
    layout,
    base,
    halves,
    base_stride,
    mid,
):
    """Encode keys of (layer, block) pairs ``start`` to ``stop``; tell whether all fit fp16.

    Per element itemsize bytes in, .63 out; per 16 elements about 20 instructions.
    """
    heads, dim = layout.heads, layout.dim
    count, block = UNIT * dim, TOKENS * dim
    rows, codes = np.zeros(block + LANES, np.float32), np.empty(block + LANES, np.uint8)
    minimum, inverse = np.empty(dim + LANES, np.float32), np.empty(dim + LANES, np.float32)
    found = np.empty(2 * (dim + LANES), np.int16)
    good = True
    for item in range(start, stop):
        i, n = item // num_blocks, item % num_blocks
        record = n * layers + i
        first = (record + 1) * base_stride - layout.base_bytes
        sinks = min(max(num_sinks - n * TOKENS, 0), TOKENS)
        for h in range(heads):
            _widen(keys, i * strides[0] + h * strides[1] + n * strides[2], rows)
            good &= _set_parameters(rows, sinks, found, 0, dim + LANES, minimum, inverse)
            p = first // 2 + h * dim
            q = p + heads * dim
            for d in range(dim):
                halves[p + d], halves[q + d] = found[d], found[dim + LANES + d]
            _quantize_keys(rows, minimum, inverse, codes)
            k, m = first + layout.keys + h * count, record * layout.mid_bytes + h * count
            _pack_pairs(codes[:block], _3, base[k : k + count])
            _pack_pairs(codes[:block], _1, mid[m : m + count])
            q = record * layout.mid_bytes + layout.mid_bits + h * (count // 2)
            _pack_last_bits(codes[:block], mid[q : q + count // 2])
    return good


@called
def _turn_unit(rows, start, size, unit, turned, squares):
    """Write one unit's values turned, (size, 16 x groups), and each token's sum of squares.

    The sums are of ``groups`` neighbours each, in the first row of ``squares``.
    """
    row = (rows.size - LANES) // (4 * size)
    scale = splat(unit)
    left = min(size, LANES)
    for q in range(0, row, LANES):
        for s in range(0, size, LANES):
            at = start + q * size + s
            if size == 8:
                turn_low_8(rows, at, size, turned, s * row + q, row)
            else:
                turn_low_16(rows, at, size, turned, s * row + q, row)
        for s in range(left):
            at = s * row + q
            if size <= LANES:
                turn_high_1(turned, at, row, scale, squares, at)
            elif size == 2 * LANES:
                turn_high_2(turned, at, LANES * row, scale, squares, at)
            elif size == 4 * LANES:
                turn_high_4(turned, at, LANES * row, scale, squares, at)
            elif size == 8 * LANES:
                turn_high_8(turned, at, LANES * row, scale, squares, at)
            else:
                turn_high_16(turned, at, LANES * row, scale, squares, at)
        while left > 1:
            left //= 2
            for s in range(left):
                low, high = load(squares, s * row + q), load(squares, (left + s) * row + q)
                store(squares, s * row + q, add(low, high))
        left = min(size, LANES)


@called
def _encode_scales(sums, share, codes, at):
    """Turn sums of squares into factors for coding; return the peak and whether it fits fp16."""
    largest, wrong = splat(_TINY), splat(np.float32(0))
    for t in range(0, TOKENS, LANES):
        scale = square_root(multiply(load(sums, t), splat(share)))
        wrong = multiply_add(scale, splat(np.float32(0)), wrong)
        scale = larger(scale, splat(_TINY))
        largest = larger(scale, largest)
        store(sums, t, scale)
    most = largest_lane(largest)
    half = from_float(most, np.int16(0))
    peak = splat(to_float(half))
    for t in range(0, TOKENS, LANES):
        bits = bits_of_floats(divide(peak, load(sums, t)))
        fraction = as_floats(add_ints(both(bits, splat_int(_FRACTION)), splat_int(_ONE_BITS)))
        octave = add_ints(shift_right(bits, np.int32(23)), splat_int(np.int32(-127)))
        code = shift_left(octave, np.int32(4))
        for i in range(16):
            code = count_up(code, exceeds(fraction, splat_at(_OCTAVE_BORDERS, i)))
        code = clamp_bytes(code)
        store_bytes(codes, at + t, code)
        scale = multiply(peak, gather(_FACTORS, code))
        store(sums, t, divide(splat(_SIGMA), scale))
    return half, sum_lanes(wrong) == np.float32(0) and most < _HALF_END


@kernel(error_model="numpy")
def _encode_values(
    values,
    strides,
    start,
    stop,
    layers,
    num_blocks,
    layout,
    unit,
    share,
    base,
    halves,
    base_stride,
    mid,
):
    """Encode values of (layer, block) pairs ``start`` to ``stop``; tell whether all fit fp16.

    Per element itemsize bytes in, .5 out; per 16 elements about 35 instructions.
    """
    heads, dim = layout.heads, layout.dim
    count, block, size = UNIT * dim, TOKENS * dim, dim & -dim
    groups = dim // size
    row = UNIT * groups
    rows, codes = np.zeros(block + LANES, np.float32), np.empty(block, np.uint8)
    turned = np.empty(block, np.float32)
    squares = np.empty(LANES * row, np.float32)
    sums, tile = np.empty(TOKENS, np.float32), np.empty(4 * row, np.float32)
    good = True
    for item in range(start, stop):
        i, n = item // num_blocks, item % num_blocks
        record = n * layers + i
        first = (record + 1) * base_stride - layout.base_bytes
        for h in range(heads):
            _widen(values, i * strides[0] + h * strides[1] + n * strides[2], rows)
            for u in range(4):
                mine = turned[u * count : (u + 1) * count]
                _turn_unit(rows, u * count, size, unit, mine, squares)
                for r in range(UNIT):
                    total = squares[r * groups]
                    for g in range(1, groups):
                        total += squares[r * groups + g]
                    sums[u * UNIT + r] = total
            half, fits = _encode_scales(sums, share, base, first + layout.scales + h * TOKENS)
            halves[first // 2 + 2 * heads * dim + h] = half
            good &= fits
            for u in range(4):
                for r in range(UNIT):
                    for g in range(groups):
                        tile[r * groups + g] = sums[u * UNIT + r]
                for q in range(row, 4 * row, LANES):
                    store(tile, q, load(tile, q - row))
                for begin in range(0, count, 4 * row):
                    for p in range(0, 4 * row, CHUNK):
                        j = u * count + begin + p
                        store_cells(turned, j, tile, p, codes, j)
            v, m = first + layout.values + h * count, layout.mid_values + h * count
            m += record * layout.mid_bytes
            _pack_pairs(codes, _2, base[v : v + count])
            _pack_pairs(codes, _0, mid[m : m + count])
    return good
