"""Rotation on a CPU: 16 channel pairs at a time, a few tokens of every head after the other.

So memory is read and written in runs, and the tables' rows of a run stay in first-level cache while
all heads turn by them.

Roofline, per bf16 element: 2 bytes read, 2 written, 8 of tables shared by the heads, 3 operations:
the speed of a copy (AVX-512: 32 elements in about 18 instructions).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import torch

from kvstrata.kernels.compiled import VECTORS, called, kernel
from kvstrata.kernels.floats_numba import as_numpy, from_float, to_float
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.vectors_numba import LANES, add, load, multiply, splat, store, subtract

_ELEMENTS_PER_THREAD = 1 << 16
_RUN = 64  # tokens
_NO_POSITIONS = np.empty(0, dtype=np.int64)


def rotate_numba(
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    inverse: bool,
    out: torch.Tensor,
) -> None:
    """Write ``rotate`` of contiguous (H, N, D) to ``out``, which may be ``keys``."""
    num_heads, num_tokens, dim = keys.shape
    rows = _NO_POSITIONS if positions is None else positions.contiguous().numpy()
    flat = [as_numpy(tensor).reshape(-1) for tensor in (keys, cos, sin, out)]
    sign = np.float32(-1 if inverse else 1)
    sizes = num_heads, num_tokens, dim, cos.shape[1] // 2
    grain = _ELEMENTS_PER_THREAD // (num_heads * dim) + 1
    for_ranges(lambda a, b: _rotate(*flat, rows, sign, *sizes, a, b), num_tokens, grain)


@kernel(**VECTORS)
def _rotate(keys, cos, sin, out, positions, sign, heads, tokens, dim, half, start, stop):
    for first in range(start, stop, _RUN):
        last = min(first + _RUN, stop)
        for head in range(heads):
            for token in range(first, last):
                row = positions[token] if positions.size else token
                at = (head * tokens + token) * dim
                _turn(keys, cos, sin, out, sign, at, row * 2 * half, half)
                for i in range(at + 2 * half, at + dim):
                    out[i] = keys[i]


@called
def _turn(keys, cos, sin, out, sign, low, table, half):
    """Turn the channel pairs of one row, which begins at ``low``, by a table's row."""
    high, other = low + half, table + half
    whole = half // LANES * LANES
    for i in range(0, whole, LANES):
        a, b = load(keys, low + i), load(keys, high + i)
        low_sin = multiply(load(sin, table + i), splat(sign))
        high_sin = multiply(load(sin, other + i), splat(sign))
        store(out, low + i, subtract(multiply(a, load(cos, table + i)), multiply(b, low_sin)))
        store(out, high + i, add(multiply(b, load(cos, other + i)), multiply(a, high_sin)))
    for i in range(whole, half):
        a, b = to_float(keys[low + i]), to_float(keys[high + i])
        low_sin, high_sin = sign * sin[table + i], sign * sin[other + i]
        out[low + i] = from_float(a * cos[table + i] - b * low_sin, out[0])
        out[high + i] = from_float(b * cos[other + i] + a * high_sin, out[0])
