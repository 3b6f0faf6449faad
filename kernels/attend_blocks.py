"""Decode attention over compressed blocks as they lie in memory, without expanding them.

One layer, one new token. Scores and weighted sums are taken in the coordinates that the codes are
in, so a plane of sign bits costs one masked addition per bit and query head; the transform is
applied to queries and outputs, never to keys and values. A block may stand at any position: keys
were turned by RoPE of (token index mod 64) only, so the query is turned back by the position of the
block's first token. Partial results carry the logarithm of their softmax sum, so that
``merge_attention`` puts them together with each other and with ``attend_window``.

Not covered: soft-capped scores, several new tokens at once, masks beyond the token classes.

Legend: N blocks, H KV heads, G query heads per KV head, D head_dim, T = 64 tokens of a block.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch

from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.block_pages import (
    ABSENT,
    BIAS_CODES,
    BIAS_STEPS,
    BLOCK_TOKENS,
    CODES,
    MID,
    SCALES,
    SIDE_FIELDS,
    WORDS,
    BlockPages,
    PageTable,
    Turns,
)
from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.sign_codes import MAX_WIDTH, base_levels, fine_levels
from kvstrata.kernels.token_masks import to_flags
from kvstrata.kernels.value_bias import ValueBias, decode_value_bias

Attention = tuple[torch.Tensor, torch.Tensor]


def attend_blocks(
    queries: torch.Tensor, pages: BlockPages, turns: Turns, scaling: float
) -> Attention:
    """Return attention of one new token over compressed blocks, and its softmax sum.

    The largest temporary is the queries once per block: G / 64 of the expanded keys.

    Args:
        queries: (H * G, D), post-RoPE at the token's position; bf16, fp16, fp32. Query head i reads
            KV head i // G.
        pages: The blocks. A token that is dropped from keys or from values is not read. Mid tokens
            of a block without MID have their base values.
        turns: Rotation to the first token of each block.
        scaling: Factor on the dot products before the softmax.

    Returns:
        Output float32 (H * G, D), and lse float32 (H * G,), the natural logarithm of the sum of
        exp(score). A head without a token has output 0 and lse -inf.

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together.
    """
    _check(queries, pages, turns)
    backend = backend_of(queries, pages.arena, pages.keys.mean, pages.values.mean, *turns)
    if backend == "numba":
        from kvstrata.kernels.attend_blocks_numba import attend_blocks_numba

        return attend_blocks_numba(queries, pages, turns, scaling)
    if backend == "triton":
        from kvstrata.kernels.attend_blocks_triton import attend_blocks_triton

        return attend_blocks_triton(queries, pages, turns, scaling)
    filled = pages.blocks.num_tokens > 0
    if not filled.all():
        rows = filled.nonzero().flatten()
        pages, turns = pages.select(rows), _rows_of(turns, rows)
    if pages.offsets.shape[0] == 0:
        out = torch.zeros(queries.shape, device=queries.device)
        return out, out.new_full(queries.shape[:1], float("-inf"))
    return attend_blocks_reference(queries, pages, turns, scaling)


def attend_batch(
    queries: torch.Tensor, pages: BlockPages, table: PageTable, turns: Turns, scaling: float
) -> Attention:
    """Return attention of one new token of each sequence over its own compressed blocks.

    As ``attend_blocks`` sequence by sequence: a sequence's result does not depend on the others.
    ``pages`` and ``table`` are meant to be kept: what is computed from them alone is, too.

    Args:
        queries: (B, H * G, D), post-RoPE at each token's position; bf16, fp16, fp32.
        pages: The blocks of all sequences.
        table: Which of them each sequence reads, and where they stand.
        turns: Rotation to the first token of a block, for every place in ``table``.
        scaling: Factor on the dot products before the softmax.

    Returns:
        Output float32 (B, H * G, D), and lse float32 (B, H * G,), as ``attend_blocks``.

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together.
    """
    _check_batch(queries, pages, table, turns)
    backend = backend_of(queries, pages.arena, pages.keys.mean, pages.values.mean, *turns)
    if backend == "numba":
        from kvstrata.kernels.attend_blocks_numba import attend_batch_numba

        return attend_batch_numba(queries, pages, table, turns, scaling)
    if backend == "triton":
        from kvstrata.kernels.attend_blocks_triton import attend_batch_triton

        return attend_batch_triton(queries, pages, table, turns, scaling)
    return attend_batch_reference(queries, pages, table, turns, scaling)


def attend_batch_reference(
    queries: torch.Tensor, pages: BlockPages, table: PageTable, turns: Turns, scaling: float
) -> Attention:
    """Return ``attend_batch`` by ``attend_blocks`` for one sequence after another."""
    out = torch.empty(queries.shape, device=queries.device)
    lse = torch.empty(queries.shape[:2], device=queries.device)
    for i, (first, stop) in enumerate(pairwise(table.ends.tolist())):
        own = pages.select(table.pages[first:stop])
        own_turns = _rows_of(turns, table.places[first:stop])
        out[i], lse[i] = attend_blocks(queries[i], own, own_turns, scaling)
    return out, lse


def attend_blocks_reference(
    queries: torch.Tensor, pages: BlockPages, turns: Turns, scaling: float
) -> Attention:
    """Return ``attend_blocks`` by expanding every block first."""
    heads, head_dim = pages.keys.mean.shape
    keys, values = expand_blocks(pages)
    grouped = queries.float().reshape(heads, 1, -1, head_dim)
    scores = scaling * (turn_back(grouped, turns) @ keys.mT).transpose(1, 2).flatten(2)
    is_valid = torch.arange(BLOCK_TOKENS) < pages.blocks.num_tokens[:, None]
    is_read = is_valid[:, None] & ~pages.masks.all(2).any(1)
    hidden = ~is_read.transpose(0, 1).flatten(1)[:, None].to(scores.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    # What is hidden may be anything, so it must not be multiplied by its weight of zero.
    seen = values.flatten(1, 2).masked_fill(hidden.mT, 0.0)
    return (weights @ seen).view(queries.shape), lse.flatten()


def expand_blocks(pages: BlockPages) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys, in block-relative coordinates, and values: float32 (H, N, T, D).

    Dropped tokens and what lies beyond a block's tokens are not meaningful.
    """
    heads, head_dim = pages.keys.mean.shape
    shape = (2, heads, pages.offsets.shape[0], BLOCK_TOKENS, head_dim)
    rows = torch.empty(shape, device=pages.arena.device)
    masks = pages.masks.to(rows.device)
    for side, tables in enumerate((pages.keys, pages.values)):
        for block in range(shape[2]):
            for head in range(heads):
                escape, mid = masks[block, side, :, head]
                y = _decode_components(pages, side, block, head, mid & ~escape)
                offset = tables.mean[head].expand(BLOCK_TOKENS, -1)
                if side == 1:
                    offset = offset + (~escape & ~mid)[:, None] * (
                        _bias(pages, block, head) @ tables.inverse[head]
                    )
                row = (y * tables.scale[head]) @ tables.inverse[head] + offset
                row[escape & ~mid] = _decode_escapes(pages, side, block, head)
                rows[side, head, block] = row
    return rows[0], rows[1]


def _decode_components(
    pages: BlockPages, side: int, block: int, head: int, mid: torch.Tensor
) -> torch.Tensor:
    """Return one head's codes as unit Gaussian components, float32 (T, D)."""
    tables = (pages.keys, pages.values)[side]
    at = pages.places(_one(block))[0, side * SIDE_FIELDS :]
    first, stop = tables.word_starts[head : head + 2].tolist()
    words = pages.take(int(at[WORDS]) + 8 * first, 8 * (stop - first)).view(torch.int64)
    widths, sizes = tables.layout.widths[head].long(), tables.layout.plane_sizes[head].tolist()
    codes = torch.zeros(widths.numel(), BLOCK_TOKENS, dtype=torch.int64, device=widths.device)
    for plane, size in zip(to_flags(words).split(sizes), sizes, strict=True):
        codes[:size] = 2 * codes[:size] + plane
    every = range(MAX_WIDTH + 1)
    y = torch.cat([base_levels(w) for w in every]).to(codes.device)[
        (2**widths - 1)[:, None] + codes
    ]
    count, num_rows = int(tables.layout.mid_counts[head]), int(mid.sum())
    if int(at[MID]) != ABSENT and count and num_rows:
        start = int(at[MID]) + int(pages.row_starts(_one(block))[0, side, 1, head])
        rows = pages.take(start, num_rows * count // 4).view(num_rows, 2, -1)
        bits = rows[..., None] >> torch.arange(8, device=rows.device) & 1
        high, low = bits.flatten(-2).long().unbind(1)
        levels = torch.cat([fine_levels(w) for w in every]).to(codes.device)
        starts = 4 * (2 ** widths[:count, None] - 1)
        y[:count, mid] = levels[starts + 4 * codes[:count, mid] + (2 * high + low).mT]
    return y.mT


def _decode_escapes(pages: BlockPages, side: int, block: int, head: int) -> torch.Tensor:
    head_dim = pages.keys.mean.shape[1]
    at = pages.places(_one(block))[0, side * SIDE_FIELDS :].tolist()
    first, stop = pages.row_starts(_one(block))[0, side, 0, head : head + 2].tolist()
    scale = pages.take(at[SCALES] + 2 * first, 2 * (stop - first)).view(torch.bfloat16)
    codes = pages.take(at[CODES] + head_dim * first, head_dim * (stop - first)).view(torch.int8)
    rows = codes.view(-1, head_dim).float() * scale.float()[:, None]
    return rows @ hadamard(head_dim).to(rows.device)


def _bias(pages: BlockPages, block: int, head: int) -> torch.Tensor:
    """Return the bias of one head's base tokens, in components times their scale."""
    half = pages.keys.mean.shape[1] // 2
    at = pages.places(_one(block))[0].tolist()
    step = pages.take(at[BIAS_STEPS] + head, 1)
    codes = pages.take(at[BIAS_CODES] + head * half, half)
    return decode_value_bias(ValueBias(codes[None, None], step[None]))[0, 0]


def _one(block: int) -> torch.Tensor:
    return torch.tensor([block])


@cache
def bias_steps() -> torch.Tensor:
    """Return float32 (256,): the step that each byte of BIAS_STEPS means."""
    ones = torch.full((1, 256, 1), 8 + 1, dtype=torch.uint8)
    return decode_value_bias(ValueBias(ones, torch.arange(256, dtype=torch.uint8)[None]))[0, :, 0]


def attend_window(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> Attention:
    """Return attention of one new token over uncompressed keys, in the form of ``attend_blocks``.

    Args:
        queries: (H * G, D), post-RoPE; bf16, fp16, fp32.
        keys: (H, n, D), post-RoPE; n may be 0.
        values: As ``keys``.
        scaling: Factor on the dot products before the softmax.

    Returns:
        Output float32 (H * G, D) and lse float32 (H * G,), as ``attend_blocks``.

    Raises:
        ValueError: The shapes do not belong together.
    """
    if keys.ndim != 3 or keys.shape != values.shape or 0 in (keys.shape[0], keys.shape[2]):
        raise ValueError(
            f"keys and values must both be (heads, n, D), not {tuple(keys.shape)} and "
            f"{tuple(values.shape)}"
        )
    heads, _, head_dim = keys.shape
    if queries.ndim != 2 or queries.shape[1] != head_dim or queries.shape[0] % heads:
        raise ValueError(
            f"queries must be (a multiple of {heads}, {head_dim}), not {tuple(queries.shape)}"
        )
    rows = queries.reshape(heads, -1, head_dim).to(keys.dtype)
    scores = (rows @ keys.mT).float() * scaling
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(values.dtype)  # no key: no column, not NaN
    return (weights @ values).float().view(queries.shape), lse.flatten()


def merge_attention(parts: Sequence[Attention]) -> Attention:
    """Return the attention over all that the parts read, which must be disjoint tokens.

    Args:
        parts: At least one (output (heads, D), lse (heads,)), float32; lse -inf read nothing.

    Raises:
        ValueError: There are no parts.
    """
    if not parts:
        raise ValueError("no parts to merge: attention over no token is zeros with lse -inf")
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    shares = (lses - total.masked_fill(total == float("-inf"), 0.0)).exp()
    return (torch.stack([out for out, _ in parts]) * shares[..., None]).sum(0), total


def turn_back(queries: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Return queries (H, 1, G, D) turned by minus each block's position: (H, N, G, D).

    Rotary pairs are elements i and i + rotary_dim / 2, as in transformers' Llama.
    """
    cos, sin = (table.float()[:, None, :] for table in turns)
    turning, rest = queries.split([cos.shape[-1], queries.shape[-1] - cos.shape[-1]], -1)
    low, high = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([high, -low], -1) * sin
    return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], -1)


def _rows_of(turns: Turns, rows: torch.Tensor) -> Turns:
    return Turns(*(table[rows.to(table.device)] for table in turns))


def _check(queries: torch.Tensor, pages: BlockPages, turns: Turns) -> None:
    heads, head_dim = pages.keys.mean.shape
    if queries.ndim != 2 or queries.shape[1] != head_dim or queries.shape[0] % heads:
        raise ValueError(
            f"queries must be (a multiple of {heads}, {head_dim}), not {tuple(queries.shape)}"
        )
    if turns.cos.shape[0] != pages.offsets.shape[0]:
        raise ValueError(
            f"cos and sin must be ({pages.offsets.shape[0]}, rotary_dim), not "
            f"{tuple(turns.cos.shape)} and {tuple(turns.sin.shape)}"
        )
    _check_numbers(queries, head_dim, turns)


def _check_batch(queries: torch.Tensor, pages: BlockPages, table: PageTable, turns: Turns) -> None:
    heads, head_dim = pages.keys.mean.shape
    wanted = (table.num_sequences, head_dim)
    if (
        queries.ndim != 3
        or (queries.shape[0], queries.shape[2]) != wanted
        or (queries.shape[1] % heads)
    ):
        raise ValueError(
            f"queries must be ({wanted[0]}, a multiple of {heads}, {head_dim}), "
            f"not {tuple(queries.shape)}"
        )
    num_pages, num_places = table.least_rows
    if num_pages > len(pages.offsets) or num_places > turns.cos.shape[0]:
        raise ValueError(
            f"the table names page {num_pages - 1} and place {num_places - 1}, of "
            f"{len(pages.offsets)} pages and {turns.cos.shape[0]} places"
        )
    _check_numbers(queries, head_dim, turns)


def _check_numbers(queries: torch.Tensor, head_dim: int, turns: Turns) -> None:
    cos, sin = turns
    if queries.dtype not in FLOATS:
        raise ValueError(f"queries must be bf16, fp16 or fp32, not {queries.dtype}")
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must both be (blocks, rotary_dim), not {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if cos.shape[1] % 2 or cos.shape[1] > head_dim:
        raise ValueError(f"rotary_dim must be even and at most {head_dim}, not {cos.shape[1]}")
