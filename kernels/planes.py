"""Packing of 1-, 2- and 4-bit codes, planar: with 8/b codes a byte, element i lies in byte i mod P.

So a byte of 2-bit codes holds elements i, i + D/4, i + D/2 and i + 3D/4, the first in its low bits.
Unpacking is then a few shifts over contiguous runs, which vectorises on CPU and GPU alike.
"""

import torch


def pack_planar(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 (..., D * bits // 8) holding ``codes``, uint8 (..., D) below 2 ** bits.

    Raises:
        ValueError: ``bits`` is not 1, 2 or 4, or D is no multiple of 8 / bits.
    """
    slots = _slots(bits)
    if codes.shape[-1] % slots:
        raise ValueError(f"the last dimension must be a multiple of {slots}, not {codes.shape[-1]}")
    parts: torch.Tensor = codes.unflatten(-1, (slots, -1))
    packed = parts[..., 0, :].clone()
    for slot in range(1, slots):
        packed |= parts[..., slot, :] << (bits * slot)
    return packed


def unpack_planar(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 codes (..., P * 8 // bits) of ``packed``, uint8 (..., P)."""
    slots = _slots(bits)
    codes = torch.empty((*packed.shape[:-1], slots, packed.shape[-1]), dtype=torch.uint8)
    for slot in range(slots):
        torch.bitwise_and(packed >> (bits * slot), (1 << bits) - 1, out=codes[..., slot, :])
    return codes.flatten(-2)


def _slots(bits: int) -> int:
    if bits not in (1, 2, 4):
        raise ValueError(f"bits must be 1, 2 or 4, not {bits}")
    return 8 // bits


def split_bytes(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of ``values`` by plane: uint8 (itemsize, numel), byte 0 of all first."""
    return values.contiguous().view(torch.uint8).reshape(-1, values.element_size()).T.contiguous()


def merge_bytes(planes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the flat tensor whose ``split_bytes`` is ``planes``, bit for bit."""
    return planes.T.contiguous().view(dtype).reshape(-1)
