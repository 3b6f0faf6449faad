# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention over compressed blocks on GPU: scores of all tokens, then their values.

A program decodes 16 tokens of one head in registers, in transform coordinates, and multiplies by
all query heads of the group at once. Scores go through memory, 4 bytes each, because one kernel
that decodes both keys and values spills registers on gfx942; ranges of blocks are put together
afterwards (split K, as in FlashDecoding). Nothing expanded goes to memory. The blocks of all
sequences of a batch lie behind each other; a range belongs to one sequence.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from kvstrata.kernels import block_pages as layout
from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.attend_blocks import Attention, bias_steps, turn_back
from kvstrata.kernels.attend_merge_triton import STATE, merge_parts
from kvstrata.kernels.attend_ranges import ranges_of
from kvstrata.kernels.block_pages import BlockPages, PageTable, SideTables, Turns
from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.sign_codes import COEFFICIENTS, FINE_LEVELS, MAX_WIDTH

WORDS, MASKS, MID = (tl.constexpr(c) for c in (layout.WORDS, layout.MASKS, layout.MID))
SCALES, CODES = tl.constexpr(layout.SCALES), tl.constexpr(layout.CODES)
SIDE, FIELDS = tl.constexpr(layout.SIDE_FIELDS), tl.constexpr(layout.NUM_FIELDS)
STEPS, BIASES = tl.constexpr(layout.BIAS_STEPS), tl.constexpr(layout.BIAS_CODES)
PLANES = tl.constexpr(MAX_WIDTH)
COEFFICIENTS_AT = tl.constexpr(256)  # in the tables, after the steps
FINE_AT = tl.constexpr(256 + (MAX_WIDTH + 1) * MAX_WIDTH)
TILE = tl.constexpr(16)  # tokens decoded at once
_MIN_ROWS = 16  # of a matrix product
_WARPS, _VALUE_WARPS_NVIDIA = 4, 8  # with 4 the sum over values spills on sm_80, with 8 on gfx942


@triton.jit
def _rank(mask, tokens):
    """Return how many bits of the mask lie below each token's."""
    x = mask & ((tl.full(tokens.shape, 1, tl.uint64) << tokens.to(tl.uint64)) - 1)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return ((x + (x >> 32)) & 0x7F).to(tl.int64)


@triton.jit
def _has(mask, tokens):
    return ((mask >> tokens.to(tl.uint64)) & 1) == 1


@triton.jit
def _components(arena, words_at, mid_at, mids, tokens, c, widths, counts, mid_count, tables):
    """Return components (TILE, BLOCK_D) of a tile of tokens, refined where they are mid."""
    words = (arena + words_at).to(tl.pointer_type(tl.uint64))
    y = tl.zeros((tokens.shape[0], c.shape[0]), tl.float32)
    codes = tl.zeros((tokens.shape[0], c.shape[0]), tl.int32)
    shift = tokens.to(tl.uint64)[:, None]
    at = tl.load(counts) * 0
    for plane in range(tl.max(widths)):
        count = tl.load(counts + plane)
        inside = c < count
        word = tl.load(words + at + c, mask=inside, other=0)
        bits = ((word[None, :] >> shift) & 1).to(tl.int32)
        coefficient = tl.load(
            tables + COEFFICIENTS_AT + widths * PLANES + plane, mask=inside, other=0.0
        )
        y += (2 * bits - 1).to(tl.float32) * coefficient[None, :]
        codes = tl.where(inside[None, :], 2 * codes + bits, codes)
        at += count
    refined = _has(mids, tokens)[:, None] & (c < mid_count)[None, :]
    row = arena + mid_at + _rank(mids, tokens) * (mid_count // 4)
    byte = row[:, None] + (c // 8)[None, :]
    high = tl.load(byte, mask=refined, other=0).to(tl.int32)
    low = tl.load(byte + mid_count // 8, mask=refined, other=0).to(tl.int32)
    bit = (c % 8)[None, :]
    quarters = 2 * ((high >> bit) & 1) + ((low >> bit) & 1)
    starts = 4 * ((1 << widths) - 1)
    levels = tl.load(
        tables + FINE_AT + starts[None, :] + 4 * codes + quarters, mask=refined, other=0.0
    )
    return tl.where(refined, levels, y)


@triton.jit
def _escapes(arena, scales_at, codes_at, mask, tokens, c, DIM: tl.constexpr):
    """Return escaped rows (TILE, BLOCK_D) in Hadamard coordinates, zero elsewhere."""
    is_escape = _has(mask, tokens)
    rank = _rank(mask, tokens)
    bits = tl.load((arena + scales_at).to(tl.pointer_type(tl.uint16)) + rank, is_escape, other=0)
    scale = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    inside = is_escape[:, None] & (c < DIM)[None, :]
    codes = tl.load(
        (arena + codes_at).to(tl.pointer_type(tl.int8)) + rank[:, None] * DIM + c[None, :],
        mask=inside,
        other=0,
    )
    return codes.to(tl.float32) * scale[:, None]


@triton.jit
def score_blocks_kernel(
    arena, offsets, num_tokens, row_starts, projected, turned, constants,
    key_widths, key_counts, tables, out_scores,
    num_blocks, num_heads, group, columns,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the scores of one KV head's queries for the tokens of one block, -inf for the hidden.

    Roofline: reads what is stored of K, about 1.3 bits per element at `balanced` (mid rows and
    escapes included), the queries once per block (8 G D bytes) and writes 256 G bytes of scores:
    32k tokens of 8 heads of 128 with G = 4 are 4096 programs, 5.5 + 16.8 + 4.2 MB a layer: 7.9 us
    at 3.35 TB/s, against 20 us for bf16 keys. About 12 integer operations per element decode it
    (34 M elements: 0.4 G operations, 6 us at the 67 T operations/s of an H100's CUDA cores); the
    products take 4 ROWS operations per element, in tensor cores (TF32).

    Args:
        arena: uint8; with the next three as ``BlockPages`` has them.
        offsets: int64 (N, NUM_FIELDS).
        num_tokens: int64 (N,).
        row_starts: int64 (N, 2, 2, H + 1).
        projected: float32 (H, N, G, columns), turned and scaled queries, in transform coordinates.
        turned: float32 (H, N, G, D), the same in Hadamard coordinates.
        constants: float32 (H, N, G), their products with the mean key.
        key_widths: int32 (H, D).
        key_counts: int64 (H, PLANES + 2): words of each plane, refined components, first word.
        tables: float32, steps of biases, coefficients (PLANES + 1, PLANES), fine levels.
        out_scores: float32 (H, N, G, 64).
        num_blocks: N.
        num_heads: H.
        group: G.
        columns: Of ``projected``.
        DIM: D.
        BLOCK_D: D up to a power of two.
        ROWS: G up to a power of two, at least 16.
    """
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, g = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    in_dim, in_group = c < DIM, g < group
    wide = head.to(tl.int64)
    widths = tl.load(key_widths + wide * DIM + c, mask=in_dim, other=0)
    counts = key_counts + head * (PLANES + 2)
    mid_count = tl.load(counts + PLANES)
    at, rows_at = offsets + block * FIELDS, row_starts + block * 4 * (num_heads + 1) + head
    masks = (arena + tl.load(at + MASKS)).to(tl.pointer_type(tl.uint64)) + head
    escape, mid = tl.load(masks), tl.load(masks + num_heads)
    masks = (arena + tl.load(at + SIDE + MASKS)).to(tl.pointer_type(tl.uint64)) + head
    dropped = (escape & mid) | (tl.load(masks) & tl.load(masks + num_heads))
    count, mid_at = tl.load(num_tokens + block), tl.load(at + MID)
    # Without MID rows, mid tokens have their base values.
    mids = (mid & ~escape) * (mid_at >= 0).to(tl.uint64)
    mid_row = mid_at + tl.load(rows_at + num_heads + 1)
    escape_row = tl.load(rows_at)
    words = tl.load(at + WORDS) + 8 * tl.load(counts + PLANES + 1)
    row = (wide * num_blocks + block) * group + g
    wanted = in_group[:, None] & (c < columns)[None, :]
    query = tl.load(projected + row[:, None] * columns + c[None, :], wanted, other=0.0)
    wanted = in_group[:, None] & in_dim[None, :]
    constant = tl.load(constants + row, in_group, other=0.0)
    for first in range(0, 64, TILE):
        tokens = first + tl.arange(0, TILE)
        y = _components(arena, words, mid_row, mids, tokens, c, widths, counts, mid_count, tables)
        scores = tl.dot(query, tl.trans(y), input_precision="tf32") + constant[:, None]
        is_escape = _has(escape & ~mid, tokens)
        if tl.max(is_escape.to(tl.int32)) > 0:
            rows = _escapes(
                arena, tl.load(at + SCALES) + 2 * escape_row,
                tl.load(at + CODES) + DIM * escape_row, escape & ~mid, tokens, c, DIM,
            )  # fmt: skip
            mirrored = tl.load(turned + row[:, None] * DIM + c[None, :], wanted, other=0.0)
            of_escapes = tl.dot(mirrored, tl.trans(rows), input_precision="tf32")
            scores = tl.where(is_escape[None, :], of_escapes, scores)
        valid = (tokens < count) & ~_has(dropped, tokens)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        tl.store(out_scores + row[:, None] * 64 + tokens[None, :], scores, in_group[:, None])


@triton.jit
def sum_values_kernel(
    arena, offsets, row_starts, scores_of,
    value_widths, value_counts, value_scale, tables, ranges, out,
    num_blocks, num_heads, group,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weigh the values of one KV head in a range of blocks by the softmax of their scores.

    Roofline: reads what is stored of V, about 1.7 bits per element at `balanced`, and 256 G bytes
    of scores per head and block: 32k tokens of 8 heads of 128 with G = 4 are 7.1 + 4.2 MB a layer:
    3.4 us at 3.35 TB/s, against 20 us for bf16 values. Decoding takes about 12 integer operations
    per element, 6 us as in ``score_blocks_kernel``, so it bounds this, not memory.

    Args:
        arena: uint8; with the next two as ``BlockPages`` has them.
        offsets: int64 (N, NUM_FIELDS).
        row_starts: int64 (N, 2, 2, H + 1).
        scores_of: float32 (H, N, G, 64), -inf for what is not read.
        value_widths: int32 (H, D).
        value_counts: As ``score_blocks_kernel`` has ``key_counts``.
        value_scale: float32 (H, D).
        tables: As ``score_blocks_kernel`` has them.
        ranges: int32 (programs, 2), the first block of each range and the one behind its last.
        out: float32 (programs, H, G, 2 D + 3): sums in transform coordinates, times scale, with
            biases; sums of escapes in Hadamard coordinates; sum of planed weights; largest score,
            sum of weights.
        num_blocks: N.
        num_heads: H.
        group: G.
        DIM: D.
        BLOCK_D: D up to a power of two.
        ROWS: G up to a power of two, at least 16.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    c, g = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    in_dim, in_group = c < DIM, g < group
    wide = head.to(tl.int64)
    widths = tl.load(value_widths + wide * DIM + c, mask=in_dim, other=0)
    scale = tl.load(value_scale + wide * DIM + c, mask=in_dim, other=0.0)
    counts = value_counts + head * (PLANES + 2)
    mid_count, first_word = tl.load(counts + PLANES), tl.load(counts + PLANES + 1)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    escaped = tl.zeros((ROWS, BLOCK_D), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total, planed = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    half = DIM // 2
    bias_at, bias_shift = wide * half + c % half, c // half * 4  # from D on what is not stored
    for block in range(tl.load(ranges + 2 * part), tl.load(ranges + 2 * part + 1)):
        wide_block = block + wide * 0
        fields = offsets + wide_block * FIELDS
        at = fields + SIDE
        rows_at = row_starts + (wide_block * 4 + 2) * (num_heads + 1) + head
        masks = (arena + tl.load(at + MASKS)).to(tl.pointer_type(tl.uint64)) + head
        escape, mid = tl.load(masks), tl.load(masks + num_heads)
        mid_at = tl.load(at + MID)
        mids = (mid & ~escape) * (mid_at >= 0).to(tl.uint64)
        mid_row, escape_row = mid_at + tl.load(rows_at + num_heads + 1), tl.load(rows_at)
        words = tl.load(at + WORDS) + 8 * first_word
        row = (wide * num_blocks + wide_block) * group + g
        step = tl.load(tables + tl.load(arena + tl.load(fields + STEPS) + head).to(tl.int32))
        for first in range(0, 64, TILE):
            tokens = first + tl.arange(0, TILE)
            cells = row[:, None] * 64 + tokens[None, :]
            scores = tl.load(scores_of + cells, in_group[:, None], other=float("-inf"))
            top = tl.maximum(largest, tl.max(scores, 1))
            safe = tl.where(top == float("-inf"), 0.0, top)
            decay = tl.exp(largest - safe)
            weights = tl.exp(scores - safe[:, None])
            largest = top
            total = total * decay + tl.sum(weights, 1)
            is_escape = _has(escape, tokens)
            of_planes = tl.where(is_escape[None, :], 0.0, weights)
            planed = planed * decay + tl.sum(of_planes, 1)
            y = _components(
                arena, words, mid_row, mids, tokens, c, widths, counts, mid_count, tables
            )
            packed = tl.load(arena + tl.load(fields + BIASES) + bias_at).to(tl.int32)
            bias = ((packed >> bias_shift & 15) - 8).to(tl.float32) * step
            is_base = ~_has(escape | mid, tokens)
            y = y * scale[None, :] + tl.where(is_base[:, None], bias[None, :], 0.0)
            sums = sums * decay[:, None] + tl.dot(of_planes, y, input_precision="tf32")
            escaped = escaped * decay[:, None]
            if tl.max(is_escape.to(tl.int32)) > 0:
                rows = _escapes(
                    arena, tl.load(at + SCALES) + 2 * escape_row,
                    tl.load(at + CODES) + DIM * escape_row, escape & ~mid, tokens, c, DIM,
                )  # fmt: skip
                of_escapes = tl.where(is_escape[None, :], weights, 0.0)
                escaped += tl.dot(of_escapes, rows, input_precision="tf32")
    row = (part.to(tl.int64) * num_heads + head) * group + g
    wanted = in_group[:, None] & in_dim[None, :]
    rows = out + row * (2 * DIM + 3)
    tl.store(rows[:, None] + c[None, :], sums, mask=wanted)
    tl.store(rows[:, None] + (DIM + c)[None, :], escaped, mask=wanted)
    tl.store(rows + 2 * DIM, planed, mask=in_group)
    tl.store(rows + 2 * DIM + 1, largest, mask=in_group)
    tl.store(rows + 2 * DIM + 2, total, mask=in_group)


def attend_blocks_triton(
    queries: torch.Tensor, pages: BlockPages, turns: Turns, scaling: float
) -> Attention:
    """Return what ``attend_blocks_reference`` returns, up to the rounding of TF32 products."""
    table = PageTable.of([range(len(pages.offsets))])
    out, lse = attend_batch_triton(queries[None], pages, table, turns, scaling)
    return out[0], lse[0]


def attend_batch_triton(
    queries: torch.Tensor, pages: BlockPages, table: PageTable, turns: Turns, scaling: float
) -> Attention:
    """Return what ``attend_batch_reference`` returns, up to the rounding of TF32 products.

    Three launches for all sequences. Offsets and the table go to the GPU once, and again after
    ``BlockPages.put``.
    """
    heads, dim = pages.keys.mean.shape
    batch, num_rows, _ = queries.shape
    group, device, plan = num_rows // heads, queries.device, ranges_of(pages, table)
    if not plan.num_blocks or not num_rows:
        out = torch.zeros(queries.shape, device=device)
        return out, out.new_full(out.shape[:2], float("-inf"))
    own = (queries.float() * scaling).view(batch, heads, group, dim)[plan.sequences]
    turned = Turns(*(angles[plan.places] for angles in turns))
    rows = turn_back(own.transpose(0, 1), turned).flatten(1, 2)
    projected = rows @ pages.keys.projection
    constants = rows @ pages.keys.mean[..., None]
    mirrored = rows @ _hadamard(dim, device)
    parts = torch.empty(plan.num_ranges, num_rows, 2 * dim + 1 + STATE, device=device)
    scores = torch.empty(heads, plan.num_blocks, group, layout.BLOCK_TOKENS, device=device)
    tables, values = _constants(device), pages.values
    shape = {
        "DIM": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "ROWS": max(_MIN_ROWS, triton.next_power_of_2(group)),
    }
    score_blocks_kernel[plan.num_blocks, heads](
        pages.arena, plan.offsets, plan.num_tokens, plan.row_starts, projected,
        mirrored.contiguous(), constants, *_tables_of(pages.keys), tables, scores,
        plan.num_blocks, heads, group, projected.shape[-1], **shape, num_warps=_WARPS,
    )  # fmt: skip
    sum_values_kernel[heads, plan.num_ranges](
        pages.arena, plan.offsets, plan.row_starts, scores, *_tables_of(values),
        values.scale.contiguous(), tables, plan.ranges, parts,
        plan.num_blocks, heads, group, **shape,
        num_warps=_WARPS if torch.version.hip else _VALUE_WARPS_NVIDIA,
    )  # fmt: skip
    merged, lse = merge_parts(parts, plan.starts)
    by_head = merged.view(batch, heads, group, -1).transpose(0, 1).flatten(1, 2)
    sums, escaped, planed = by_head.split([dim, dim, 1], -1)
    found = sums @ values.inverse + planed * values.mean[:, None]
    found += escaped @ _hadamard(dim, device)
    out = found.view(heads, batch, group, dim).transpose(0, 1).reshape(queries.shape)
    return out, lse


def _tables_of(tables: SideTables) -> tuple[torch.Tensor, torch.Tensor]:
    layout = tables.layout
    others = (layout.mid_counts.long(), tables.word_starts[:-1])
    counts = torch.cat([layout.plane_sizes, torch.stack(others, 1)], 1)
    return layout.widths.int().contiguous(), counts


@cache
def _hadamard(dim: int, device: torch.device) -> torch.Tensor:
    return hadamard(dim).to(device)


@cache
def _constants(device: torch.device) -> torch.Tensor:
    padded = [x for row in COEFFICIENTS for x in (*row, *[0.0] * (MAX_WIDTH - len(row)))]
    fine = [level for levels in FINE_LEVELS for level in levels]
    steps = bias_steps().tolist()
    return torch.tensor([*steps, *padded, *fine], dtype=torch.float32, device=device)


def _case(name: str, kernel: Any, dim: int) -> AotCase:
    longs = ("offsets", "num_tokens", "row_starts", "key_counts", "value_counts")
    kinds = dict.fromkeys(longs, "*i64")
    kinds |= dict.fromkeys(("num_blocks", "num_heads", "group", "columns"), "i32")
    kinds |= {"arena": "*u8", "ranges": "*i32", "key_widths": "*i32", "value_widths": "*i32"}
    constants = {"DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "ROWS": _MIN_ROWS}
    names = [argument for argument in kernel.arg_names if argument not in constants]
    return AotCase(
        f"{name}_dim{dim}",
        kernel,
        {argument: kinds.get(argument, "*fp32") for argument in names},
        constants,
        num_warps=_VALUE_WARPS_NVIDIA if name == "values" else _WARPS,
        num_warps_amd=_WARPS,
        max_registers=255,
        max_shared_bytes=48 * 1024,
        wide_loads=False,  # one word serves 64 tokens: loads are of 8 bytes, and few
    )


AOT = tuple(
    _case(name, kernel, dim)
    for name, kernel in (("scores", score_blocks_kernel), ("values", sum_values_kernel))
    for dim in (64, 96, 128)
)
