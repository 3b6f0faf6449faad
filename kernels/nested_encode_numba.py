# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Encoding of nested blocks on CPU: one pass per KV head of a block, from tensors to bytes.

As ``nested_decode_numba``; the steps of the Hadamard transform go the other way, from
(token, channel) to (channel, token).
"""

from functools import reduce
from operator import or_

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.floats_numba import as_numpy, bits_of, float_of, from_float, to_float
from kvstrata.kernels.nested_layout import TOKENS, UNIT, NestedLayout
from kvstrata.kernels.quantize import (
    KEY_TOP,
    LEVELS_PER_SIGMA,
    SCALE_BORDERS,
    SCALE_FACTORS,
    THRESHOLDS,
    TINY,
)
from kvstrata.kernels.threads import for_ranges

_ROWS = 4
_FACTORS = np.array(SCALE_FACTORS, np.float32)
_OCTAVE_BORDERS = np.array(SCALE_BORDERS[:16], np.float32)  # between 1 and 2; others repeat them
_T0, _T1, _T2, _T3, _T4, _T5, _T6 = (np.float32(border) for border in THRESHOLDS)
_SIGMA = np.float32(LEVELS_PER_SIGMA)
_TINY = np.float32(TINY)
_KEY_TOP = np.float32(KEY_TOP)
_HALF_END = np.float32(65520.0)  # the least that rounds to infinity in fp16
_ROUNDER = np.float32(2.0**23)  # added to a small number, leaves it rounded in the low bits
# Bytes to shift by and to cut out: plain integers would make everything 64 bits wide.
_0, _1, _2, _3, _4, _6, _7 = (np.uint8(i) for i in (0, 1, 2, 3, 4, 6, 7))
_ZERO = np.int32(0)

_jit = kernel(error_model="numpy")


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
        span = start, stop, layers
        good = _encode_keys(flat[0], strides[0], *span, num_sinks, layout, *records)
        scaling = np.float32(layout.unit), np.float32(1 / layout.dim)
        fits = _encode_values(flat[1], strides[1], *span, layout, *scaling, *records)
        faults.append((0 if good else 1) | (0 if fits else 2))

    for_ranges(work, layers * num_blocks)
    return reduce(or_, faults, 0)


@_jit
def _widen(source, target):
    for j in range(source.size):
        target[j] = to_float(source[j])


@_jit
def _find_range(rows, low, high):
    """Write each channel's lowest and highest number, for several rows apart.

    Returns 0, or NaN if a value is not finite.
    """
    for d in range(low.size):
        low[d], high[d] = np.float32(np.inf), np.float32(-np.inf)
    run = min(low.size, rows.size)
    for begin in range(0, rows.size, max(run, 1)):
        first = min(begin, rows.size - run)  # the last run may repeat some rows
        row = rows[first : first + run]
        for d in range(run):
            value = row[d]
            low[d] = value if value < low[d] else low[d]
            high[d] = value if value > high[d] else high[d]
    worst = np.int32(0)
    for j in range(rows.size):
        bits = np.int32(bits_of(rows[j]) & np.int32(0x7FFFFFFF))
        worst = bits if bits > worst else worst
    return float_of(worst) * np.float32(0)


@_jit
def _quantize_keys(rows, minimum, inverse, codes):
    run = minimum.size
    for first in range(0, rows.size, run):
        source, target = rows[first : first + run], codes[first : first + run]
        for j in range(run):
            scaled = (source[j] - minimum[j]) * inverse[j]
            scaled = min(max(scaled, np.float32(0)), _KEY_TOP)
            target[j] = np.uint8(np.int32(bits_of(scaled + _ROUNDER) & np.int32(KEY_TOP)))


@_jit
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


@_jit
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


@_jit
def _set_parameters(low, high, minima, steps, minimum, inverse):
    """Write fp16 parameters and what codes are computed from; tell whether they fit fp16."""
    dim = minima.size
    good = True
    for d in range(dim):
        least, most = low[d], high[d]
        for row in range(1, _ROWS):
            least, most = min(least, low[row * dim + d]), max(most, high[row * dim + d])
        empty = least > most
        least = np.float32(0) if empty else least + np.float32(0)  # which turns -0.0 into 0.0
        most = np.float32(0) if empty else most + np.float32(0)
        half = from_float(least, minima[d])
        step = (most - to_float(half)) / _KEY_TOP
        step = step if step > _TINY else _TINY
        if not (abs(least) < _HALF_END and step < _HALF_END):
            good = False
        minima[d], steps[d] = half, from_float(step, steps[d])
        minimum[d] = to_float(half)
        inverse[d] = np.float32(1) / to_float(steps[d])
    for first in range(dim, minimum.size, dim):
        for d in range(dim):
            minimum[first + d] = minimum[d]
            inverse[first + d] = inverse[d]
    return good


@_jit
def _encode_keys(
    keys, strides, start, stop, layers, num_sinks, layout, base, halves, base_stride, mid
):
    """Encode keys of (block, layer) pairs ``start`` to ``stop``; tell whether all fit fp16.

    Per element itemsize bytes in, .63 out, 20 operations on float32 and 10 on bytes.
    """
    heads, dim = layout.heads, layout.dim
    count, block = UNIT * dim, TOKENS * dim
    rows, codes = np.empty(block, np.float32), np.empty(block, np.uint8)
    low, high = np.empty(_ROWS * dim, np.float32), np.empty(_ROWS * dim, np.float32)
    minimum, inverse = np.empty(_ROWS * dim, np.float32), np.empty(_ROWS * dim, np.float32)
    good = True
    for item in range(start, stop):
        n, i = item // layers, item % layers
        first = (item + 1) * base_stride - layout.base_bytes
        sinks = min(max(num_sinks - n * TOKENS, 0), TOKENS)
        for h in range(heads):
            at = i * strides[0] + h * strides[1] + n * strides[2]
            _widen(keys[at : at + block], rows)
            if _find_range(rows[sinks * dim :], low, high) != np.float32(0):
                good = False
            p = first // 2 + h * dim
            q = p + heads * dim
            minima, steps = halves[p : p + dim], halves[q : q + dim]
            good &= _set_parameters(low, high, minima, steps, minimum, inverse)
            _quantize_keys(rows, minimum, inverse, codes)
            k, m = first + layout.keys + h * count, item * layout.mid_bytes + h * count
            _pack_pairs(codes, _3, base[k : k + count])
            _pack_pairs(codes, _1, mid[m : m + count])
            q = item * layout.mid_bytes + layout.mid_bits + h * (count // 2)
            _pack_last_bits(codes, mid[q : q + count // 2])
    return good


@_jit
def _gather(source, target):
    """Take one step of the transform back: the lowest index bit becomes the highest."""
    half = source.size // 2
    low, high = target[:half], target[half:]
    for j in range(half):
        low[j] = source[2 * j] + source[2 * j + 1]
        high[j] = source[2 * j] - source[2 * j + 1]


@_jit
def _turn_rows(rows, turned, other, unit):
    """Write the transform of ``rows`` (64 x D) by units, each (size, 16, groups), to ``turned``."""
    dim = rows.size // TOKENS
    count, size = UNIT * dim, dim & -dim
    for u in range(4):
        kept = turned[u * count : (u + 1) * count]
        source, target, spare = rows[u * count : (u + 1) * count], kept, other[:count]
        left, steps = size, 0
        while left > 1:
            _gather(source, target)
            source, target, spare = target, spare, target
            left, steps = left // 2, steps + 1
        if steps % 2:
            for j in range(count):
                kept[j] *= unit
        else:
            for j in range(count):
                kept[j] = other[j] * unit


@_jit
def _sum_squares(turned, other, sums):
    """Write each token's sum of squares, in the order of the reference."""
    count = turned.size // 4
    groups = count // UNIT
    groups //= groups & -groups
    for u in range(4):
        source, squares = turned[u * count : (u + 1) * count], other[:count]
        for j in range(count):
            squares[j] = source[j] * source[j]
        left = count
        while left > UNIT * groups:
            left //= 2
            low, high = squares[:left], squares[left : 2 * left]
            for j in range(left):
                low[j] += high[j]
        for r in range(UNIT):
            total = squares[r * groups]
            for g in range(1, groups):
                total += squares[r * groups + g]
            sums[u * UNIT + r] = total


@_jit
def _encode_scales(sums, share, codes):
    """Turn sums of squares into factors for coding; return the peak and whether it fits fp16."""
    largest, good = _TINY, True
    for t in range(TOKENS):
        scale = np.sqrt(sums[t] * share)
        good &= scale < _HALF_END  # false where it is NaN
        scale = scale if scale > _TINY else _TINY
        largest = scale if scale > largest else largest
        sums[t] = scale
    half = from_float(largest, np.int16(0))
    peak = to_float(half)
    for t in range(TOKENS):
        bits = bits_of(peak / sums[t])
        fraction = float_of((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000))
        code = ((bits >> 23) - 127) * 16
        for i in range(16):
            code += fraction > _OCTAVE_BORDERS[i]
        code = min(max(code, 0), 255)
        codes[t] = code
        sums[t] = _SIGMA / (peak * _FACTORS[code])
    return half, good


@_jit
def _quantize_values(turned, factors, codes):
    """Write 4-bit codes: the sign, then how many borders the absolute value exceeds."""
    run = factors.size
    for first in range(0, turned.size, run):
        source, target = turned[first : first + run], codes[first : first + run]
        for j in range(run):
            scaled = source[j] * factors[j]
            size = abs(scaled)
            outer = size > _T3
            upper = size > (_T5 if outer else _T1)
            low, high = (_T2 if upper else _T0), (_T6 if upper else _T4)
            odd = size > (high if outer else low)
            cell = np.int32((np.int32(4) if outer else _ZERO) | (np.int32(2) if upper else _ZERO))
            cell = np.int32(cell | (np.int32(1) if odd else _ZERO))
            cell = np.int32(cell | (np.int32(8) if scaled < np.float32(0) else _ZERO))
            target[j] = np.uint8(cell)


@_jit
def _encode_values(
    values, strides, start, stop, layers, layout, unit, share, base, halves, base_stride, mid
):
    """Encode values of (block, layer) pairs ``start`` to ``stop``; tell whether all fit fp16.

    Per element itemsize bytes in, .5 out, 35 operations on float32 and 8 on bytes.
    """
    heads, dim = layout.heads, layout.dim
    count, block, size = UNIT * dim, TOKENS * dim, dim & -dim
    groups = dim // size
    rows, turned = np.empty(block, np.float32), np.empty(block, np.float32)
    other, codes = np.empty(count, np.float32), np.empty(block, np.uint8)
    sums, tile = np.empty(TOKENS, np.float32), np.empty(8 * UNIT * groups, np.float32)
    good = True
    for item in range(start, stop):
        n, i = item // layers, item % layers
        first = (item + 1) * base_stride - layout.base_bytes
        for h in range(heads):
            at = i * strides[0] + h * strides[1] + n * strides[2]
            _widen(values[at : at + block], rows)
            _turn_rows(rows, turned, other, unit)
            _sum_squares(turned, other, sums)
            s = first + layout.scales + h * TOKENS
            half, fits = _encode_scales(sums, share, base[s : s + TOKENS])
            halves[first // 2 + 2 * heads * dim + h] = half
            good &= fits
            for u in range(4):
                for j in range(tile.size):
                    tile[j] = sums[u * UNIT + j // groups % UNIT]
                u0, u1 = u * count, (u + 1) * count
                _quantize_values(turned[u0:u1], tile, codes[u0:u1])
            v, m = first + layout.values + h * count, layout.mid_values + h * count
            m += item * layout.mid_bytes
            _pack_pairs(codes, _2, base[v : v + count])
            _pack_pairs(codes, _0, mid[m : m + count])
    return good
