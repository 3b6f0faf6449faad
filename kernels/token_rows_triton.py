# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""``token_rows`` on a GPU: keys are looked up, rotated in registers and scored for all their heads.

A program takes 512 tokens of one KV head of one sequence; ``merge_parts`` puts them together.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.attend_blocks import Attention
from kvstrata.kernels.attend_merge_triton import STATE, merge_parts
from kvstrata.kernels.token_rows import TokenRows, TokenTable

SPLIT_TOKENS = 512
_MIN_ROWS, _TILE_BYTES = 16, 8192  # of a matrix product; of keys at once


@triton.jit
def attend_tokens_kernel(
    queries, keys, values, cos, sin, token_ids, ends, parts, scale, heads, group,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend over some tokens of one KV head of one sequence.

    Roofline: reads 4 D bytes of bf16 and 8 D of angles (from the cache after the first head) per
    token and head, 6 D operations to rotate, 4 ROWS per element in tensor cores. One sequence of
    32k tokens, 8 heads of 128: 134 MB and 34 MB of angles, 50 us at 3.35 TB/s.

    Args:
        queries: (B, H, G, D), the dtype of the table.
        keys: (V, H, D).
        values: (V, H, D).
        cos: float32 (positions, D).
        sin: float32 (positions, D).
        token_ids: int32 (M,).
        ends: int64 (B + 1,).
        parts: float32 (B, splits, H, G, D + 2), as ``merge_parts`` takes them.
        scale: Factor on the dot products.
        heads: H.
        group: G.
        DIM: D.
        HALF: D / 2.
        BLOCK_HALF: HALF up to a power of two, at least 16.
        BLOCK_D: D up to a power of two, at least 16.
        ROWS: G up to a power of two, at least 16.
        TOKENS: How many at once.
        SPLIT: Tokens of a program.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, head = pair // heads, pair % heads
    begin, stop = tl.load(ends + sequence), tl.load(ends + sequence + 1)
    c, i, g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_HALF), tl.arange(0, ROWS)
    in_dim, in_half, in_group = c < DIM, i < HALF, g < group
    row = ((pair * group + g) * DIM)[:, None] + i[None, :]
    wanted = in_group[:, None] & in_half[None, :]
    query_low = tl.load(queries + row, mask=wanted, other=0.0)
    query_high = tl.load(queries + row + HALF, mask=wanted, other=0.0)
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    count = stop - begin
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, count), TOKENS):
        place = first + tl.arange(0, TOKENS)
        valid = place < count
        token = tl.load(token_ids + begin + place, mask=valid, other=0).to(tl.int64)
        line = (token * heads + head) * DIM
        inside = valid[:, None] & in_half[None, :]
        at, angle = line[:, None] + i[None, :], place.to(tl.int64)[:, None] * DIM + i[None, :]
        low = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(keys + at + HALF, mask=inside, other=0.0).to(tl.float32)
        c_low = tl.load(cos + angle, mask=inside, other=0.0)
        s_low = tl.load(sin + angle, mask=inside, other=0.0)
        turned = (low * c_low - high * s_low).to(query_low.dtype)
        scores = tl.dot(query_low, tl.trans(turned), input_precision="tf32")
        turned = (high * c_low + low * s_low).to(query_low.dtype)
        scores += tl.dot(query_high, tl.trans(turned), input_precision="tf32")
        scores = tl.where(valid[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        decay, weights = tl.exp(top - base), tl.exp(scores - base[:, None])
        total = total * decay + tl.sum(weights, 1)
        at = line[:, None] + c[None, :]
        value = tl.load(values + at, mask=valid[:, None] & in_dim[None, :], other=0.0)
        added = tl.dot(weights.to(value.dtype), value, input_precision="tf32")
        sums = sums * decay[:, None] + added
        top = higher
    to = parts + (((sequence * tl.num_programs(1) + split) * heads + head) * group + g) * (DIM + 2)
    tl.store(to[:, None] + c[None, :], sums, mask=in_group[:, None] & in_dim[None, :])
    tl.store(to + DIM, top, mask=in_group)
    tl.store(to + DIM + 1, total, mask=in_group)


def attend_tokens_triton(
    queries: torch.Tensor, table: TokenTable, rows: TokenRows, scaling: float
) -> Attention:
    """Return what ``attend_tokens_reference`` returns, up to rounding; float32 products are TF32.

    Both halves of a row of angles are taken to be equal, as ``TokenTable`` says.
    """
    (batch, num_rows, dim), heads, device = queries.shape, table.keys.shape[1], queries.device
    group = num_rows // heads
    splits = triton.cdiv(int(rows.ends.diff().max()), SPLIT_TOKENS)
    parts = torch.empty((batch * splits, num_rows, dim + STATE), device=device)
    if num_rows:
        attend_tokens_kernel[batch * heads, splits](
            queries.contiguous(), *(t.contiguous() for t in (table.keys, table.values)),
            *(t.contiguous() for t in (table.cos, table.sin)), rows.token_ids.to(device),
            rows.ends.to(device), parts, scaling, heads, group,
            **_shape(dim, group, queries.itemsize), SPLIT=SPLIT_TOKENS,
        )  # fmt: skip
    return merge_parts(parts, (torch.arange(batch + 1) * splits).to(device))


def _shape(dim: int, group: int, itemsize: int) -> dict[str, Any]:
    padded = max(_MIN_ROWS, triton.next_power_of_2(dim))
    return {
        "DIM": dim,
        "HALF": dim // 2,
        "BLOCK_HALF": max(_MIN_ROWS, triton.next_power_of_2(dim // 2)),
        "BLOCK_D": padded,
        "ROWS": max(_MIN_ROWS, triton.next_power_of_2(group)),
        "TOKENS": max(16, _TILE_BYTES // (itemsize * padded)),
    }


def _case(dtype: str, dim: int, itemsize: int) -> AotCase:
    kinds = dict.fromkeys(("queries", "keys", "values"), f"*{dtype}")
    kinds |= dict.fromkeys(("cos", "sin", "parts"), "*fp32") | {"scale": "fp32"}
    kinds |= {"token_ids": "*i32", "ends": "*i64", "heads": "i32", "group": "i32"}
    constants = _shape(dim, 1, itemsize) | {"SPLIT": SPLIT_TOKENS}
    return AotCase(
        f"attend_{dtype}_dim{dim}", attend_tokens_kernel, kinds, constants, max_registers=255,
        max_shared_bytes=64 * 1024,
    )  # fmt: skip


AOT = (
    _case("bf16", 64, 2),
    _case("fp16", 96, 2),
    _case("fp32", 80, 4),
    _case("bf16", 256, 2),
    _case("bf16", 128, 2),
)
