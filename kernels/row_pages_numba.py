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
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.vectors_numba import (
    add,
    larger,
    largest_lane,
    load,
    multiply_add,
    splat,
    splat_at,
    store,
    subtract,
    sum_lanes,
)

SPLIT_ROWS = 1024
_GRAIN_ROWS = 512  # rows that are worth a thread
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
    plan: _Plan = step.once(queries.shape[1], lambda: _Plan(step, queries.shape[1]))
    scaled = (queries.float() * scaling).flatten().numpy()
    new_keys, new_values = as_numpy(keys.flatten()), as_numpy(values.flatten())
    out, lse = torch.empty(queries.shape), torch.empty(queries.shape[:2])
    row_of, lengths = plan.layers[layer]

    def work(first: int, stop: int) -> None:
        _attend_items(
            first, stop, scaled, new_keys, new_values, plan.memory, plan.tables, row_of, lengths,
            plan.sizes, plan.parts, plan.state,
        )  # fmt: skip

    for_ranges(work, plan.items, plan.grain)
    merge_items(plan.parts, plan.state, plan.sizes, out.view(-1).numpy(), lse.view(-1).numpy())
    return out, lse


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
    first, stop, q, keys, values, memory, tables, row_of, lengths, sizes, parts, state
):  # fmt: skip
    """Attend to items ``first`` to ``stop``, item = (sequence * heads + head) * splits + split."""
    heads, group, dim, width, splits = sizes
    step = SPLIT_ROWS
    scores = np.empty(4 * step + 16, np.float32)
    sums = np.empty(4 * dim, np.float32)
    for item in range(first, stop):
        pair, split = item // splits, item % splits
        head = pair % heads
        table = row_of[pair // heads] + head * width
        begin, total = split * step, np.int64(lengths[pair]) + 1
        count = min(total - begin, step)
        if split == (total - 1) // step:
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
