# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention over uncompressed rows in pages, on CPU.

Work is cut into items: one KV head of one sequence, and at most 1,024 of its rows. Scores of a page
are one vector per query head: D multiply-adds, each of 16 keys' channel by the query's. Then
maximum, exponentials and the weighted values; a second pass merges the items of a head.

Roofline: reads 4 D bytes per row in bf16 and takes 2 G D / 16 vector multiply-adds and G / 16
exponentials for it, so with G up to about 8 it is bound by memory.
"""

from typing import Any

import numpy as np
import torch
from numba import njit

from kvstrata.kernels.attend_blocks import Attention
from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.exponential_numba import exponential
from kvstrata.kernels.floats_numba import as_numpy, from_float
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.vectors_numba import (
    add,
    larger,
    largest_lane,
    load,
    multiply,
    multiply_add,
    splat,
    splat_at,
    store,
    subtract,
    sum_lanes,
    transpose_tile,
)

SPLIT_ROWS = 1024
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
) -> Attention:
    """Return what ``step_rows_reference`` returns, up to rounding."""
    new = as_numpy(keys.flatten()), as_numpy(values.flatten())
    return _attend(queries, new, step, layer, scaling)


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
) -> Attention:
    """Attend over the rows held and, if there are ``new`` ones, over these as well."""
    plan: _Plan = step.once(queries.shape[1], lambda: _Plan(step, queries.shape[1]))
    scaled = (queries.float() * scaling).flatten().numpy()
    out, lse = torch.empty(queries.shape), torch.empty(queries.shape[:2])
    row_of, lengths = plan.layers[layer]
    keys, values = new or (plan.memory, plan.memory)
    num_new = 0 if new is None else 1

    def work(first: int, stop: int) -> None:
        _attend_items(
            first, stop, scaled, num_new, keys, values, plan.memory, plan.tables, row_of, lengths,
            plan.sizes, plan.parts, plan.state,
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
def score_four(q, a, b, c, d, memory, at, dim, scores, to, step):
    """Write the scores of a page's tokens for four rows of queries, which may be the same."""
    w, x, y, z = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for i in range(dim):
        key = load(memory, at + PAGE_TOKENS * i)
        w = multiply_add(splat_at(q, a + i), key, w)
        x = multiply_add(splat_at(q, b + i), key, x)
        y = multiply_add(splat_at(q, c + i), key, y)
        z = multiply_add(splat_at(q, d + i), key, z)
    store(scores, to, w)
    store(scores, to + step, x)
    store(scores, to + 2 * step, y)
    store(scores, to + 3 * step, z)


@_part
def _sum_four(weights, at, step, memory, rows, dim, out, to):
    """Add a page's values, weighted for four query heads, to four rows."""
    for c in range(0, dim, 16):
        w, x = load(out, to + c), load(out, to + dim + c)
        y, z = load(out, to + 2 * dim + c), load(out, to + 3 * dim + c)
        for t in range(PAGE_TOKENS):
            value = load(memory, rows + dim * t + c)
            w = multiply_add(splat_at(weights, at + t), value, w)
            x = multiply_add(splat_at(weights, at + step + t), value, x)
            y = multiply_add(splat_at(weights, at + 2 * step + t), value, y)
            z = multiply_add(splat_at(weights, at + 3 * step + t), value, z)
        store(out, to + c, w)
        store(out, to + dim + c, x)
        store(out, to + 2 * dim + c, y)
        store(out, to + 3 * dim + c, z)


@_part
def weigh(scores, at, count):
    """Turn a row of scores into weights relative to the largest, which is returned with the sum."""
    padded = -(-count // 16) * 16
    for t in range(count, padded):
        scores[at + t] = _NONE
    top = load(scores, at)
    for t in range(16, padded, 16):
        top = larger(top, load(scores, at + t))
    largest = largest_lane(top)
    if not largest > _NONE:  # no number, or all of them minus infinity
        for t in range(padded):
            scores[at + t] = np.float32(np.nan)
        return np.float32(np.nan), np.float32(np.nan)
    total = splat(_ZERO)
    for t in range(0, padded, 16):
        weight = exponential(subtract(load(scores, at + t), splat(largest)))
        store(scores, at + t, weight)
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
    first, stop, q, num_new, keys, values, memory, tables, row_of, lengths, sizes, parts, state
):  # fmt: skip
    """Attend to items ``first`` to ``stop``, item = (sequence * heads + head) * splits + split.

    ``num_new`` is 1 where every head gets a row of ``keys`` and ``values`` first, or 0.
    """
    heads, group, dim, width, splits = sizes
    step = SPLIT_ROWS
    scores = np.empty(4 * step + 16, np.float32)
    sums = np.empty(4 * dim, np.float32)
    for item in range(first, stop):
        pair, split = item // splits, item % splits
        head = pair % heads
        table = row_of[pair // heads] + head * width
        begin, total = split * step, np.int64(lengths[pair]) + num_new
        count = min(total - begin, step)
        if num_new > 0 and split == (total - 1) // step:
            last = total - 1
            page = np.int64(tables[table + last // PAGE_TOKENS])
            _append(memory, page, last % PAGE_TOKENS, keys, values, pair * dim, dim)
        query = pair * group * dim
        for j in range(0, group, 4):
            rows = min(4, group - j)
            a = query + j * dim
            b, c = a + min(1, rows - 1) * dim, a + min(2, rows - 1) * dim
            d = a + (rows - 1) * dim
            target = (item * group + j) * dim
            if count <= 0:
                for i in range(rows):
                    state[2 * (item * group + j + i)] = _NONE
                    state[2 * (item * group + j + i) + 1] = _ZERO
                for i in range(rows * dim):
                    parts[target + i] = _ZERO
                continue
            for t in range(0, count, PAGE_TOKENS):
                page = np.int64(tables[table + (begin + t) // PAGE_TOKENS])
                at = page * 2 * PAGE_TOKENS * dim
                score_four(q, a, b, c, d, memory, at, dim, scores, t, step)
            for i in range(4):
                largest, total_weight = weigh(scores, step * i, count)
                if i < rows:
                    state[2 * (item * group + j + i)] = largest
                    state[2 * (item * group + j + i) + 1] = total_weight
            sums[:] = _ZERO
            for t in range(0, count, PAGE_TOKENS):
                page = np.int64(tables[table + (begin + t) // PAGE_TOKENS])
                at = page * 2 * PAGE_TOKENS * dim + PAGE_TOKENS * dim
                if count - t < PAGE_TOKENS:
                    _sum_few(scores, t, step, memory, at, dim, sums, count - t)
                else:
                    _sum_four(scores, t, step, memory, at, dim, sums, 0)
            for i in range(rows * dim):
                parts[target + i] = sums[i]


@_part
def _sum_few(weights, at, step, memory, rows, dim, out, count):
    """As ``_sum_four`` for the first tokens of a page: what lies behind them may be anything."""
    for c in range(0, dim, 16):
        for t in range(count):
            value = load(memory, rows + dim * t + c)
            for i in range(4):
                to = dim * i + c
                weight = splat_at(weights, at + step * i + t)
                store(out, to, multiply_add(weight, value, load(out, to)))


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
    """Write pages ``begin`` to ``stop`` of all heads: item = head * pages + page.

    A whole page's keys are turned in rows of float32, then transposed; bits stay as they are.
    """
    first, count, dim, num_pages = sizes
    rows, tile = np.empty(PAGE_TOKENS * dim, np.float32), np.empty(PAGE_TOKENS * dim, np.float32)
    for item in range(begin, stop):
        head, at = item // num_pages, first // PAGE_TOKENS + item % num_pages
        start = np.int64(tables[head * steps[4] + at]) * 2 * PAGE_TOKENS * dim
        low, high = max(first, at * PAGE_TOKENS), min(first + count, (at + 1) * PAGE_TOKENS)
        for token in range(low, high):
            n, slot = token - first, token - at * PAGE_TOKENS
            source = head * steps[0] + n * steps[1]
            if cos.size > 0:
                _turn(keys, source, cos, sin, n * dim, rows, slot * dim, dim)
            else:
                for c in range(0, dim, 16):
                    store(rows, slot * dim + c, load(keys, source + c))
            source, to = head * steps[2] + n * steps[3], start + (PAGE_TOKENS + slot) * dim
            for c in range(0, dim, 16):
                store(memory, to + c, load(values, source + c))
        if high - low == PAGE_TOKENS:
            for c in range(0, dim, 16):
                transpose_tile(rows, c, dim, tile, c * PAGE_TOKENS, PAGE_TOKENS)
            for c in range(0, dim * PAGE_TOKENS, 16):
                store(memory, start + c, load(tile, c))
        else:
            for slot in range(low - at * PAGE_TOKENS, high - at * PAGE_TOKENS):
                for c in range(dim):
                    memory[start + PAGE_TOKENS * c + slot] = from_float(
                        rows[slot * dim + c], memory[0]
                    )


@_part
def _turn(keys, source, cos, sin, angle, rows, to, dim):
    """Write a row of keys as float32, turned: low and high halves as in ``rope_numba``."""
    half = dim // 2
    for c in range(0, half, 16):
        low, high = load(keys, source + c), load(keys, source + half + c)
        turned = multiply(high, load(sin, angle + c))
        store(rows, to + c, subtract(multiply(low, load(cos, angle + c)), turned))
        turned = multiply(low, load(sin, angle + half + c))
        store(rows, to + half + c, add(multiply(high, load(cos, angle + half + c)), turned))
