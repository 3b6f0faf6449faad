# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""``row_saliency`` on a GPU: one program per KV head of a sequence, over the block that fills."""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep
from kvstrata.kernels.row_pages_triton import StepTables, bytes_of, read_page_keys, shape_of

_PAGE = tl.constexpr(PAGE_TOKENS)


@triton.jit
def count_rows_kernel(
    queries, lse, memory, tables, lengths, firsts, added, scale, heads, group, width, room,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Write the mean weight of the group's queries for the rows of one KV head from the first on.

    Roofline: reads 2 D bytes of bf16 per row and head and writes 4; 2 ROWS operations per element
    in tensor cores. 64 sequences, a layer of 8 heads of 128, 32 rows on average: 4.2 MB, 1.3 us at
    3.35 TB/s, so it is bound by its launch.

    Args:
        queries: (R, H, G, D), the dtype of the pages.
        lse: float32 (R, H, G).
        memory: (P, 2, 16 * D), as ``RowPages``; the new row is there.
        tables: int32 (R, H, width), of one layer.
        lengths: int32 (R, H), rows before the new one.
        firsts: int32 (R,); below 0 nothing is written.
        added: float32 (R, H, room).
        scale: Factor on the dot products.
        heads: H.
        group: G.
        width: Pages of a table.
        room: Rows of ``added``.
        DIM: D.
        BLOCK_D: D up to a power of two, at least 16.
        ROWS: G up to a power of two, at least 16.
        PAGES: How many at once.
    """
    pair = tl.program_id(0).to(tl.int64)
    c, g, t = tl.arange(0, BLOCK_D), tl.arange(0, ROWS), tl.arange(0, PAGES * _PAGE)
    in_dim, in_group = c < DIM, g < group
    wanted = in_group[:, None] & in_dim[None, :]
    query = tl.load(
        queries + ((pair * group + g) * DIM)[:, None] + c[None, :], mask=wanted, other=0.0
    )
    norm = tl.load(lse + pair * group + g, mask=in_group, other=0.0)
    begin, last = tl.load(firsts + pair // heads), tl.load(lengths + pair)
    table = tables + pair * width
    home = memory + tl.load(table + last // _PAGE).to(tl.int64) * (2 * _PAGE * DIM)
    new_key = tl.load(home + c * _PAGE + last % _PAGE, mask=in_dim, other=0.0)
    stop = tl.where(begin < 0, 0, last + 1)
    for first in range(tl.maximum(begin, 0) // _PAGE * _PAGE, stop, PAGES * _PAGE):
        key = read_page_keys(memory, table, new_key, first, last, c, DIM, BLOCK_D, PAGES)
        scores = tl.dot(query, key, input_precision="tf32") * scale
        weights = tl.exp(scores - norm[:, None])
        mean = tl.sum(tl.where(in_group[:, None], weights, 0.0), 0) / group
        valid = (first + t >= begin) & (first + t <= last)
        tl.store(added + pair * room + (first + t - begin), mean, mask=valid)


def add_row_saliency_triton(
    queries: torch.Tensor,
    lse: torch.Tensor,
    step: RowStep,
    layer: int,
    scaling: float,
    firsts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Do what ``add_row_saliency_reference`` does, up to rounding."""
    pages, tables, device = step.pages, StepTables.of(step), queries.device
    count, _, heads = step.lengths.shape
    group = queries.shape[1] // heads
    added = torch.zeros((count, heads, sums.shape[3]), device=device)
    if group:
        count_rows_kernel[(count * heads,)](
            queries.contiguous(), lse.contiguous(), pages.memory, tables.tables[layer],
            tables.lengths[layer], firsts.to(device), added, scaling, heads, group,
            tables.width, sums.shape[3], **shape_of(pages.head_dim, group, queries.itemsize),
        )  # fmt: skip
    slots = tables.slots if sums.device == device else step.slots
    sums[:, layer].index_add_(0, slots, added.to(sums.device))


def _case(dtype: str, dim: int) -> AotCase:
    kinds = {"queries": f"*{dtype}", "lse": "*fp32", "memory": f"*{dtype}", "tables": "*i32"}
    kinds |= {"lengths": "*i32", "firsts": "*i32", "added": "*fp32", "scale": "fp32"}
    kinds |= dict.fromkeys(("heads", "group", "width", "room"), "i32")
    sizes = shape_of(dim, 1, bytes_of(dtype))
    return AotCase(f"count_{dtype}_dim{dim}", count_rows_kernel, kinds, sizes)


AOT = tuple(
    _case(dtype, dim)
    for dtype, dim in (("bf16", 64), ("fp16", 96), ("fp32", 80), ("bf16", 256), ("bf16", 128))
)
