# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention over compressed blocks on GPU: one program per KV head and range of blocks.

A program decodes a quarter of a block of one head in registers, in transform coordinates, and
multiplies
by all query heads of the group at once; ranges are put together afterwards (split K, as in
FlashDecoding). Nothing expanded goes to memory.
"""

import importlib

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.attend_blocks import Attention, BlockPages, SideTables, Turns, turn_back
from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.sign_codes import COEFFICIENTS, FINE_LEVELS, MAX_WIDTH

layout = importlib.import_module("kvstrata.kernels.attend_blocks")  # not the function
WORDS, MASKS, MID = (tl.constexpr(c) for c in (layout.WORDS, layout.MASKS, layout.MID))
SCALES, CODES = tl.constexpr(layout.SCALES), tl.constexpr(layout.CODES)
SIDE, FIELDS = tl.constexpr(layout.SIDE_FIELDS), tl.constexpr(layout.NUM_FIELDS)
STEPS, BIASES = tl.constexpr(layout.BIAS_STEPS), tl.constexpr(layout.BIAS_CODES)
PLANES = tl.constexpr(MAX_WIDTH)
TILE = tl.constexpr(16)  # tokens decoded at once
_MIN_ROWS = 16  # of a matrix product
_PROGRAMS = 512  # about four for each multiprocessor of a large GPU


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
def _components(
    arena, words_at, mid_at, mids, tokens, c, widths, counts, mid_count, coefficients, fine
):
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
        coefficient = tl.load(coefficients + widths * PLANES + plane, mask=inside, other=0.0)
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
    levels = tl.load(fine + starts[None, :] + 4 * codes + quarters, mask=refined, other=0.0)
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
def attend_blocks_kernel(
    arena, offsets, num_tokens, row_starts, projected, turned, constants,
    key_widths, key_counts, key_mids, key_words,
    value_widths, value_counts, value_mids, value_words, value_scale,
    coefficients, fine, steps, out_sums, out_escaped, out_stats,
    num_blocks, num_heads, group, columns, blocks_per_program,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Attend with one KV head's queries to a range of blocks.

    Roofline: reads what is stored, 2.08 bits per element of K and V at `balanced`, so 32k tokens of
    8 heads of 128 are 17.4 MB a layer: 5.2 us at 3.35 TB/s, against 40 us for bf16. About 12
    integer operations per element decode it (67 M elements: 0.8 G operations, 13 us at the
    67 T operations/s of an H100's CUDA cores), so decoding bounds it, not memory; the products
    take 4 ROWS operations per element, in tensor cores (TF32).

    Args:
        arena: uint8; with the next three as ``BlockPages`` has them.
        offsets: int64 (N, NUM_FIELDS).
        num_tokens: int64 (N,).
        row_starts: int64 (N, 2, 2, H + 1).
        projected: float32 (H, N, G, columns), turned and scaled queries, in transform coordinates.
        turned: float32 (H, N, G, D), the same in Hadamard coordinates.
        constants: float32 (H, N, G), their products with the mean key.
        key_widths: int32 (H, D).
        key_counts: int64 (H, PLANES).
        key_mids: int64 (H,).
        key_words: int64 (H + 1,), first word of each head.
        value_widths: int32 (H, D).
        value_counts: int64 (H, PLANES).
        value_mids: int64 (H,).
        value_words: int64 (H + 1,).
        value_scale: float32 (H, D).
        coefficients: float32 (PLANES + 1, PLANES).
        fine: float32, the levels of all widths.
        steps: float32 (256,), steps of the biases.
        out_sums: float32 (programs, H, G, D), in transform coordinates, times scale, with biases.
        out_escaped: float32 (programs, H, G, D), in Hadamard coordinates.
        out_stats: float32 (programs, H, G, 3): largest score, sum of weights, of planed weights.
        num_blocks: N.
        num_heads: H.
        group: G.
        columns: Of ``projected``.
        blocks_per_program: Length of a range.
        DIM: D.
        BLOCK_D: D up to a power of two.
        ROWS: G up to a power of two, at least 16.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    c, g = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    in_dim = c < DIM
    wide = head.to(tl.int64)
    k_widths = tl.load(key_widths + wide * DIM + c, mask=in_dim, other=0)
    v_widths = tl.load(value_widths + wide * DIM + c, mask=in_dim, other=0)
    k_mid_count, v_mid_count = tl.load(key_mids + head), tl.load(value_mids + head)
    k_counts, v_counts = key_counts + head * PLANES, value_counts + head * PLANES
    k_first, v_first = tl.load(key_words + head), tl.load(value_words + head)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    biases = tl.zeros((ROWS, BLOCK_D), tl.float32)
    escaped = tl.zeros((ROWS, BLOCK_D), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total, planed = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    begin = part * blocks_per_program
    for block in range(begin, tl.minimum(begin + blocks_per_program, num_blocks)):
        wide_block = block + wide * 0
        at = offsets + wide_block * FIELDS
        rows_at = row_starts + wide_block * 4 * (num_heads + 1) + head
        k_masks = (arena + tl.load(at + MASKS)).to(tl.pointer_type(tl.uint64)) + head
        v_masks = (arena + tl.load(at + SIDE + MASKS)).to(tl.pointer_type(tl.uint64)) + head
        k_escape, k_mid = tl.load(k_masks), tl.load(k_masks + num_heads)
        v_escape, v_mid = tl.load(v_masks), tl.load(v_masks + num_heads)
        dropped = (k_escape & k_mid) | (v_escape & v_mid)
        count = tl.load(num_tokens + block)
        k_mid_at, v_mid_at = tl.load(at + MID), tl.load(at + SIDE + MID)
        # Without MID rows, mid tokens have their base values.
        k_mids = (k_mid & ~k_escape) * (k_mid_at >= 0).to(tl.uint64)
        v_mids = (v_mid & ~v_escape) * (v_mid_at >= 0).to(tl.uint64)
        k_mid_row = k_mid_at + tl.load(rows_at + num_heads + 1)
        v_mid_row = v_mid_at + tl.load(rows_at + 3 * (num_heads + 1))
        k_row, v_row = tl.load(rows_at), tl.load(rows_at + 2 * (num_heads + 1))
        k_words = tl.load(at + WORDS) + 8 * k_first
        v_words = tl.load(at + SIDE + WORDS) + 8 * v_first
        row = (wide * num_blocks + block) * group + g
        in_group = g < group
        wanted = in_group[:, None] & (c < columns)[None, :]
        query = tl.load(projected + row[:, None] * columns + c[None, :], wanted, other=0.0)
        wanted = in_group[:, None] & in_dim[None, :]
        query_turned = tl.load(turned + row[:, None] * DIM + c[None, :], wanted, other=0.0)
        constant = tl.load(constants + row, in_group, other=0.0)
        step = tl.load(steps + tl.load(arena + tl.load(at + STEPS) + head).to(tl.int32))
        half = DIM // 2
        packed = tl.load(
            arena + tl.load(at + BIASES) + wide * half + tl.where(c < half, c, c - half),
            mask=in_dim,
            other=0,
        ).to(tl.int32)
        bias = (tl.where(c < half, packed & 15, packed >> 4) - 8).to(tl.float32) * step
        for first in range(0, count.to(tl.int32), TILE):
            tokens = first + tl.arange(0, TILE)
            valid = (tokens < count) & ~_has(dropped, tokens)
            y = _components(
                arena, k_words, k_mid_row, k_mids, tokens, c, k_widths,
                k_counts, k_mid_count, coefficients, fine,
            )  # fmt: skip
            rows = _escapes(
                arena, tl.load(at + SCALES) + 2 * k_row, tl.load(at + CODES) + DIM * k_row,
                k_escape & ~k_mid, tokens, c, DIM,
            )  # fmt: skip
            scores = tl.dot(query, tl.trans(y), input_precision="tf32") + constant[:, None]
            of_escapes = tl.dot(query_turned, tl.trans(rows), input_precision="tf32")
            scores = tl.where(_has(k_escape, tokens)[None, :], of_escapes, scores)
            scores = tl.where(valid[None, :], scores, float("-inf"))
            top = tl.maximum(largest, tl.max(scores, 1))
            safe = tl.where(top == float("-inf"), 0.0, top)
            decay = tl.exp(largest - safe)
            weights = tl.exp(scores - safe[:, None])
            largest = top
            total = total * decay + tl.sum(weights, 1)
            is_escape = _has(v_escape, tokens)[None, :]
            of_planes = tl.where(is_escape, 0.0, weights)
            planed = planed * decay + tl.sum(of_planes, 1)
            is_base = ~_has(v_escape | v_mid, tokens)[None, :]
            mass = tl.sum(tl.where(is_base, weights, 0.0), 1)
            biases = biases * decay[:, None] + mass[:, None] * bias[None, :]
            y = _components(
                arena, v_words, v_mid_row, v_mids, tokens, c, v_widths,
                v_counts, v_mid_count, coefficients, fine,
            )  # fmt: skip
            sums = sums * decay[:, None] + tl.dot(of_planes, y, input_precision="tf32")
            rows = _escapes(
                arena, tl.load(at + SIDE + SCALES) + 2 * v_row,
                tl.load(at + SIDE + CODES) + DIM * v_row, v_escape & ~v_mid, tokens, c, DIM,
            )  # fmt: skip
            of_escapes = tl.where(is_escape, weights, 0.0)
            escaped = escaped * decay[:, None]
            escaped += tl.dot(of_escapes, rows, input_precision="tf32")
    scale = tl.load(value_scale + wide * DIM + c, mask=in_dim, other=0.0)
    row = (part.to(tl.int64) * num_heads + head) * group + g
    wanted = (g < group)[:, None] & in_dim[None, :]
    cells = row[:, None] * DIM + c[None, :]
    tl.store(out_sums + cells, sums * scale[None, :] + biases, mask=wanted)
    tl.store(out_escaped + cells, escaped, mask=wanted)
    tl.store(out_stats + row * 3, largest, mask=g < group)
    tl.store(out_stats + row * 3 + 1, total, mask=g < group)
    tl.store(out_stats + row * 3 + 2, planed, mask=g < group)


def attend_blocks_triton(
    queries: torch.Tensor, pages: BlockPages, turns: Turns, scaling: float
) -> Attention:
    """Return what ``attend_blocks_reference`` returns, up to the rounding of TF32 products."""
    heads, dim = pages.keys.mean.shape
    num_blocks, device = pages.offsets.shape[0], queries.device
    grouped = (queries.float() * scaling).reshape(heads, 1, -1, dim)
    rows = turn_back(grouped, turns).flatten(1, 2)
    group = grouped.shape[2]
    projected = rows @ pages.keys.projection
    constants = rows @ pages.keys.mean[..., None]
    mirrored = rows @ hadamard(dim).to(device)
    programs = max(1, min(num_blocks, _PROGRAMS // heads))
    per_program = -(-num_blocks // programs)
    programs = -(-num_blocks // per_program)
    sums = torch.empty(programs, heads, group, dim, device=device)
    escaped = torch.empty_like(sums)
    stats = torch.empty(programs, heads, group, 3, device=device)
    attend_blocks_kernel[heads, programs](
        pages.arena, pages.offsets.to(device), pages.num_tokens.to(device),
        pages.starts.to(device), projected, mirrored.contiguous(), constants,
        *_tables_of(pages.keys)[:4], *_tables_of(pages.values), *_constants(device), sums, escaped,
        stats, num_blocks, heads, group, projected.shape[-1], per_program,
        DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)), num_warps=8,
    )  # fmt: skip
    largest, total, planed = stats.unbind(-1)
    top = largest.amax(0)
    shares = (largest - top.masked_fill(top == float("-inf"), 0.0)).exp()
    norm = (shares * total).sum(0)
    shares = shares / norm.clamp_min(torch.finfo(torch.float32).tiny)
    values = pages.values
    out = (sums * shares[..., None]).sum(0) @ values.inverse
    out += (planed * shares).sum(0)[..., None] * values.mean[:, None]
    out += (escaped * shares[..., None]).sum(0) @ hadamard(dim).to(device)
    return out.flatten(0, 1), (top + norm.log()).flatten()


def _tables_of(tables: SideTables) -> tuple[torch.Tensor, ...]:
    widths, counts = tables.layout.widths.int().contiguous(), tables.layout.plane_sizes.contiguous()
    mids, words = tables.layout.mid_counts.long().contiguous(), tables.word_starts
    return widths, counts, mids, words, tables.scale.contiguous()


def _constants(device: torch.device) -> tuple[torch.Tensor, ...]:
    padded = [[*row, *[0.0] * (MAX_WIDTH - len(row))] for row in COEFFICIENTS]
    fine = [level for levels in FINE_LEVELS for level in levels]
    return tuple(
        torch.tensor(table, dtype=torch.float32, device=device)
        for table in (padded, fine, layout.bias_steps().tolist())
    )


def _case(dim: int, rows: int) -> AotCase:
    names = attend_blocks_kernel.arg_names
    kinds = dict.fromkeys(names[:22], "*fp32") | dict.fromkeys(names[22:27], "i32")
    kinds |= {"arena": "*u8", "key_widths": "*i32", "value_widths": "*i32"}
    longs = ("offsets", "num_tokens", "row_starts", "key_counts", "key_mids", "key_words")
    kinds |= dict.fromkeys((*longs, "value_counts", "value_mids", "value_words"), "*i64")
    return AotCase(
        f"dim{dim}",
        attend_blocks_kernel,
        kinds,
        {"DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "ROWS": rows},
        num_warps=8,
        max_registers=255,
        max_shared_bytes=96 * 1024,
        wide_loads=False,  # one word serves 64 tokens: loads are of 8 bytes, and few
    )


AOT = (_case(64, 16), _case(96, 16), _case(128, 16))
