"""Sets of tokens of a block as 64-bit masks: bit t of an int64 is token t.

The class of a token is told by two masks, ``mid`` and ``escape``: neither bit is base, both bits
are dropped. A word of a bit plane has the same form, one bit per token.
"""

from typing import NamedTuple

import numpy as np
import torch

from kvstrata.kernels.backend import backend_of

TOKENS = 64


class TokenClasses(NamedTuple):
    """Disjoint int64 masks of one shape: every token is in exactly one of them."""

    base: torch.Tensor
    mid: torch.Tensor
    escape: torch.Tensor
    dropped: torch.Tensor


def token_classes(mid: torch.Tensor, escape: torch.Tensor) -> TokenClasses:
    """Return the four classes that the two stored masks tell."""
    return TokenClasses(~(mid | escape), mid & ~escape, escape & ~mid, mid & escape)


def to_mask(flags: torch.Tensor) -> torch.Tensor:
    """Return int64 (...) of flags, bool (..., 64).

    Raises:
        ValueError: They are not.
    """
    if flags.dtype != torch.bool or flags.shape[-1:] != (TOKENS,):
        raise ValueError(
            f"flags must be bool (..., {TOKENS}), not {flags.dtype} {tuple(flags.shape)}"
        )
    backend = backend_of(flags)
    if backend == "numba":
        from kvstrata.kernels.token_masks_numba import to_mask_numba

        return to_mask_numba(flags)
    if backend == "triton":
        from kvstrata.kernels.token_masks_triton import to_mask_triton

        return to_mask_triton(flags)
    return to_mask_reference(flags)


def to_mask_reference(flags: torch.Tensor) -> torch.Tensor:
    """Return what ``to_mask`` returns; the definition."""
    places = torch.arange(TOKENS, dtype=torch.int64, device=flags.device)
    return (flags.long() << places).sum(-1)


def to_flags(masks: torch.Tensor) -> torch.Tensor:
    """Return bool (..., 64) of int64 masks (...).

    Raises:
        ValueError: They are not int64.
    """
    if masks.dtype != torch.int64:
        raise ValueError(f"masks must be int64, not {masks.dtype}")
    backend = backend_of(masks)
    if backend == "numba":
        from kvstrata.kernels.token_masks_numba import to_flags_numba

        return to_flags_numba(masks)
    if backend == "triton":
        from kvstrata.kernels.token_masks_triton import to_flags_triton

        return to_flags_triton(masks)
    return to_flags_reference(masks)


def to_flags_reference(masks: torch.Tensor) -> torch.Tensor:
    """Return what ``to_flags`` returns; the definition."""
    places = torch.arange(TOKENS, dtype=torch.int64, device=masks.device)
    return (masks[..., None] >> places & 1).bool()


def count_tokens(masks: torch.Tensor) -> torch.Tensor:
    """Return int64 (...): how many bits of each int64 mask are set."""
    if masks.device.type == "cpu" and hasattr(np, "bitwise_count"):  # compiled code, as Numba's is
        bits = np.bitwise_count(masks.contiguous().numpy().view(np.uint64))
        return torch.from_numpy(np.asarray(bits, np.int64))
    if backend_of(masks) == "triton":
        from kvstrata.kernels.token_masks_triton import count_tokens_triton

        return count_tokens_triton(masks)
    return count_tokens_reference(masks)


def count_tokens_reference(masks: torch.Tensor) -> torch.Tensor:
    """Return what ``count_tokens`` returns, by sums of ever more bits."""
    counts = masks - (masks >> 1 & 0x5555555555555555)
    counts = (counts & 0x3333333333333333) + (counts >> 2 & 0x3333333333333333)
    counts = counts + (counts >> 4) & 0x0F0F0F0F0F0F0F0F
    return counts * 0x0101010101010101 >> 56 & 0xFF


def check_masks(name: str, masks: torch.Tensor, num_heads: int, num_blocks: int) -> None:
    """Refuse masks that are not int64 (num_heads, num_blocks).

    Raises:
        ValueError: They are not.
    """
    if masks.dtype != torch.int64 or masks.shape != (num_heads, num_blocks):
        raise ValueError(
            f"{name} must be int64 ({num_heads}, {num_blocks}), "
            f"not {masks.dtype} {tuple(masks.shape)}"
        )
