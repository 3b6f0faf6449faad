# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decoding of nested blocks on CPU: one pass per KV head of a block, from bytes to tensors.

Every inner loop runs over contiguous memory without branches, so that LLVM turns it into vector
code; rows are taken several at a time (``_ROWS``) because a loop's entry costs as much as 50
elements. No fast-math: every operation is one that IEEE 754 rounds in one way, in the order of the
reference, so bytes are the same on every machine.

The Hadamard transform takes constant-geometry steps (Pease, J. ACM 15(2), 1968): decoding reads
elements j and j + n/2 and writes their sum and difference to 2j and 2j + 1, for the 16 tokens of a
unit at once. Each step moves the highest index bit to the lowest place, so all steps together turn
(channel, token) into (token, channel): the transform is its own transposition.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.floats_numba import as_numpy, from_float, to_float
from kvstrata.kernels.nested_layout import TOKENS, UNIT, NestedLayout, Rows
from kvstrata.kernels.quantize import (
    BASE_LEVELS,
    BASE_TOP,
    LEVELS,
    SCALE_FACTORS,
)
from kvstrata.kernels.threads import for_ranges

_ROWS = 4
_FACTORS = np.array(SCALE_FACTORS, np.float32)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (np.int16(level) for level in LEVELS)
_B0, _B1 = (np.int16(level) for level in BASE_LEVELS)
_BASE_CENTRE, _BASE_STEP = np.float32(BASE_TOP / 2), np.float32(BASE_TOP + 1)
# Bytes to shift by and to cut out: plain integers would make everything 64 bits wide.
_0, _1, _2, _3, _4, _5, _6 = (np.uint8(i) for i in (0, 1, 2, 3, 4, 5, 6))
_24 = np.uint8(24)

_jit = kernel(error_model="numpy")


def decode_blocks_numba(
    base: Sequence[Rows],
    mid: Sequence[Rows] | None,
    layout: NestedLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write ``keys`` and ``values``, (L, H, N, T, D) contiguous; see ``decode_blocks``."""
    layers, _, num_blocks, _, _ = keys.shape
    out_keys, out_values = as_numpy(keys).reshape(-1), as_numpy(values).reshape(-1)
    block = TOKENS * layout.dim
    strides = layout.heads * num_blocks * block, num_blocks * block
    norm = np.float32(layout.norm)

    def work(start: int, stop: int) -> None:
        for n in range(start // layers, -(-stop // layers)):
            first, last = max(start - n * layers, 0), min(stop - n * layers, layers)
            fixed, stride = _flat(base[n][first:last], layout.base_bytes)
            halves = fixed.view(np.int16)
            fine, fine_stride = fixed[:0], 0
            if mid is not None:
                fine, fine_stride = _flat(mid[n][first:last], layout.mid_bytes)
            records = fixed, halves, stride, fine, fine_stride, last - first, layout
            at = first * strides[0] + n * block
            _decode_keys(*records, out_keys[at:], *strides)
            _decode_values(*records, norm, out_values[at:], *strides)

    for_ranges(work, layers * num_blocks)


def _flat(rows: Rows, size: int) -> tuple[Rows, int]:
    """Return read-only bytes from the first row's begin to the last one's end, and the stride."""
    stride = rows.strides[0] if len(rows) > 1 else size
    if stride % 2:  # fp16 numbers are read in place
        rows, stride = rows[:, :size].copy(), size
    span = (len(rows) - 1) * stride + size
    return np.lib.stride_tricks.as_strided(rows, (span,), (1,), writeable=False), stride


@_jit
def _level(base, mid):
    """Return the signed level of a value's two base bits and two mid bits, which are lowest."""
    odd, second = np.uint8(mid & _1) != _0, np.uint8(mid & _2) != _0
    outer = np.uint8(base & _1) != _0
    low = (_L3 if odd else _L2) if second else (_L1 if odd else _L0)
    high = (_L7 if odd else _L6) if second else (_L5 if odd else _L4)
    level = high if outer else low
    return np.int16(-level) if np.uint8(base & _2) != _0 else level


@_jit
def _base_level(base):
    level = _B1 if np.uint8(base & _1) != _0 else _B0
    return np.int16(-level) if np.uint8(base & _2) != _0 else level


@_jit
def _unpack_levels(base, mid, units):
    """Write int16 levels (4, channels x 16) of packed value codes; ``mid`` may be empty."""
    count = base.size
    u0, u1, u2, u3 = units[0], units[1], units[2], units[3]
    if mid.size:
        for j in range(count):
            b, m = base[j], mid[j]
            u0[j] = _level(b, m)
            u1[j] = _level(np.uint8(b >> _2), np.uint8(m >> _2))
            u2[j] = _level(np.uint8(b >> _4), np.uint8(m >> _4))
            u3[j] = _level(np.uint8(b >> _6), np.uint8(m >> _6))
    else:
        for j in range(count):
            b = base[j]
            u0[j] = _base_level(b)
            u1[j] = _base_level(np.uint8(b >> _2))
            u2[j] = _base_level(np.uint8(b >> _4))
            u3[j] = _base_level(np.uint8(b >> _6))


@_jit
def _spread(source, target):
    """Take one step of the transform: the highest index bit becomes the lowest."""
    half = source.size // 2
    low, high = source[:half], source[half:]
    for j in range(half):
        target[2 * j] = np.int16(low[j] + high[j])
        target[2 * j + 1] = np.int16(low[j] - high[j])


@_jit
def _scale_rows(units, factors, out):
    """Write each token of integers (4, 16 x D), times its factor, to ``out`` (64 x D)."""
    dim = out.size // TOKENS
    like = out[0]
    for t in range(TOKENS):
        r = t % UNIT
        source, target = units[t // UNIT][r * dim : (r + 1) * dim], out[t * dim : (t + 1) * dim]
        factor = factors[t]
        for d in range(dim):
            target[d] = from_float(np.float32(source[d]) * factor, like)


@_jit
def _unpack_keys(base, mid, bits, codes):
    """Write uint8 codes (64 x D): 5 bits of each key, or 2 where ``mid`` is empty."""
    half = base.size // 2
    for w in range(2):
        b = base[w * half : (w + 1) * half]
        c0, c1 = codes[w * half : (w + 1) * half], codes[(2 + w) * half : (3 + w) * half]
        c2, c3 = codes[(4 + w) * half : (5 + w) * half], codes[(6 + w) * half : (7 + w) * half]
        if mid.size:
            m = mid[w * half : (w + 1) * half]
            shift = np.uint8(w)
            for j in range(half):
                x, y, z = b[j], m[j], np.uint8(bits[j] >> shift)
                c0[j] = ((x << _3) & _24) | ((y << _1) & _6) | (z & _1)
                c1[j] = ((x << _1) & _24) | ((y >> _1) & _6) | ((z >> _2) & _1)
                c2[j] = ((x >> _1) & _24) | ((y >> _3) & _6) | ((z >> _4) & _1)
                c3[j] = ((x >> _3) & _24) | ((y >> _5) & _6) | ((z >> _6) & _1)
        else:
            for j in range(half):
                x = b[j]
                c0[j] = x & _3
                c1[j] = (x >> _2) & _3
                c2[j] = (x >> _4) & _3
                c3[j] = x >> _6


@_jit
def _step_rows(codes, minimum, step, out):
    """Write minimum + step x code; the parameters repeat for several rows."""
    run = minimum.size
    like = out[0]
    for first in range(0, codes.size, run):
        source, target = codes[first : first + run], out[first : first + run]
        for j in range(run):
            code = np.float32(np.int32(source[j]))
            target[j] = from_float(code * step[j] + minimum[j], like)


@_jit
def _repeat_half(bits, out):
    """Write the float32 of fp16 ``bits``, several times over."""
    count = bits.size
    for copy in range(out.size // count):
        target = out[copy * count : (copy + 1) * count]
        for j in range(count):
            target[j] = to_float(bits[j])


@_jit
def _decode_keys(
    base, halves, base_stride, mid, mid_stride, layers, layout, out, layer_stride, head_stride
):
    """Decode keys of layers of one block: .63 bytes in, itemsize out, 20 operations each."""
    heads, dim = layout.heads, layout.dim
    count = UNIT * dim
    codes = np.empty(TOKENS * dim, np.uint8)
    minimum, step = np.empty(_ROWS * dim, np.float32), np.empty(_ROWS * dim, np.float32)
    for i in range(layers):
        for h in range(heads):
            p = i * base_stride // 2 + h * dim
            _repeat_half(halves[p : p + dim], minimum)
            _repeat_half(halves[p + heads * dim : p + (heads + 1) * dim], step)
            if not mid.size:
                for j in range(step.size):
                    minimum[j] += _BASE_CENTRE * step[j]
                    step[j] *= _BASE_STEP
            k, m = i * base_stride + layout.keys + h * count, i * mid_stride + h * count
            q = i * mid_stride + layout.mid_bits + h * (count // 2)
            _unpack_keys(base[k : k + count], mid[m : m + count], mid[q : q + count // 2], codes)
            at = i * layer_stride + h * head_stride
            _step_rows(codes, minimum, step, out[at : at + TOKENS * dim])


@_jit
def _decode_values(
    base, halves, base_stride, mid, mid_stride, layers, layout, norm, out, layer_stride, head_stride
):
    """Decode values of layers of one block: .5 bytes in, itemsize out, 30 operations each."""
    heads, dim = layout.heads, layout.dim
    count, size = UNIT * dim, dim & -dim
    units, other = np.empty((4, count), np.int16), np.empty((4, count), np.int16)
    factors = np.empty(TOKENS, np.float32)
    for i in range(layers):
        for h in range(heads):
            peak = to_float(halves[i * base_stride // 2 + 2 * heads * dim + h])
            s = i * base_stride + layout.scales + h * TOKENS
            for t in range(TOKENS):
                factors[t] = peak * _FACTORS[base[s + t]] * norm
            v, m = layout.values + h * count, layout.mid_values + h * count
            v, m = v + i * base_stride, m + i * mid_stride
            _unpack_levels(base[v : v + count], mid[m : m + count], units)
            source, target, left = units, other, size
            while left > 1:
                for u in range(4):
                    _spread(source[u], target[u])
                source, target = target, source
                left //= 2
            at = i * layer_stride + h * head_stride
            _scale_rows(source, factors, out[at : at + TOKENS * dim])
