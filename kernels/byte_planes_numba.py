"""Byte planes on a CPU: straight loops that become vector shifts and packs, split over threads.

Roofline: 1 byte read and 1 written per byte, no arithmetic to speak of: the speed of a copy.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
from numba import uint8, uint16, uint32

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.huge_memory import empty_huge
from kvstrata.kernels.threads import for_ranges

_GRAIN = 1 << 18


def split_bytes_numba(flat: torch.Tensor) -> torch.Tensor:
    """Return ``split_bytes`` of a flat contiguous CPU tensor with items of 2 or 4 bytes."""
    size, count = flat.element_size(), flat.numel()
    planes = empty_huge((size, count), torch.uint8)
    words, rows = flat.view(torch.uint8).numpy().view(f"u{size}"), list(planes.numpy())
    run = _split_2 if size == 2 else _split_4
    for_ranges(lambda a, b: run(words[a:b], *(row[a:b] for row in rows)), count, _GRAIN)
    return planes


def merge_bytes_numba(planes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``merge_bytes`` of contiguous CPU planes, 2 or 4 of them."""
    size, count = planes.shape
    merged = empty_huge((count * size,), torch.uint8)
    words, rows = merged.numpy().view(f"u{size}"), list(planes.numpy())
    run = _merge_2 if size == 2 else _merge_4
    for_ranges(lambda a, b: run(words[a:b], *(row[a:b] for row in rows)), count, _GRAIN)
    return merged.view(dtype)


@kernel()
def _split_2(words, low, high):
    for i in range(words.size):
        low[i] = uint8(words[i])
    for i in range(words.size):
        high[i] = uint8(words[i] >> uint16(8))


@kernel()
def _merge_2(words, low, high):
    for i in range(words.size):
        words[i] = uint16(low[i]) | uint16(uint16(high[i]) << uint16(8))


@kernel()
def _split_4(words, b0, b1, b2, b3):
    for i in range(words.size):
        b0[i] = uint8(words[i])
    for i in range(words.size):
        b1[i] = uint8(words[i] >> uint32(8))
    for i in range(words.size):
        b2[i] = uint8(words[i] >> uint32(16))
    for i in range(words.size):
        b3[i] = uint8(words[i] >> uint32(24))


@kernel()
def _merge_4(words, b0, b1, b2, b3):
    for i in range(words.size):
        words[i] = (
            uint32(b0[i])
            | (uint32(b1[i]) << uint32(8))
            | (uint32(b2[i]) << uint32(16))
            | (uint32(b3[i]) << uint32(24))
        )
