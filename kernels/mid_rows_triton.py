# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Rows of mid tokens on a GPU: one program packs those of one head of a block."""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.block_planes_triton import code_tables, has_token, rank_of
from kvstrata.kernels.sign_codes import GRID_PER_UNIT, GRID_SIZE

_GRID, _PER_UNIT = tl.constexpr(GRID_SIZE), tl.constexpr(float(GRID_PER_UNIT))
_BYTES = 4  # of high bits, and of low bits, at once


def pack_mid_rows_triton(
    y: torch.Tensor, masks: torch.Tensor, layout: PlaneLayout, starts: torch.Tensor
) -> torch.Tensor:
    """Return what ``pack_mid_rows_reference`` returns."""
    heads, blocks, _, dim = y.shape
    rows = torch.empty(int(starts[-1]), dtype=torch.uint8, device=y.device)
    if rows.numel():
        _pack[(blocks, heads)](
            y.contiguous(), masks.contiguous(), layout.widths.contiguous(),
            layout.mid_counts.long(), code_tables(y.device), starts, rows, dim, _BYTES,
        )  # fmt: skip
    return rows


@triton.jit
def _pack(y, masks, widths, counts, codes, starts, rows, dim, BYTES: tl.constexpr):
    """Write the rows of one head of one block.

    Roofline: reads 2 bytes of bf16 and writes a quarter of a byte per refined element of a mid
    token, 15 operations and a read of a table in cache; other tokens cost nothing. Llama-3-8B, one
    layer's keys of 128k tokens, of which an eighth is mid with every component refined: 34 MB + 4
    MB, 11 us at 3.35 TB/s.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    item = h * tl.num_programs(0) + n
    t = tl.arange(0, 64)
    mids = tl.load(masks + item).to(tl.uint64)
    count = tl.where(mids != 0, tl.load(counts + h), 0).to(tl.int32)
    is_mid = has_token(mids, t)[:, None]
    token = y + item * 64 * dim + (t * dim)[:, None]
    row = rows + tl.load(starts + n * tl.num_programs(1) + h)
    row += (rank_of(mids, t) * (count // 4))[:, None]
    for first in range(0, count, 8 * BYTES):
        c = first + tl.arange(0, 8 * BYTES)
        wanted = is_mid & (c < tl.multiple_of(count, 8))[None, :]
        value = tl.load(token + c[None, :], mask=wanted, other=0.0).to(tl.float32)
        width = tl.load(widths + h * dim + c, mask=c < count, other=0).to(tl.int32)
        value = tl.where(value == value, value, 0.0)
        cell = tl.floor(value * _PER_UNIT + _GRID // 2)
        cell = tl.minimum(tl.maximum(cell, 0.0), _GRID - 1.0).to(tl.int32)
        quarter = tl.load(codes + width[None, :] * _GRID + cell).to(tl.int32) & 3
        place = (c % 8)[None, :]
        high = tl.sum(tl.reshape((quarter >> 1) << place, (64, BYTES, 8)), 2)
        low = tl.sum(tl.reshape((quarter & 1) << place, (64, BYTES, 8)), 2)
        byte = (first // 8 + tl.arange(0, BYTES))[None, :]
        inside = is_mid & (byte < count // 8)
        tl.store(row + byte, high.to(tl.uint8), mask=inside)
        tl.store(row + count // 8 + byte, low.to(tl.uint8), mask=inside)


AOT = (
    AotCase(
        "bf16", _pack,
        {"y": "*bf16", "masks": "*i64", "widths": "*u8", "counts": "*i64", "codes": "*u8",
         "starts": "*i64", "rows": "*u8", "dim": "i32"},
        {"BYTES": _BYTES}, divisible=("dim",),
    ),
)  # fmt: skip
