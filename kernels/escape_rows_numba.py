# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Escaped tokens on a CPU: gathered and rounded row by row; torch multiplies by the matrix.

So codes and scales have the bits of the reference.

Roofline: reads 2 bytes of bf16 and writes 1 per element of an escaped token, about 10 operations
and 2 D for the product; the float32 rows between stay in cache.
"""

from typing import Any

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.escape_rows import EscapeRows, row_starts
from kvstrata.kernels.floats_numba import as_numpy, from_float, to_float
from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.quantize import TINY
from kvstrata.kernels.threads import for_ranges

_GRAIN_ROWS, _GRAIN_HEADS = 256, 64  # that are worth a thread
_TINY, _TOP, _ZERO, _ONE = np.float32(TINY), np.float32(127), np.float32(0), np.int64(1)

Array = np.ndarray[Any, Any]


def pack_escape_rows_numba(
    x: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``pack_escape_rows_reference`` returns.

    Raises:
        ValueError: An escaped token is not finite.
    """
    starts, dim = row_starts(masks).numpy(), x.shape[3]
    rows = torch.empty((int(starts[-1]), dim), dtype=torch.float32)
    source, bits, target = as_numpy(x.contiguous().view(-1)), *_arrays(masks, rows)

    def gather(first: int, last: int) -> None:
        _gather(source, bits, starts, masks.shape[0], masks.shape[1], dim, target, first, last)

    for_ranges(gather, bits.size, _GRAIN_HEADS)
    turned = rows @ hadamard(dim)
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales = torch.empty(len(rows), dtype=torch.float32)
    arrays = _arrays(turned, codes, scales)
    for_ranges(lambda first, last: _quantize(*arrays, dim, first, last), len(rows), _GRAIN_ROWS)
    if not torch.isfinite(scales).all():
        raise ValueError("values are not finite")
    return codes, scales.bfloat16()


def unpack_escape_rows_numba(rows: EscapeRows) -> torch.Tensor:
    """Return what ``unpack_escape_rows_reference`` returns."""
    count, dim = rows.codes.shape
    out = torch.empty((count, dim), dtype=torch.float32)
    arrays = _arrays(rows.codes, rows.scales.float(), out)
    for_ranges(lambda first, last: _dequantize(*arrays, dim, first, last), count, _GRAIN_ROWS)
    return out @ hadamard(dim)


def scatter_escape_rows_numba(rows: EscapeRows, out: torch.Tensor) -> None:
    """Do what ``scatter_escape_rows_reference`` does, for contiguous ``out``."""
    heads, blocks, _, dim = out.shape
    bits, values = _arrays(rows.masks, unpack_escape_rows_numba(rows))
    target, starts = as_numpy(out.view(-1)), row_starts(rows.masks).numpy()

    def scatter(first: int, last: int) -> None:
        _scatter(values, bits, starts, heads, blocks, dim, target, first, last)

    for_ranges(scatter, bits.size, _GRAIN_HEADS)


def _arrays(*tensors: torch.Tensor) -> list[Array]:
    return [tensor.contiguous().view(-1).numpy() for tensor in tensors]


@kernel(error_model="numpy")
def _gather(x, masks, starts, heads, blocks, dim, rows, first, last):
    """Copy the tokens of the masks of items ``first`` to ``last``, (block, head)."""
    for item in range(first, last):
        mask = masks[item % heads * blocks + item // heads]
        at = (item % heads * blocks + item // heads) * 64 * dim
        to = starts[item] * dim
        for t in range(64):
            if mask >> t & _ONE:
                for c in range(dim):
                    rows[to + c] = to_float(x[at + t * dim + c])
                to += dim


@kernel(error_model="numpy")
def _scatter(rows, masks, starts, heads, blocks, dim, out, first, last):
    for item in range(first, last):
        mask = masks[item % heads * blocks + item // heads]
        to = (item % heads * blocks + item // heads) * 64 * dim
        at = starts[item] * dim
        for t in range(64):
            if mask >> t & _ONE:
                for c in range(dim):
                    out[to + t * dim + c] = from_float(rows[at + c], out[0])
                at += dim


@kernel(error_model="numpy")
def _quantize(rows, codes, scales, dim, first, last):
    """Round rows to int8; the scale of one that is not finite is infinite."""
    for row in range(first, last):
        at = row * dim
        peak, finite = _ZERO, True
        for c in range(at, at + dim):
            size = abs(rows[c])
            finite &= size < np.inf
            peak = size if size > peak else peak
        scale = peak / _TOP
        scale = scale if scale > _TINY else _TINY
        scale = to_float(from_float(scale, np.uint16(0)))
        scales[row] = scale if finite else np.float32(np.inf)
        for c in range(at, at + dim):
            whole = np.rint(rows[c] / scale)
            whole = whole if whole < _TOP else _TOP
            codes[c] = np.int8(whole if whole > -_TOP else -_TOP)


@kernel(error_model="numpy")
def _dequantize(codes, scales, out, dim, first, last):
    for row in range(first, last):
        scale = scales[row]
        for c in range(row * dim, row * dim + dim):
            out[c] = np.float32(codes[c]) * scale
