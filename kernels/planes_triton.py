# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Unpacking of planar codes on a GPU: a program reads a run of bytes once, writes all slots."""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase

_BYTES = 1024  # of one program


def unpack_planar_triton(rows: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Fill ``out`` (R, P * 8 // bits) from uint8 ``rows`` (R, P), both contiguous."""
    num_bytes = rows.numel()
    grid = (triton.cdiv(num_bytes, _BYTES),)
    _unpack_planar_kernel[grid](rows, out, num_bytes, rows.shape[1], bits, _BYTES)


@triton.jit
def _unpack_planar_kernel(
    packed, out, num_bytes, row_bytes, BITS: tl.constexpr, BYTES: tl.constexpr
):
    """Unpack a run of bytes.

    BITS / 8 bytes in and itemsize out per code, 4 operations: memory bound. 2^30 codes of 2 bits
    to bf16 take at least 2.25 * 2^30 B / 3.35 TB/s = 0.72 ms on an H100.
    """
    SLOTS: tl.constexpr = 8 // BITS
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < num_bytes
    byte = tl.load(packed + at, inside, 0).to(tl.int32)
    row, place = at // row_bytes, at % row_bytes
    target = out + row * row_bytes * SLOTS + place
    for slot in tl.static_range(SLOTS):
        code = byte >> (slot * BITS) & ((1 << BITS) - 1)
        # By way of float32, because there is no direct way from an integer to every float.
        value = code.to(tl.float32).to(out.dtype.element_ty)
        tl.store(target + slot * row_bytes, value, inside)


AOT = tuple(
    AotCase(
        f"unpack_{bits}_bits_bf16",
        _unpack_planar_kernel,
        {"packed": "*u8", "out": "*bf16", "num_bytes": "i64", "row_bytes": "i32"},
        {"BITS": bits, "BYTES": _BYTES},
        wide_loads=False,
    )
    for bits in (1, 2, 4)
)
