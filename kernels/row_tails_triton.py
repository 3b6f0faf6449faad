# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""``row_tails`` on a GPU: a program brings the tail of one KV head of one sequence to its page."""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep
from kvstrata.kernels.row_pages_triton import StepTables
from kvstrata.kernels.row_tails import RowTails

_PAGE = tl.constexpr(PAGE_TOKENS)


@triton.jit
def stage_rows_kernel(
    memory, tails, firsts, tables, lengths, new_keys, new_values, heads, width, rows, number,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NEW: tl.constexpr,
):  # fmt: skip
    """Append a head's new row to its tail, if there is one, and write the tail to its page.

    Roofline: reads and writes 4 D bytes of bf16 per row. 64 sequences, a layer of 8 heads of 128, 8
    rows on average: 4.2 MB, 1.3 us at 3.35 TB/s, so it is bound by its launch.

    Args:
        memory: (P, 2, 16 * D), as ``RowPages``.
        tails: int32 (R, rows), the pages of each tail.
        firsts: int32 (R,), the first token in each.
        tables: int32 (R, H, width), of one layer.
        lengths: int32 (R, H), rows without the new one.
        new_keys: (R, H, D).
        new_values: (R, H, D).
        heads: H.
        width: Pages of a table.
        rows: Of a token in all layers and heads.
        number: Of the layer's first head among them.
        DIM: D.
        BLOCK_D: D up to a power of two.
        HAS_NEW: 1 if there are new rows, else 0.
    """
    pair = tl.program_id(0).to(tl.int64)
    sequence, t, c = pair // heads, tl.arange(0, _PAGE), tl.arange(0, BLOCK_D)
    first = tl.load(firsts + sequence)
    count = tl.load(lengths + pair) + HAS_NEW - first
    in_dim, is_held = c < DIM, t < count
    row = t * rows + number + (pair % heads).to(tl.int32)
    page = tl.load(tails + sequence * rows + row // _PAGE, mask=is_held, other=0).to(tl.int64)
    at = memory + (page * _PAGE + row % _PAGE)[:, None] * (2 * DIM) + c[None, :]
    is_old = (t < count - HAS_NEW)[:, None] & in_dim[None, :]
    key, value = tl.load(at, mask=is_old, other=0.0), tl.load(at + DIM, mask=is_old, other=0.0)
    if HAS_NEW:
        is_new = (t == count - 1)[:, None] & in_dim[None, :]
        new_key = tl.load(new_keys + pair * DIM + c, mask=in_dim, other=0.0)[None, :]
        new_value = tl.load(new_values + pair * DIM + c, mask=in_dim, other=0.0)[None, :]
        key, value = tl.where(is_new, new_key, key), tl.where(is_new, new_value, value)
        tl.store(at, key, mask=is_new)
        tl.store(at + DIM, value, mask=is_new)
    stage = tl.load(tables + pair * width + first // _PAGE, mask=count > 0, other=0).to(tl.int64)
    home, inside = memory + stage * (2 * _PAGE * DIM), is_held[:, None] & in_dim[None, :]
    tl.store(home + c[None, :] * _PAGE + t[:, None], key, mask=inside)
    tl.store(home + (t + _PAGE)[:, None] * DIM + c[None, :], value, mask=inside)


def stage_rows_triton(
    tails: RowTails,
    step: RowStep,
    layer: int,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Do what ``stage_rows_reference`` does. The tails' pages go to the GPU once per step."""
    pages, tables = step.pages, StepTables.of(step)
    _, num_layers, heads, _ = pages.tables.shape
    firsts, own = step.once(
        "tails on a GPU",
        lambda: [part[step.slots].to(pages.memory.device) for part in (tails.firsts, tails.pages)],
    )
    keys, values = (part.contiguous() for part in new or (pages.memory, pages.memory))
    stage_rows_kernel[(len(step.slots) * heads,)](
        pages.memory, own, firsts, tables.tables[layer], tables.lengths[layer], keys, values,
        heads, tables.width, num_layers * heads, layer * heads, DIM=pages.head_dim,
        BLOCK_D=triton.next_power_of_2(pages.head_dim), HAS_NEW=int(new is not None),
    )  # fmt: skip


def _case(dtype: str, dim: int) -> AotCase:
    kinds = dict.fromkeys(("memory", "new_keys", "new_values"), f"*{dtype}")
    kinds |= dict.fromkeys(("tails", "firsts", "tables", "lengths"), "*i32")
    kinds |= dict.fromkeys(("heads", "width", "rows", "number"), "i32")
    sizes = {"DIM": dim, "BLOCK_D": triton.next_power_of_2(dim), "HAS_NEW": 1}
    return AotCase(f"stage_{dtype}_dim{dim}", stage_rows_kernel, kinds, sizes, wide_loads=False)


AOT = tuple(_case(dtype, dim) for dtype, dim in (("bf16", 64), ("fp16", 96), ("bf16", 128)))
