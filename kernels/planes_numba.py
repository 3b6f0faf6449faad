# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Unpacking of planar codes on CPU: codes to numbers of any dtype, many rows on several threads.

A code below 16 as bf16 is computed, not looked up: the float of a small integer has no bits to
round off.
"""

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.floats_numba import as_numpy, from_float
from kvstrata.kernels.threads import for_ranges

_GRAIN_BYTES = 1 << 14  # packed bytes that are worth a thread

_jit = kernel(error_model="numpy")


def unpack_planar_numba(rows: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Fill ``out`` (R, P * 8 // bits) from uint8 ``rows`` (R, P), both contiguous."""
    num_rows, row_bytes = rows.shape
    packed = rows.numpy().reshape(-1)
    codes = as_numpy(out).reshape(-1)
    kernel = _unpack_bytes if out.dtype == torch.uint8 else _unpack_floats

    def work(start: int, stop: int) -> None:
        span = slice(start * row_bytes, stop * row_bytes)
        wide = slice(start * row_bytes * 8 // bits, stop * row_bytes * 8 // bits)
        kernel(packed[span], row_bytes, np.uint8(bits), codes[wide])

    for_ranges(work, num_rows, max(1, _GRAIN_BYTES // row_bytes))


@_jit
def _unpack_floats(packed, row_bytes, bits, out):
    """Unpack rows; bits / 8 bytes in and itemsize out per code, 8 operations."""
    like = out[0]
    mask = np.uint8((1 << bits) - 1)
    slots = 8 // bits
    for first in range(0, packed.size, row_bytes):
        row = packed[first : first + row_bytes]
        for slot in range(slots):
            at = first * slots + slot * row_bytes
            codes = out[at : at + row_bytes]
            shift = np.uint8(slot * bits)
            for i in range(row_bytes):
                code = np.uint8(np.uint8(row[i] >> (shift & np.uint8(7))) & mask)
                codes[i] = from_float(np.float32(np.int32(code)), like)


@_jit
def _unpack_bytes(packed, row_bytes, bits, out):
    mask = np.uint8((1 << bits) - 1)
    slots = 8 // bits
    for first in range(0, packed.size, row_bytes):
        row = packed[first : first + row_bytes]
        for slot in range(slots):
            at = first * slots + slot * row_bytes
            codes = out[at : at + row_bytes]
            shift = np.uint8(slot * bits)
            for i in range(row_bytes):
                codes[i] = np.uint8(np.uint8(row[i] >> (shift & np.uint8(7))) & mask)
