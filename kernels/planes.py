"""Packing of 2-bit codes, planar: element i shares a byte with i + D/4, i + D/2 and i + 3D/4.

Unpacking is then four shifts over contiguous runs, which vectorises on CPU and GPU alike.
"""

import torch


def pack_2bit(codes: torch.Tensor) -> torch.Tensor:
    """Return uint8 (..., D // 4) holding the 2-bit ``codes``, uint8 (..., D) with values 0 to 3.

    Raises:
        ValueError: D is no multiple of 4.
    """
    if codes.shape[-1] % 4:
        raise ValueError(f"the last dimension must be a multiple of 4, got {codes.shape[-1]}")
    quarters: torch.Tensor = codes.unflatten(-1, (4, -1))
    packed = quarters[..., 0, :].clone()
    for slot in (1, 2, 3):
        packed |= quarters[..., slot, :] << (2 * slot)
    return packed


def unpack_2bit(packed: torch.Tensor) -> torch.Tensor:
    """Return uint8 codes (..., 4 * P) of ``packed``, uint8 (..., P): inverts ``pack_2bit``."""
    codes = torch.empty((*packed.shape[:-1], 4, packed.shape[-1]), dtype=torch.uint8)
    for slot in range(4):
        torch.bitwise_and(packed >> (2 * slot), 3, out=codes[..., slot, :])
    return codes.flatten(-2)


def split_bytes(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of ``values`` by plane: uint8 (itemsize, numel), byte 0 of all first."""
    return values.contiguous().view(torch.uint8).reshape(-1, values.element_size()).T.contiguous()


def merge_bytes(planes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the flat tensor whose ``split_bytes`` is ``planes``, bit for bit."""
    return planes.T.contiguous().view(dtype).reshape(-1)
