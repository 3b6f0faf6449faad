# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Flags of 64 tokens to a word and back on a CPU, eight flags by one multiplication.

Roofline: 64 bytes of flags and 8 of mask per word, 32 operations: bound by the flags' memory.
"""

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.threads import for_ranges

_GRAIN_WORDS = 1 << 13
_ONES, _LOW = np.uint64(0x0101010101010101), np.uint64(0x7F7F7F7F7F7F7F7F)
_GATHER, _PICK = np.uint64(0x0102040810204080), np.uint64(0x8040201008040201)
_BYTE, _SEVEN, _TOP = np.uint64(0xFF), np.uint64(7), np.uint64(56)


def to_mask_numba(flags: torch.Tensor) -> torch.Tensor:
    """Return what ``to_mask_reference`` returns."""
    masks = torch.empty(flags.shape[:-1], dtype=torch.int64)
    source = flags.contiguous().view(-1).view(torch.uint8).numpy().view(np.uint64)
    target = masks.view(-1).numpy().view(np.uint64)
    for_ranges(lambda a, b: _to_masks(source, target, a, b), target.size, _GRAIN_WORDS)
    return masks


def to_flags_numba(masks: torch.Tensor) -> torch.Tensor:
    """Return what ``to_flags_reference`` returns."""
    flags = torch.empty((*masks.shape, 64), dtype=torch.bool)
    source = masks.contiguous().view(-1).numpy().view(np.uint64)
    target = flags.view(-1).view(torch.uint8).numpy().view(np.uint64)
    for_ranges(lambda a, b: _to_flags(source, target, a, b), source.size, _GRAIN_WORDS)
    return flags


@kernel()
def _to_masks(flags, masks, first, last):
    """Byte k of eight flags is moved to bit 56 + k; no two of the products' bits meet."""
    for word in range(first, last):
        found = np.uint64(0)
        for byte in range(8):
            bits = flags[8 * word + byte] * _GATHER >> _TOP
            found |= bits << np.uint64(8 * byte)
        masks[word] = found


@kernel()
def _to_flags(masks, flags, first, last):
    for word in range(first, last):
        for byte in range(8):
            bits = (masks[word] >> np.uint64(8 * byte)) & _BYTE
            flags[8 * word + byte] = ((bits * _ONES & _PICK) + _LOW >> _SEVEN) & _ONES
