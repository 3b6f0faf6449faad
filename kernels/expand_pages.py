"""Keys and values of compressed blocks as they lie in memory, for attention of many tokens.

The parts of the blocks are gathered into the form of ``component_basis.expand``, which does the
rest. One layer at a time, so that the expanded keys of a long prompt never exist for all layers.

Legend: N blocks, H KV heads, D head_dim, T = 64 tokens of a block.
"""

import torch

from kvstrata.kernels.block_pages import (
    ABSENT,
    BIAS_CODES,
    BIAS_STEPS,
    BLOCK_TOKENS,
    CODES,
    MASKS,
    MID,
    SCALES,
    SIDE_FIELDS,
    WORDS,
    BlockPages,
    Turns,
)
from kvstrata.kernels.block_planes import MidRows
from kvstrata.kernels.component_basis import ComponentBasis, expand
from kvstrata.kernels.escape_rows import EscapeRows
from kvstrata.kernels.token_masks import token_classes
from kvstrata.kernels.value_bias import ValueBias


def expand_pages(
    pages: BlockPages,
    rows: torch.Tensor,
    bases: tuple[ComponentBasis, ComponentBasis],
    turns: Turns,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of some blocks, one after the other, each (H, N * T, D).

    Tokens that are dropped get the mean: they must not be attended.

    Args:
        pages: Where the blocks are. Whole blocks only; all with MID or all without.
        rows: int64 (N,), which of them, at least one.
        bases: What keys and values were transformed with, the tables of ``pages``.
        turns: Rotation to the first token of each block, (N, D).
        dtype: Of the result.

    Raises:
        ValueError: A block is not whole, or only some have MID.
    """
    if not (pages.blocks.num_tokens[rows] == BLOCK_TOKENS).all():
        raise ValueError("only whole blocks can be expanded")
    rotation = (
        turns.cos.repeat_interleave(BLOCK_TOKENS, 0),
        turns.sin.repeat_interleave(BLOCK_TOKENS, 0),
    )
    keys = _expand_side(pages, rows, 0, bases[0], dtype, rotation)
    return keys, _expand_side(pages, rows, 1, bases[1], dtype, None)


def _expand_side(
    pages: BlockPages,
    rows: torch.Tensor,
    side: int,
    basis: ComponentBasis,
    dtype: torch.dtype,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    arena, layout = pages.arena, basis.layout
    heads, dim = layout.num_heads, layout.dim
    offsets = pages.places(rows)
    at = offsets[:, side * SIDE_FIELDS :]
    masks = _take(arena, at[:, MASKS], 16 * heads).view(torch.int64).view(-1, 2, heads)
    escape, mid = (part.T.contiguous() for part in masks.unbind(1))
    classes = token_classes(mid, escape)
    words = _take(arena, at[:, WORDS], 8 * layout.num_words).view(torch.int64)
    escapes, mids = pages.row_starts(rows)[:, side, :, -1].unbind(1)
    fine = None
    if (at[:, MID] != ABSENT).all():
        fine = MidRows(classes.mid, _take_runs(arena, at[:, MID], mids), _ends(mids, arena))
    elif (at[:, MID] != ABSENT).any():
        raise ValueError("some of the blocks have MID and some have not")
    scales = _take_runs(arena, at[:, SCALES], 2 * escapes).view(torch.bfloat16)
    codes = _take_runs(arena, at[:, CODES], dim * escapes).view(torch.int8).view(-1, dim)
    bias = None
    if side == 1:
        nibbles = _take(arena, offsets[:, BIAS_CODES], heads * dim // 2)
        steps = _take(arena, offsets[:, BIAS_STEPS], heads)
        bias = ValueBias(nibbles.view(-1, heads, dim // 2), steps)
    return expand(
        words.view(len(rows), -1),
        basis,
        classes,
        mid=fine,
        bias=bias,
        escapes=EscapeRows(classes.escape, scales, codes, _ends(escapes, arena)),
        rotation=rotation,
        dtype=dtype,
    ).flatten(1, 2)


def _take(arena: torch.Tensor, starts: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """Return as many bytes from each start: uint8 (N, num_bytes)."""
    parts = [arena[at : at + num_bytes] for at in starts.tolist()]
    return torch.stack(parts) if num_bytes else arena.new_empty(len(parts), 0)


def _take_runs(arena: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return the bytes of all runs, one after the other."""
    runs = zip(starts.tolist(), sizes.tolist(), strict=True)
    return torch.cat([arena[at : at + size] for at, size in runs])


def _ends(sizes: torch.Tensor, arena: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(arena.device)
