# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""``row_saliency`` on CPU: scores of a page at once, as in ``row_pages_numba``."""

from typing import Any

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep
from kvstrata.kernels.row_products_numba import AHEAD, rows_of, score_pages
from kvstrata.kernels.threads import for_ranges

_GRAIN = 64  # heads of sequences that are worth a thread


def add_row_saliency_numba(
    queries: torch.Tensor,
    lse: torch.Tensor,
    step: RowStep,
    layer: int,
    scaling: float,
    firsts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Do what ``add_row_saliency_reference`` does, up to rounding."""
    pages = step.pages
    count, num_layers, heads = step.lengths.shape
    group = queries.shape[1] // heads
    rows, lines = rows_of(queries), lse.contiguous().view(-1).numpy()
    views = step.once("row_saliency", lambda: _views(step))
    starts, totals = firsts.numpy(), sums.view(-1).numpy()
    sizes = (num_layers, layer, heads, group, pages.head_dim, pages.tables.shape[3], sums.shape[3])

    def work(begin: int, end: int) -> None:
        _add(begin, end, rows, np.float32(scaling), lines, *views, starts, sizes, totals)

    for_ranges(work, count * heads, _GRAIN)


def _views(step: RowStep) -> tuple["np.ndarray[Any, Any]", ...]:
    """Return memory, tables, slots and lengths, flat: the same for all layers."""
    pages, lengths = step.pages, step.lengths.contiguous()
    return (
        as_numpy(pages.memory.view(-1)),
        pages.tables.view(-1).numpy(),
        step.slots.numpy(),
        lengths.view(-1).numpy(),
    )


@kernel(error_model="numpy")
def _add(begin, end, q, scaling, lse, memory, tables, slots, lengths, firsts, sizes, sums):
    """Add for heads ``begin`` to ``end`` of all sequences."""
    num_layers, layer, heads, group, dim, width, room = sizes
    scores, places = np.empty(4 * PAGE_TOKENS, np.float32), np.empty(1 + AHEAD, np.int32)
    for pair in range(begin, end):
        i, head = pair // heads, pair % heads
        first = np.int64(firsts[i])
        if first < 0:
            continue
        last = np.int64(lengths[(i * num_layers + layer) * heads + head]) + 1
        place = (slots[i] * num_layers + layer) * heads + head
        for page in range(first // PAGE_TOKENS, (last + PAGE_TOKENS - 1) // PAGE_TOKENS):
            places[:] = tables[place * width + page]
            start: Any = page * PAGE_TOKENS
            stop: Any = start + PAGE_TOKENS
            start = first if start < first else start
            stop = last if last < stop else stop
            for j in range(0, group, 4):
                rows = min(4, group - j)
                at = (pair * group + j) * dim
                score_pages(rows, q, at, memory, places, 1, dim, scaling, scores, PAGE_TOKENS)
                for k in range(rows):
                    total = lse[pair * group + j + k]
                    for t in range(start, stop):
                        score = scores[k * PAGE_TOKENS + t - page * PAGE_TOKENS]
                        weight = np.float32(np.exp(score - total)) / np.float32(group)
                        sums[place * room + t - first] += weight
