"""Rotation on a CPU: one vector loop over channel pairs, all heads of a token under one table row.

Roofline, per bf16 element: 2 bytes read, 2 written, 8 of tables shared by the heads, 3 operations:
the speed of a copy once the conversions vectorise (AVX-512: 16 elements in about 6 cycles).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.floats_numba import as_numpy, from_float, to_float
from kvstrata.kernels.threads import for_ranges

_ELEMENTS_PER_THREAD = 1 << 16
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
    arguments = (as_numpy(keys), cos.numpy(), sin.numpy(), rows, bool(inverse), as_numpy(out))
    grain = _ELEMENTS_PER_THREAD // (num_heads * dim) + 1
    for_ranges(lambda a, b: _rotate(*arguments, a, b), num_tokens, grain)


@kernel()
def _rotate(keys, cos, sin, positions, inverse, out, start, stop):
    num_heads, _, dim = keys.shape
    half = cos.shape[1] // 2
    low_sin = np.empty(half, dtype=np.float32)  # signed, so that the loop has no branch
    high_sin = np.empty(half, dtype=np.float32)
    sign = np.float32(-1) if inverse else np.float32(1)
    for token in range(start, stop):
        row = positions[token] if positions.size else token
        low_cos = cos[row][:half]
        high_cos = cos[row][half:]
        for i in range(half):
            low_sin[i] = -sign * sin[row, i]
            high_sin[i] = sign * sin[row, half + i]
        for head in range(num_heads):
            source = keys[head, token]
            target = out[head, token]
            _turn(source[:half], source[half : 2 * half], low_cos, high_cos, low_sin, high_sin,
                  target[:half], target[half : 2 * half])  # fmt: skip
            for i in range(2 * half, dim):
                target[i] = source[i]


@kernel()
def _turn(low, high, low_cos, high_cos, low_sin, high_sin, low_out, high_out):
    for i in range(low.size):
        a = to_float(low[i])
        b = to_float(high[i])
        low_out[i] = from_float(a * low_cos[i] + b * low_sin[i], low[i])
        high_out[i] = from_float(b * high_cos[i] + a * high_sin[i], low[i])
