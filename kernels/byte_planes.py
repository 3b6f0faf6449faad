"""The bytes of a tensor plane by plane, and back: floats compress better with like bytes together.

Sign and exponent bytes of neighbouring values are alike, mantissa bytes are noise; apart, the first
compress and the second cost nothing to skip.
"""

import torch

from kvstrata.kernels.backend import backend_of


def split_bytes(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of ``values`` by plane: uint8 (itemsize, numel), byte 0 of all first."""
    flat = values.contiguous().view(-1)
    backend = backend_of(values)
    if flat.element_size() in (2, 4) and flat.numel():
        if backend == "numba":
            from kvstrata.kernels.byte_planes_numba import split_bytes_numba

            return split_bytes_numba(flat)
        if backend == "triton":
            from kvstrata.kernels.byte_planes_triton import split_bytes_triton

            return split_bytes_triton(flat)
    return split_bytes_reference(flat)


def merge_bytes(planes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the flat tensor whose ``split_bytes`` is ``planes``, bit for bit.

    Raises:
        ValueError: ``planes`` is not uint8 with one row per byte of ``dtype``.
    """
    if planes.dtype != torch.uint8 or planes.ndim != 2 or planes.shape[0] != dtype.itemsize:
        raise ValueError(
            f"{dtype} needs uint8 planes of shape ({dtype.itemsize}, n), "
            f"not {planes.dtype} of shape {tuple(planes.shape)}"
        )
    planes = planes.contiguous()
    backend = backend_of(planes)
    if dtype.itemsize in (2, 4) and planes.numel():
        if backend == "numba":
            from kvstrata.kernels.byte_planes_numba import merge_bytes_numba

            return merge_bytes_numba(planes, dtype)
        if backend == "triton":
            from kvstrata.kernels.byte_planes_triton import merge_bytes_triton

            return merge_bytes_triton(planes, dtype)
    return merge_bytes_reference(planes, dtype)


def split_bytes_reference(flat: torch.Tensor) -> torch.Tensor:
    """Return ``split_bytes`` of a flat contiguous tensor; the definition."""
    return flat.view(torch.uint8).view(-1, flat.element_size()).T.contiguous()


def merge_bytes_reference(planes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``merge_bytes`` of checked planes; the definition."""
    return planes.T.contiguous().view(dtype).reshape(-1)
