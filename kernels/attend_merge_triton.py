# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Partial results of attention put together on a GPU, each sequence's in the order of its parts.

So what else is in a batch changes no bit here.
"""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase

STATE = 2  # columns behind the sums: largest score, sum of weights relative to it
_PARTS, _COLUMNS = 16, 64  # taken at once


@triton.jit
def merge_parts_kernel(
    parts, starts, out, lse, num_rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the weighted mean of one row's parts, and the logarithm of its softmax sum.

    A row without a token gives 0 and -inf.

    Roofline: reads 4 (WIDTH + 2) bytes per part and row, two operations per element. 32k tokens of
    a layer with 8 heads of 128, G = 4, in 64 parts (``attend_blocks``, WIDTH = 257): 2.1 MB, 0.6 us
    at 3.35 TB/s, so it is bound by its launch.

    Args:
        parts: float32 (P, num_rows, WIDTH + 2): sums, largest score, sum of weights.
        starts: int64 (B + 1,): sequence i has parts starts[i] to starts[i + 1] - 1.
        out: float32 (B, num_rows, WIDTH).
        lse: float32 (B, num_rows).
        num_rows: Heads of queries.
        WIDTH: Columns of a result.
        COLUMNS: How many of them a program writes.
        PARTS: How many are taken at once.
    """
    sequence, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, stop = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    c, p = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PARTS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    top, total = first.to(tl.float32) * 0 - float("inf"), first.to(tl.float32) * 0
    for begin in range(first, stop, PARTS):
        part = begin + p
        is_part = part < stop
        at = parts + (part * num_rows + row) * (WIDTH + 2)
        largest = tl.load(at + WIDTH, mask=is_part, other=float("-inf"))
        weight = tl.load(at + WIDTH + 1, mask=is_part, other=0.0)
        higher = tl.maximum(top, tl.max(largest, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        decay, share = tl.exp(top - base), tl.exp(largest - base)
        total = total * decay + tl.sum(share * weight, 0)
        wanted = is_part[:, None] & (c < WIDTH)[None, :]
        tile = tl.load(at[:, None] + c[None, :], mask=wanted, other=0.0)
        sums = sums * decay + tl.sum(share[:, None] * tile, 0)
        top = higher
    norm = tl.where(total == 0.0, 1.0, total)
    place = sequence * num_rows + row
    tl.store(out + place * WIDTH + c, sums / norm, mask=c < WIDTH)
    tl.store(lse + place, top + tl.log(norm))


def merge_parts(parts: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``merge_parts_kernel`` writes: float32 (B, num_rows, WIDTH) and (B, num_rows)."""
    _, num_rows, columns = parts.shape
    shape = (len(starts) - 1, num_rows)
    out = torch.empty((*shape, columns - STATE), device=parts.device)
    lse = torch.empty(shape, device=parts.device)
    if lse.numel():
        width = columns - STATE
        merge_parts_kernel[*shape, triton.cdiv(width, _COLUMNS)](
            parts, starts, out, lse, num_rows, width, _COLUMNS, _PARTS
        )
    return out, lse


AOT = tuple(
    AotCase(
        f"merge_width{width}",
        merge_parts_kernel,
        {"parts": "*fp32", "starts": "*i64", "out": "*fp32", "lse": "*fp32", "num_rows": "i32"},
        {"WIDTH": width, "COLUMNS": _COLUMNS, "PARTS": _PARTS},
        wide_loads=False,  # rows of an odd number of columns
    )
    for width in (64, 128, 193, 257)
)
