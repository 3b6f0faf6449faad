"""Sets of tokens of a block as 64-bit masks: bit t of an int64 is token t.

The class of a token is told by two masks, ``mid`` and ``escape``: neither bit is base, both bits
are dropped. A word of a bit plane has the same form, one bit per token.
"""

from typing import NamedTuple

import numpy as np
import torch

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
    """Return int64 (...) of flags, bool (..., 64)."""
    if flags.device.type == "cpu" and flags.dtype == torch.bool:  # a fifth of the time
        packed = np.packbits(flags.numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(packed.view("<i8")[..., 0].astype(np.int64))
    places = torch.arange(TOKENS, dtype=torch.int64, device=flags.device)
    return (flags.long() << places).sum(-1)


def to_flags(masks: torch.Tensor) -> torch.Tensor:
    """Return bool (..., 64) of int64 masks (...)."""
    if masks.device.type == "cpu":
        words = np.ascontiguousarray(masks.numpy()).astype("<i8", copy=False).view(np.uint8)
        bits = np.unpackbits(words, bitorder="little").view(np.bool_)
        return torch.from_numpy(bits).view(*masks.shape, TOKENS)
    places = torch.arange(TOKENS, dtype=torch.int64, device=masks.device)
    return (masks[..., None] >> places & 1).bool()


def count_tokens(masks: torch.Tensor) -> torch.Tensor:
    """Return int64 (...): how many bits of each int64 mask are set."""
    if masks.device.type == "cpu" and hasattr(
        np, "bitwise_count"
    ):  # a dozen tiny operations take longer than all the tokens
        bits = np.bitwise_count(masks.contiguous().numpy().view(np.uint64))
        return torch.from_numpy(bits.astype(np.int64))
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
