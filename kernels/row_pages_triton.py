# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention over uncompressed rows in pages, on a GPU: split K, as in FlashDecoding.

A program takes 512 rows of one KV head of one sequence, some pages at a time, and multiplies by all
query heads of the group at once. The one whose rows end with the new row writes it to its page and
takes it from registers. Splits are as long for every sequence, so a sequence's result does not
depend on the others. Tables and lengths go to the GPU once per step, all layers together.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.attend_blocks import Attention
from kvstrata.kernels.attend_merge_triton import STATE, merge_parts
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep

_PAGE = tl.constexpr(PAGE_TOKENS)
SPLIT_ROWS = 512
_MIN_ROWS, _TILE_BYTES = 16, 8192  # of a matrix product; of keys at once


@triton.jit
def page_starts(table, first, last, p, DIM: tl.constexpr):
    """Return int64: where the pages lie that hold the rows from ``first`` on."""
    page = tl.load(table + first // _PAGE + p, mask=first + p * _PAGE <= last, other=0)
    return page.to(tl.int64) * (2 * _PAGE * DIM)


@triton.jit
def read_page_keys(
    memory, table, new_key, first, last, c,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Return keys (BLOCK_D, PAGES * 16) of the rows from ``first`` on.

    Row ``last`` is ``new_key``, float32 or as the pages; rows behind it are zero.
    """
    p, s = tl.arange(0, PAGES), tl.arange(0, _PAGE)
    is_page = first + p * _PAGE <= last
    start = page_starts(table, first, last, p, DIM)
    row = first + p[:, None, None] * _PAGE + s[None, None, :]
    # Whole pages are loaded, 16 bytes at a time; what lies behind the last row may be anything.
    inside = is_page[:, None, None] & (c < DIM)[None, :, None]
    at = memory + start[:, None, None] + c[None, :, None] * _PAGE + s[None, None, :]
    key = tl.load(at, mask=inside, other=0.0)
    key = tl.where(row < last, key, tl.where(row == last, new_key[None, :, None], 0.0))
    key = tl.permute(key, (1, 0, 2))
    return tl.reshape(key, (BLOCK_D, PAGES * _PAGE))


@triton.jit
def attend_pages_kernel(
    queries, new_keys, new_values, memory, tables, lengths, parts, scale,
    heads, group, width,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend over some rows of one KV head of one sequence, and write the new row if it is there.

    Roofline: reads 4 D bytes of bf16 per row and head, 4 ROWS operations per element in tensor
    cores. 64 sequences of 2,048 rows, a layer of 8 heads of 128: 537 MB, 160 us at 3.35 TB/s.

    Args:
        queries: (R, H, G, D), the dtype of the pages.
        new_keys: (R, H, D).
        new_values: (R, H, D).
        memory: (P, 2, 16 * D), as ``RowPages``.
        tables: int32 (R, H, width), of one layer.
        lengths: int32 (R, H), rows before this one.
        parts: float32 (R, splits, H, G, D + 2), as ``merge_parts`` takes them.
        scale: Factor on the dot products.
        heads: H.
        group: G.
        width: Pages of a table.
        DIM: D.
        BLOCK_D: D up to a power of two, at least 16.
        ROWS: G up to a power of two, at least 16.
        PAGES: How many at once.
        SPLIT: Rows of a program.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, g = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    t = tl.arange(0, PAGES * _PAGE)
    p, s = tl.arange(0, PAGES), tl.arange(0, _PAGE)
    in_dim, in_group = c < DIM, g < group
    wanted = in_group[:, None] & in_dim[None, :]
    query = tl.load(
        queries + ((pair * group + g) * DIM)[:, None] + c[None, :], mask=wanted, other=0.0
    )
    new_key = tl.load(new_keys + pair * DIM + c, mask=in_dim, other=0.0)
    new_value = tl.load(new_values + pair * DIM + c, mask=in_dim, other=0.0)
    last, table = tl.load(lengths + pair), tables + pair * width
    sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, last + 1), PAGES * _PAGE):
        key = read_page_keys(memory, table, new_key, first, last, c, DIM, BLOCK_D, PAGES)
        scores = tl.dot(query, key, input_precision="tf32") * scale
        scores = tl.where((first + t <= last)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        decay, weights = tl.exp(top - base), tl.exp(scores - base[:, None])
        total = total * decay + tl.sum(weights, 1)
        row = first + p[:, None, None] * _PAGE + s[None, :, None]
        inside = (first + p * _PAGE <= last)[:, None, None] & in_dim[None, None, :]
        start = page_starts(table, first, last, p, DIM)[:, None, None]
        at = memory + start + _PAGE * DIM + s[None, :, None] * DIM
        value = tl.load(at + c[None, None, :], mask=inside, other=0.0)
        value = tl.where(row < last, value, tl.where(row == last, new_value[None, None, :], 0.0))
        value = tl.reshape(value, (PAGES * _PAGE, BLOCK_D))
        added = tl.dot(weights.to(value.dtype), value, input_precision="tf32")
        sums = sums * decay[:, None] + added
        top = higher
    if last // SPLIT == split:
        home = memory + tl.load(table + last // _PAGE).to(tl.int64) * (2 * _PAGE * DIM)
        tl.store(home + c * _PAGE + last % _PAGE, new_key, mask=in_dim)
        tl.store(home + (_PAGE + last % _PAGE) * DIM + c, new_value, mask=in_dim)
    sequence = pair // heads
    place = ((sequence * tl.num_programs(1) + split) * heads + pair % heads) * group + g
    to = parts + place * (DIM + 2)
    tl.store(to[:, None] + c[None, :], sums, mask=wanted)
    tl.store(to + DIM, top, mask=in_group)
    tl.store(to + DIM + 1, total, mask=in_group)


class StepTables:
    """What the calls for all layers of a step share, on the GPU."""

    def __init__(self, step: RowStep) -> None:
        pages, device = step.pages, step.pages.memory.device
        longest = int(step.lengths.max()) + 1
        self.splits = -(-longest // SPLIT_ROWS)
        self.width = -(-longest // PAGE_TOKENS)
        tables = pages.tables[step.slots, :, :, : self.width]
        self.tables = tables.transpose(0, 1).contiguous().to(device)
        self.lengths = step.lengths.transpose(0, 1).contiguous().to(device)
        self.slots = step.slots.to(device)
        self.starts = (torch.arange(len(step.slots) + 1) * self.splits).to(device)

    @classmethod
    def of(cls, step: RowStep) -> "StepTables":
        """Return those of a step, made at its first call."""
        made: StepTables = step.once("triton", lambda: cls(step))
        return made


def shape_of(dim: int, group: int, itemsize: int) -> dict[str, Any]:
    """Return the constants of a kernel over pages."""
    padded = max(_MIN_ROWS, triton.next_power_of_2(dim))
    return {
        "DIM": dim,
        "BLOCK_D": padded,
        "ROWS": max(_MIN_ROWS, triton.next_power_of_2(group)),
        "PAGES": max(1, _TILE_BYTES // (itemsize * padded * PAGE_TOKENS)),
    }


def step_rows_triton(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: RowStep,
    layer: int,
    scaling: float,
) -> Attention:
    """Return what ``step_rows_reference`` returns, up to rounding; products of float32 are TF32."""
    return _attend(queries, keys, values, step, layer, StepTables.of(step).lengths[layer], scaling)


def attend_rows_triton(
    queries: torch.Tensor, step: RowStep, layer: int, scaling: float
) -> Attention:
    """Return what ``attend_rows_reference`` returns, up to rounding; as ``step_rows_triton``.

    The last row of each head is the new one of the kernel, which writes it back as it was.
    """
    pages, tables, dim = step.pages, StepTables.of(step), step.pages.head_dim
    last = tables.lengths[layer] - 1
    home = tables.tables[layer].gather(2, (last // PAGE_TOKENS).long()[..., None])[..., 0]
    keys, values = pages.memory[home.long()].unbind(2)
    place = (last % PAGE_TOKENS).long()[..., None, None]
    key = keys.unflatten(2, (dim, PAGE_TOKENS)).take_along_dim(place, 3)[..., 0]
    value = values.unflatten(2, (PAGE_TOKENS, dim)).take_along_dim(place, 2)[:, :, 0]
    return _attend(queries, key, value, step, layer, last, scaling)


def _attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: RowStep,
    layer: int,
    lengths: torch.Tensor,
    scaling: float,
) -> Attention:
    """Return attention over ``lengths`` (R, H) rows and the given ones, which are written."""
    pages, tables = step.pages, StepTables.of(step)
    (count, num_rows, dim), heads = queries.shape, keys.shape[1]
    group = num_rows // heads
    parts = torch.empty(
        (count * tables.splits, num_rows, dim + STATE), dtype=torch.float32, device=queries.device
    )
    if num_rows:
        attend_pages_kernel[count * heads, tables.splits](
            queries.contiguous(), keys.contiguous(), values.contiguous(), pages.memory,
            tables.tables[layer], lengths, parts, scaling, heads, group,
            tables.width, **shape_of(dim, group, keys.itemsize), SPLIT=SPLIT_ROWS,
        )  # fmt: skip
    return merge_parts(parts, tables.starts)


def bytes_of(dtype: str) -> int:
    """Return the size of a type by its name in Triton, e.g. ``"bf16"``."""
    return int(dtype[2:]) // 8 if not dtype.startswith("bf") else 2


def _case(dtype: str, dim: int) -> AotCase:
    kinds = dict.fromkeys(("queries", "new_keys", "new_values", "memory"), f"*{dtype}")
    kinds |= {"tables": "*i32", "lengths": "*i32", "parts": "*fp32", "scale": "fp32"}
    kinds |= dict.fromkeys(("heads", "group", "width"), "i32")
    return AotCase(
        f"attend_{dtype}_dim{dim}", attend_pages_kernel, kinds,
        shape_of(dim, 1, bytes_of(dtype)) | {"SPLIT": SPLIT_ROWS}, max_registers=255,
    )  # fmt: skip


AOT = tuple(
    _case(dtype, dim)
    for dtype, dim in (("bf16", 64), ("fp16", 96), ("fp32", 80), ("bf16", 256), ("bf16", 128))
)
