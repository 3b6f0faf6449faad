"""Packing of 1-, 2- and 4-bit codes, planar: with 8/b codes a byte, element i lies in byte i mod P.

So a byte of 2-bit codes holds elements i, i + D/4, i + D/2 and i + 3D/4, the first in its low bits.
Unpacking is then a few shifts over contiguous runs, which vectorises on CPU and GPU alike.
"""

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.huge_memory import empty_huge

DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


def pack_planar(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 (..., D * bits // 8) holding ``codes``, uint8 (..., D) below 2 ** bits.

    Raises:
        ValueError: ``bits`` is not 1, 2 or 4, D is no multiple of 8 / bits, or ``codes`` are not
            uint8 below 2 ** bits.
    """
    slots = _slots(bits)
    if codes.dtype != torch.uint8 or codes.ndim == 0:
        raise ValueError(f"codes must be uint8 (..., D), not {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and codes.max() >= 1 << bits:
        raise ValueError(f"a code is {int(codes.max())}, too large for {bits} bits")
    if codes.shape[-1] % slots:
        raise ValueError(f"the last dimension must be a multiple of {slots}, not {codes.shape[-1]}")
    parts: torch.Tensor = codes.unflatten(-1, (slots, -1))
    packed = parts[..., 0, :].clone()
    for slot in range(1, slots):
        packed |= parts[..., slot, :] << (bits * slot)
    return packed


def unpack_planar(
    packed: torch.Tensor, bits: int, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """Return codes (..., P * 8 // bits) of ``packed``, uint8 (..., P), as numbers of ``dtype``.

    Raises:
        ValueError: ``bits`` is not 1, 2 or 4, ``packed`` is not uint8 or has no dimension, or
            ``dtype`` is not one of uint8, bfloat16, float16 and float32.
    """
    slots = _slots(bits)
    if packed.dtype != torch.uint8 or packed.ndim == 0:
        raise ValueError(f"packed must be uint8 (..., P), not {packed.dtype} {tuple(packed.shape)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be uint8, bfloat16, float16 or float32, not {dtype}")
    backend = backend_of(packed)
    if backend == "reference" or not packed.numel():
        return unpack_planar_reference(packed, bits, dtype)
    row = packed.shape[-1]
    codes = empty_huge((*packed.shape[:-1], slots * row), dtype, packed.device)
    rows, out = packed.contiguous().view(-1, row), codes.view(-1, slots * row)
    if backend == "numba":
        from kvstrata.kernels.planes_numba import unpack_planar_numba

        unpack_planar_numba(rows, bits, out)
    else:
        from kvstrata.kernels.planes_triton import unpack_planar_triton

        unpack_planar_triton(rows, bits, out)
    return codes


def unpack_planar_reference(
    packed: torch.Tensor, bits: int, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """Return what ``unpack_planar`` returns."""
    slots = _slots(bits)
    shape = (*packed.shape[:-1], slots, packed.shape[-1])
    codes = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for slot in range(slots):
        torch.bitwise_and(packed >> (bits * slot), (1 << bits) - 1, out=codes[..., slot, :])
    return codes.flatten(-2).to(dtype)


def _slots(bits: int) -> int:
    if bits not in (1, 2, 4):
        raise ValueError(f"bits must be 1, 2 or 4, not {bits}")
    return 8 // bits
