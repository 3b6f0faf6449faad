# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention over uncompressed rows in pages, on CPU.

Work is cut into items: one KV head of one sequence, and at most 1,024 of its rows. Scores of a page
are one vector per query head: D multiply-adds, each of 16 keys' channel by the query's. Then
maximum, exponentials and the weighted values (``row_products_numba``); a second pass merges the
items of a head.

Roofline: reads 4 D bytes per row in bf16 and takes G D / 16 products of pairs, or 2 G D / 16
multiply-adds, and G / 16 exponentials for it, so with G up to about 8 it is bound by memory.
"""

from typing import Any

import numpy as np
import torch
from numba import njit

from kvstrata.kernels.attend_blocks import Attention
from kvstrata.kernels.compiled import called, kernel
from kvstrata.kernels.exponential_numba import exponential
from kvstrata.kernels.floats_numba import as_numpy, from_float
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep
from kvstrata.kernels.row_products_numba import AHEAD, add_pages, rows_of, score_pages
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.vectors_numba import (
    add,
    larger,
    largest_lane,
    load,
    splat,
    store,
    subtract,
    sum_lanes,
)
from kvstrata.kernels.written_rows_numba import PAGE_SCRATCH, put_keys, put_values, turn_key

SPLIT_ROWS = 1024
_SPLIT_PAGES = SPLIT_ROWS // PAGE_TOKENS
_GRAIN_ROWS = 512  # rows that are worth a thread
_GRAIN_PAGES = 32  # pages to write that are
_NO_TURN = np.empty(0, np.float32)
Array = np.ndarray[Any, Any]
_NONE, _HALF, _ZERO = np.float32(-np.inf), np.float32(0.5), np.float32(0.0)


class _Plan:
    """What the calls for all layers of a step share: views, sizes and memory."""

    def __init__(self, step: RowStep, query_heads: int) -> None:
        pages, lengths = step.pages, step.lengths
        count, num_layers, heads = lengths.shape
        width, dim, group = pages.tables.shape[3], pages.head_dim, query_heads // heads
        longest = int(lengths.max()) + 1
        splits = -(-longest // SPLIT_ROWS)
        self.items = count * heads * splits
        self.grain = max(1, _GRAIN_ROWS // min(longest, SPLIT_ROWS))
        self.memory = as_numpy(pages.memory.view(-1))
        self.tables = pages.tables.view(-1).numpy()
        by_layer = lengths.transpose(0, 1).reshape(num_layers, -1).numpy()
        at = step.slots.numpy() * num_layers + np.arange(num_layers)[:, None]
        self.layers = list(zip(at * heads * width, by_layer, strict=True))
        self.sizes = (heads, group, dim, width, splits)
        self.parts = np.empty(self.items * group * dim, np.float32)
        self.state = np.empty(self.items * group * 2, np.float32)


def step_rows_numba(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: RowStep,
    layer: int,
    scaling: float,
    *,
    is_generic: bool = False,
) -> Attention:
    """Return what ``step_rows_reference`` returns, up to rounding; ``rows_of`` tells the rest."""
    new = as_numpy(keys.flatten()), as_numpy(values.flatten())
    return _attend(queries, new, step, layer, scaling, is_generic)


def attend_rows_numba(
    queries: torch.Tensor, step: RowStep, layer: int, scaling: float
) -> Attention:
    """Return what ``attend_rows`` returns, up to rounding."""
    return _attend(queries, None, step, layer, scaling)


def _attend(
    queries: torch.Tensor,
    new: tuple[Array, Array] | None,
    step: RowStep,
    layer: int,
    scaling: float,
    is_generic: bool = False,
) -> Attention:
    """Attend over the rows held and, if there are ``new`` ones, over these as well."""
    plan: _Plan = step.once(queries.shape[1], lambda: _Plan(step, queries.shape[1]))
    rows = rows_of(queries, is_generic)
    out, lse = torch.empty(queries.shape), torch.empty(queries.shape[:2])
    row_of, lengths = plan.layers[layer]
    keys, values = new or (plan.memory, plan.memory)
    num_new = 0 if new is None else 1

    def work(first: int, stop: int) -> None:
        _attend_items(
            first, stop, rows, np.float32(scaling), num_new, keys, values, plan.memory, plan.tables,
            row_of, lengths, plan.sizes, plan.parts, plan.state,
        )  # fmt: skip

    for_ranges(work, plan.items, plan.grain)
    merge_items(plan.parts, plan.state, plan.sizes, out.view(-1).numpy(), lse.view(-1).numpy())
    return out, lse


def write_rows_numba(
    memory: torch.Tensor,
    tables: torch.Tensor,
    first: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Do what ``write_rows_reference`` does; rows are contiguous and of the dtype of the pages."""
    heads, count, dim = keys.shape
    if not keys.numel():
        return
    num_pages = (first + count - 1) // PAGE_TOKENS - first // PAGE_TOKENS + 1
    sources = [_flat(rows) for rows in (keys, values)]
    steps = (*keys.stride()[:2], *values.stride()[:2], tables.stride(0))
    turns: list[Array] = [_NO_TURN, _NO_TURN]
    if rotation is not None:
        turns = [table.contiguous().view(-1).numpy() for table in rotation]
    target, places = as_numpy(memory.view(-1)), _flat(tables)
    sizes = first, count, dim, num_pages

    def work(begin: int, stop: int) -> None:
        _write_items(begin, stop, *sources, *turns, places, target, steps, sizes)

    for_ranges(work, heads * num_pages, _GRAIN_PAGES)


def _flat(rows: torch.Tensor) -> Array:
    """Return all numbers from the first to the last of rows that may lie apart."""
    span = 1 + sum((n - 1) * step for n, step in zip(rows.shape, rows.stride(), strict=True))
    return as_numpy(rows.as_strided((span,), (1,)))


_part: Any = njit(nogil=True, error_model="numpy", inline="never")


@_part
def weigh(scores, at, count, weights):
    """Write a row of weights relative to the largest score, which is returned with their sum.

    ``weights`` may be ``scores``, or of a shorter format: then the sum is of what it was before.
    """
    padded = -(-count // 16) * 16
    for t in range(count, padded):
        scores[at + t] = _NONE
    top = load(scores, at)
    for t in range(16, padded, 16):
        top = larger(top, load(scores, at + t))
    largest = largest_lane(top)
    if not largest > _NONE:  # no number, or all of them minus infinity
        for t in range(0, padded, 16):
            store(weights, at + t, splat(np.float32(np.nan)))
        return np.float32(np.nan), np.float32(np.nan)
    total = splat(_ZERO)
    for t in range(0, padded, 16):
        weight = exponential(subtract(load(scores, at + t), splat(largest)))
        store(weights, at + t, weight)
        total = add(total, weight)
    return largest, sum_lanes(total)


@_part
def _append(memory, page, slot, keys, values, at, dim):
    start = page * 2 * PAGE_TOKENS * dim
    for i in range(dim):
        memory[start + PAGE_TOKENS * i + slot] = keys[at + i]
    start += PAGE_TOKENS * dim + slot * dim
    for i in range(dim):
        memory[start + i] = values[at + i]


@kernel(error_model="numpy")
def _attend_items(
    first, stop, q, scaling, num_new, keys, values, memory, tables, row_of, lengths, sizes, parts,
    state,
):  # fmt: skip
    """Attend to items ``first`` to ``stop``, item = (sequence * heads + head) * splits + split.

    ``num_new`` is 1 where every head gets a row of ``keys`` and ``values`` first, or 0.
    """
    heads, group, dim, width, splits = sizes
    scores, weights = np.empty(4 * SPLIT_ROWS, np.float32), np.empty(4 * SPLIT_ROWS, q.dtype)
    places = np.empty(_SPLIT_PAGES + AHEAD, np.int32)
    last_page, alone = np.empty(2 * PAGE_TOKENS * dim, memory.dtype), np.zeros(1 + AHEAD, np.int32)
    for item in range(first, stop):
        pair, split = item // splits, item % splits
        total = np.int64(lengths[pair]) + num_new
        count = min(total - split * SPLIT_ROWS, SPLIT_ROWS)
        table = row_of[pair // heads] + pair % heads * width
        if num_new > 0 and split == (total - 1) // SPLIT_ROWS:
            page = np.int64(tables[table + (total - 1) // PAGE_TOKENS])
            _append(memory, page, (total - 1) % PAGE_TOKENS, keys, values, pair * dim, dim)
        for i in range(item * group * dim, (item + 1) * group * dim):
            parts[i] = _ZERO
        if count <= 0:
            for i in range(item * group, (item + 1) * group):
                state[2 * i], state[2 * i + 1] = _NONE, _ZERO
            continue
        whole, left = count // PAGE_TOKENS, count % PAGE_TOKENS
        pages = whole + min(left, 1)
        for i in range(pages):
            places[i] = tables[table + split * _SPLIT_PAGES + i]
        _look_ahead(item + 1, stop, tables, row_of, sizes, places, pages)
        if left > 0:
            _copy_values(memory, np.int64(places[whole]), left, dim, last_page)
        for j in range(0, group, 4):
            rows, row = min(4, group - j), item * group + j
            query = (pair * group + j) * dim
            score_pages(rows, q, query, memory, places, pages, dim, scaling, scores, SPLIT_ROWS)
            for i in range(rows):
                state[2 * (row + i)], state[2 * (row + i) + 1] = weigh(
                    scores, SPLIT_ROWS * i, count, weights
                )
            at, to = np.int64(0), row * dim
            add_pages(rows, weights, at, SPLIT_ROWS, memory, places, whole, dim, parts, to)
            if left > 0:
                at, one = whole * PAGE_TOKENS, np.int64(1)
                add_pages(rows, weights, at, SPLIT_ROWS, last_page, alone, one, dim, parts, to)


@called
def _look_ahead(item, stop, tables, row_of, sizes, places, pages):
    """Write the first pages of the next item behind those of this one; if there is none, any."""
    heads, _, _, width, splits = sizes
    pair, first = item // splits, item % splits * _SPLIT_PAGES
    for i in range(AHEAD):
        places[pages + i] = places[0]
        if item < stop and first + i < width:
            places[pages + i] = tables[row_of[pair // heads] + pair % heads * width + first + i]


@_part
def _copy_values(memory, page, count, dim, target):
    """Write a page's values of the first ``count`` tokens; what lay behind them may be anything."""
    start = PAGE_TOKENS * dim
    for c in range(0, count * dim, 16):
        store(target, start + c, load(memory, page * 2 * start + start + c))
    for c in range(count * dim, PAGE_TOKENS * dim, 16):
        store(target, start + c, splat(_ZERO))


@kernel(error_model="numpy")
def merge_items(parts, state, sizes, out, lse):
    """Put the splits of each head together and divide by the sum of weights."""
    _, group, dim, _, splits = sizes
    for pair in range(len(lse) // group):
        for j in range(group):
            first = pair * splits * group + j
            top = state[2 * first]
            for split in range(1, splits):
                top = max(top, state[2 * (first + split * group)])
            total = np.float32(0.0)
            target = (pair * group + j) * dim
            for i in range(dim):
                out[target + i] = _ZERO
            for split in range(splits):
                at = first + split * group
                share = np.float32(np.exp(state[2 * at] - top))
                total += share * state[2 * at + 1]
                for i in range(dim):
                    out[target + i] += share * parts[at * dim + i]
            for i in range(dim):
                out[target + i] /= total
            lse[pair * group + j] = top + np.float32(np.log(total))


@kernel(error_model="numpy")
def _write_items(begin, stop, keys, values, cos, sin, tables, memory, steps, sizes):
    """Write pages ``begin`` to ``stop`` of all heads: item = head * pages + page."""
    first, count, dim, num_pages = sizes
    scratch = np.empty(PAGE_SCRATCH * dim, np.float32)
    for item in range(begin, stop):
        head, at = item // num_pages, first // PAGE_TOKENS + item % num_pages
        start = np.int64(tables[head * steps[4] + at]) * 2 * PAGE_TOKENS * dim
        low, high = max(first, at * PAGE_TOKENS), min(first + count, (at + 1) * PAGE_TOKENS)
        n = low - first
        key, value = head * steps[0] + n * steps[1], head * steps[2] + n * steps[3]
        if high - low == PAGE_TOKENS:
            put_keys(keys, key, steps[1], cos, sin, n * dim, scratch, memory, start, dim)
            put_values(values, value, steps[3], memory, start, dim)
            continue
        for slot in range(low - at * PAGE_TOKENS, high - at * PAGE_TOKENS):
            if cos.size > 0:
                turn_key(keys, key, cos, sin, n * dim, scratch, 0, dim)
            else:
                for c in range(0, dim, 16):
                    store(scratch, c, load(keys, key + c))
            for c in range(dim):
                memory[start + PAGE_TOKENS * c + slot] = from_float(scratch[c], memory[0])
            to = start + (PAGE_TOKENS + slot) * dim
            for c in range(0, dim, 16):
                store(memory, to + c, load(values, value + c))
            n, key, value = n + 1, key + steps[1], value + steps[3]
