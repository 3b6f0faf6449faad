"""Ranges of bytes, gathered one after the other: parts of many segments without a look at each."""

import numpy as np
import torch

from kvstrata.kernels.backend import backend_of


def join_ranges(data: torch.Tensor, firsts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return ``data[first : first + size]`` of every range, one after the other: uint8.

    Args:
        data: uint8 (n,), contiguous, on the CPU.
        firsts: int64, any shape, in C order.
        sizes: int64 of that shape, in bytes.

    Raises:
        ValueError: A range is not within ``data``, or shapes and types are others.
    """
    if data.dtype != torch.uint8 or data.ndim != 1 or {firsts.dtype, sizes.dtype} != {torch.int64}:
        raise ValueError("data must be uint8 (n,), firsts and sizes int64")
    if firsts.shape != sizes.shape:
        raise ValueError(f"{tuple(firsts.shape)} firsts came with {tuple(sizes.shape)} sizes")
    firsts, sizes = firsts.reshape(-1), sizes.reshape(-1)
    # Each by itself first, so that the sum of both cannot pass the end of int64.
    is_within = all(((part >= 0) & (part <= len(data))).all() for part in (firsts, sizes))
    if not is_within or (firsts + sizes > len(data)).any():
        raise ValueError(f"a range lies outside of {len(data)} bytes")
    if backend_of(data, firsts, sizes) == "numba":
        from kvstrata.kernels.byte_ranges_numba import join_ranges_numba

        return join_ranges_numba(data, firsts, sizes)
    return join_ranges_reference(data, firsts, sizes)


def join_ranges_reference(
    data: torch.Tensor, firsts: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Return ``join_ranges`` of checked ranges; the definition."""
    ranges = zip(firsts.tolist(), sizes.tolist(), strict=True)
    parts = [data.numpy()[first : first + size] for first, size in ranges]
    return torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *parts]))
