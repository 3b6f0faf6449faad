# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""``row_tails`` on CPU: rows are copied through registers, 16 numbers at once; keys transposed.

Per KV head of a sequence: reads and writes at most 15 rows, 4 D bytes each in bf16, all of which
lie in the second level cache when the next layer is staged.
"""

from typing import Any

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep
from kvstrata.kernels.row_tails import RowTails
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.vectors_numba import load, store, transpose_tile

_GRAIN = 64  # heads of sequences that are worth a thread


class _Plan:
    """What the calls for all layers of a step share."""

    def __init__(self, tails: RowTails, step: RowStep) -> None:
        pages = step.pages
        _, num_layers, heads, width = pages.tables.shape
        by_layer = step.lengths.transpose(0, 1).reshape(num_layers, -1)
        self.lengths = list(by_layer.numpy())
        self.arrays = (
            as_numpy(pages.memory.view(-1)),
            pages.tables.view(-1).numpy(),
            tails.pages.view(-1).numpy(),
            tails.firsts.numpy(),
            step.slots.numpy(),
        )
        self.sizes = (num_layers, heads, pages.head_dim, width)
        self.items = len(step.slots) * heads


def stage_rows_numba(
    tails: RowTails,
    step: RowStep,
    layer: int,
    new: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Do what ``stage_rows_reference`` does."""
    plan: _Plan = step.once("stage_rows", lambda: _Plan(tails, step))
    keys, values = (as_numpy(part.flatten()) for part in new) if new else plan.arrays[:1] * 2

    def work(begin: int, stop: int) -> None:
        _stage_items(
            begin, stop, int(new is not None), keys, values, *plan.arrays, plan.lengths[layer],
            layer, plan.sizes,
        )  # fmt: skip

    for_ranges(work, plan.items, _GRAIN)


@kernel(error_model="numpy")
def _stage_items(
    begin, stop, num_new, keys, values, memory, tables, tails, firsts, slots, lengths, layer, sizes
):  # fmt: skip
    """Stage heads ``begin`` to ``stop`` of all sequences, item = sequence * heads + head."""
    num_layers, heads, dim, width = sizes
    rows_per_token = num_layers * heads
    # What lies behind a page's last row may be anything, but memory that means nothing is not read.
    rows, tile = np.zeros(PAGE_TOKENS * dim, np.float32), np.empty(16 * PAGE_TOKENS, np.float32)
    for item in range(begin, stop):
        slot, number = slots[item // heads], layer * heads + item % heads
        first = np.int64(firsts[slot])
        count = np.int64(lengths[item]) + num_new - first
        if count <= 0:
            continue
        tail = slot * rows_per_token
        at = tables[(tail + number) * width + first // PAGE_TOKENS]
        page: Any = np.int64(at) * 2 * PAGE_TOKENS * dim
        if num_new > 0:
            row: Any = (count - 1) * rows_per_token + number
            at = np.int64(tails[tail + row // PAGE_TOKENS]) * PAGE_TOKENS + row % PAGE_TOKENS
            at *= 2 * dim
            for i in range(dim):
                memory[at + i] = keys[item * dim + i]
                memory[at + dim + i] = values[item * dim + i]
        for t in range(count):
            row = t * rows_per_token + number
            at = np.int64(tails[tail + row // PAGE_TOKENS]) * PAGE_TOKENS + row % PAGE_TOKENS
            at *= 2 * dim
            to = page + (PAGE_TOKENS + t) * dim
            for c in range(0, dim, 16):
                store(rows, t * dim + c, load(memory, at + c))
                store(memory, to + c, load(memory, at + dim + c))
        for c in range(0, dim, 16):
            transpose_tile(rows, c, dim, tile, 0, PAGE_TOKENS)
            for i in range(0, 16 * PAGE_TOKENS, 16):
                store(memory, page + c * PAGE_TOKENS + i, load(tile, i))
