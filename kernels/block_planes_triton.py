# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Bit planes on a GPU: one program packs, or unpacks, 64 tokens of some components.

Neighbouring threads hold neighbouring components, so tokens are read and written in whole lines and
the words of a plane too. ``read_components`` is what every kernel that reads planes is made of.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.block_planes import MidRows, PlaneLayout
from kvstrata.kernels.sign_codes import (
    COEFFICIENTS,
    FINE_LEVELS,
    GRID_SIZE,
    MAX_WIDTH,
    base_levels,
    code_table,
)
from kvstrata.kernels.token_masks import TOKENS

_GRID, _PLANES, _LEVELS = tl.constexpr(GRID_SIZE), tl.constexpr(MAX_WIDTH), tl.constexpr(64)
_BLOCK = 16


@cache
def coefficients(device: torch.device) -> torch.Tensor:
    """Return float32 (7, 6): the coefficients of each width."""
    rows = [[*c, *[0.0] * (MAX_WIDTH - len(c))] for c in COEFFICIENTS]
    return torch.tensor(rows, dtype=torch.float32, device=device)


@cache
def fine_tables(device: torch.device) -> torch.Tensor:
    """Return float32: the fine levels of every width, those of width w from 4 * (2 ** w - 1) on."""
    levels = [level for levels in FINE_LEVELS for level in levels]
    return torch.tensor(levels, dtype=torch.float32, device=device)


@cache
def code_tables(device: torch.device) -> torch.Tensor:
    """Return uint8 (7, GRID_SIZE): the fine code of each cell of the grid, by width."""
    return torch.stack([code_table(w) for w in range(MAX_WIDTH + 1)]).to(device)


@cache
def base_tables(device: torch.device) -> torch.Tensor:
    """Return float32 (7, 64): the base level of each code, by width."""
    table = torch.zeros(MAX_WIDTH + 1, 1 << MAX_WIDTH)
    for width in range(MAX_WIDTH + 1):
        table[width, : 1 << width] = base_levels(width)
    return table.to(device)


def encode_block_planes_triton(
    y: torch.Tensor, layout: PlaneLayout, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``encode_block_planes_reference`` returns."""
    heads, blocks, _, dim = y.shape
    words = torch.empty((blocks, layout.num_words), dtype=torch.int64, device=y.device)
    error = torch.empty(y.shape[:3], dtype=torch.float32, device=y.device)
    if blocks:
        _encode[(blocks, heads)](
            y.contiguous(), weights.contiguous(), layout.widths.contiguous(), layout.word_offsets,
            code_tables(y.device), base_tables(y.device), words, error,
            dim, layout.num_words, _BLOCK,
        )  # fmt: skip
    return words, error


@triton.jit
def write_words(value, codes, levels, words, offsets, width, c, t):
    """Write some components of 64 tokens of a block; return values less what was written.

    Args:
        value: float32 (tokens, components).
        codes: ``code_tables``.
        levels: ``base_tables``.
        words: Pointer to the block's words.
        offsets: Pointer to the head's six offsets.
        width: int32, of each component; 0 beyond head_dim.
        c: Components, ascending.
        t: Tokens.
    """
    cell = tl.floor(value * 128.0 + _GRID // 2)
    cell = tl.minimum(tl.maximum(cell, 0.0), _GRID - 1.0).to(tl.int32)
    code = tl.load(codes + width[None, :] * _GRID + cell).to(tl.int32) >> 2
    for plane in tl.static_range(_PLANES):
        shift = tl.maximum(width - 1 - plane, 0)
        bits = ((code >> shift[None, :]) & 1).to(tl.int64) << t[:, None].to(tl.int64)
        tl.store(words + tl.load(offsets + plane) + c, tl.sum(bits, 0), mask=width > plane)
    return value - tl.load(levels + width[None, :] * _LEVELS + code)


@triton.jit
def _encode(
    y, weights, widths, offsets, codes, levels, words, error, dim, num_words, size: tl.constexpr
):
    """Encode one head of one block.

    Roofline: reads 2 bytes of bf16 and writes width / 8 per element, 20 operations and two reads
    of tables in cache. Llama-3-8B, one layer's keys of 128k tokens: 268 MB + 20 MB, 86 us at
    3.35 TB/s.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = tl.arange(0, 64)
    row = (h * tl.num_programs(0) + n) * 64 + t
    loss = tl.zeros([64], tl.float32)
    for start in range(0, dim, size):
        c = start + tl.arange(0, size)
        inside = c < dim
        width = tl.load(widths + h * dim + c, mask=inside, other=0).to(tl.int32)
        value = tl.load(y + row[:, None] * dim + c[None, :], mask=inside[None, :], other=0.0)
        rest = write_words(
            value.to(tl.float32), codes, levels, words + n * num_words, offsets + h * _PLANES,
            width, c, t,
        )  # fmt: skip
        weight = tl.load(weights + h * dim + c, mask=inside, other=0.0)
        loss += tl.sum(weight[None, :] * rest * rest, 1)
    tl.store(error + row, loss)


@triton.jit
def has_token(mask, tokens):
    """Return whether each token is in the uint64 mask."""
    return ((mask >> tokens.to(tl.uint64)) & 1) == 1


@triton.jit
def rank_of(mask, tokens):
    """Return, as int32, how many bits of the uint64 mask lie below each token's."""
    x = mask & ((tl.full(tokens.shape, 1, tl.uint64) << tokens.to(tl.uint64)) - 1)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return ((x + (x >> 32)) & 0x7F).to(tl.int32)


@triton.jit
def read_components(
    words, offsets, coefficients, fine, rows, mids, ranks, mid_count, width, c, t,
    REFINED: tl.constexpr,
):  # fmt: skip
    """Return float32 values (tokens, components) of one head of one block.

    Args:
        words: Pointer to the block's words.
        offsets: Pointer to the head's six offsets.
        coefficients: ``coefficients``.
        fine: ``fine_tables``; read, like the next four, if REFINED.
        rows: Pointer to the head's mid rows in this block.
        mids: uint64, the tokens that have a row.
        ranks: ``rank_of(mids, t)``.
        mid_count: int32, components in a row.
        width: int32, of each component; 0 beyond head_dim.
        c: Components, ascending.
        t: Tokens.
        REFINED: Whether mid tokens get their fine values.
    """
    value = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
    code = tl.zeros([t.shape[0], c.shape[0]], tl.int32)
    for plane in range(tl.max(width)):
        present = width > plane
        word = tl.load(words + tl.load(offsets + plane) + c, mask=present, other=0)
        step = tl.load(coefficients + width * _PLANES + plane, mask=present, other=0.0)
        bit = ((word[None, :] >> t[:, None].to(tl.int64)) & 1).to(tl.int32)
        value += tl.where(bit != 0, step[None, :], -step[None, :])
        if REFINED:
            code = tl.where(present[None, :], 2 * code + bit, code)
    if REFINED:
        value = _refine(value, code, fine, rows, mids, ranks, mid_count, width, c, t)
    return value


@triton.jit
def _refine(value, code, fine, rows, mids, ranks, mid_count, width, c, t):
    """Return the values with those of mid tokens replaced by the fine ones."""
    if (mids != 0) & (tl.min(c) < mid_count):
        refined = has_token(mids, t)[:, None] & (c < mid_count)[None, :]
        byte = rows + (ranks * (mid_count // 4))[:, None] + (c // 8)[None, :]
        high = tl.load(byte, mask=refined, other=0).to(tl.int32)
        low = tl.load(byte + mid_count // 8, mask=refined, other=0).to(tl.int32)
        bit = (c % 8)[None, :]
        quarter = 2 * ((high >> bit) & 1) + ((low >> bit) & 1)
        at = 4 * ((1 << width) - 1)[None, :] + 4 * code + quarter
        value = tl.where(refined, tl.load(fine + at, mask=refined, other=0.0), value)
    return value


def decode_block_planes_triton(
    words: torch.Tensor, layout: PlaneLayout, mid: MidRows | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return what ``decode_block_planes_reference`` returns."""
    blocks, kept = words.shape[0], layout.num_kept(refined=mid is not None)
    y = torch.empty((layout.num_heads, blocks * TOKENS, kept), dtype=dtype, device=words.device)
    if blocks:
        _decode[(blocks, layout.num_heads, triton.cdiv(kept, _BLOCK))](
            words.contiguous(), layout.widths.contiguous(), layout.word_offsets,
            coefficients(words.device), fine_tables(words.device), *mid_arguments(mid, layout),
            y, layout.dim, layout.num_words, kept, _BLOCK, mid is not None,
        )  # fmt: skip
    return y


def mid_arguments(mid: MidRows | None, layout: PlaneLayout) -> tuple[torch.Tensor | None, ...]:
    """Return masks, rows, starts and counts as kernels read them; None for what is not there."""
    if mid is None:
        return None, None, None, None
    starts = layout.mid_starts(mid.masks)
    return mid.masks.contiguous(), mid.rows.contiguous(), starts, layout.mid_counts.long()


@triton.jit
def _decode(
    words, widths, offsets, coefficients, fine, masks, rows, starts, counts,
    y, dim, num_words, kept, size: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    """Decode some components of one head of one block.

    Roofline: reads width / 8 bytes and writes 2 bytes of bf16 per element, 6 operations per bit.
    Llama-3-8B, one layer's keys of 128k tokens: 20 MB + 268 MB, 86 us at 3.35 TB/s. Refining an
    eighth of the tokens reads a quarter of a byte of each of their elements more: 4 MB, 1 us.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c, t = tl.program_id(2) * size + tl.arange(0, size), tl.arange(0, 64)
    width = tl.load(widths + h * dim + c, mask=c < kept, other=0).to(tl.int32)
    item = h * tl.num_programs(0) + n
    mids, ranks, mid_count = tl.full([], 0, tl.uint64), t, 0
    if REFINED:
        mids = tl.load(masks + item).to(tl.uint64)
        ranks = rank_of(mids, t)
        rows += tl.load(starts + n * tl.num_programs(1) + h)
        mid_count = tl.load(counts + h).to(tl.int32)
    value = read_components(
        words + n * num_words, offsets + h * _PLANES, coefficients, fine, rows, mids, ranks,
        mid_count, width, c, t, REFINED,
    )  # fmt: skip
    place = y + item * 64 * kept + t[:, None] * kept + c[None, :]
    tl.store(place, value.to(y.dtype.element_ty), mask=(c < kept)[None, :])


_ENCODE_TYPES = {
    "y": "*bf16", "weights": "*fp32", "widths": "*u8", "offsets": "*i64", "codes": "*u8",
    "levels": "*fp32", "words": "*i64", "error": "*fp32", "dim": "i32", "num_words": "i32",
}  # fmt: skip
_DECODE_TYPES = {
    "words": "*i64", "widths": "*u8", "offsets": "*i64", "coefficients": "*fp32", "fine": "*fp32",
    "masks": "*i64", "rows": "*u8", "starts": "*i64", "counts": "*i64", "y": "*bf16",
    "dim": "i32", "num_words": "i32", "kept": "i32",
}  # fmt: skip
_NO_MID = dict.fromkeys(("masks", "rows", "starts", "counts"))
AOT = (
    AotCase("encode", _encode, _ENCODE_TYPES, {"size": _BLOCK}, divisible=("dim",)),
    AotCase(
        "decode", _decode, {k: v for k, v in _DECODE_TYPES.items() if k not in _NO_MID},
        {"size": _BLOCK, "REFINED": False, **_NO_MID}, divisible=("dim", "kept"),
        wide_loads=False,
    ),
    AotCase(
        "decode_refined", _decode, _DECODE_TYPES, {"size": _BLOCK, "REFINED": True},
        divisible=("dim", "kept"), wide_loads=False,
    ),
)  # fmt: skip
