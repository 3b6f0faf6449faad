# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""``token_rows`` on CPU: a key is looked up, rotated in registers, and scored for all its heads.

Per token and KV head: reads 4 D bytes in bf16 and the angles of its position, takes D / 16 * 6
operations to rotate and 2 G D / 16 multiply-adds. Work is cut into items of 1,024 tokens.
"""

import numpy as np
import torch

from kvstrata.kernels.attend_blocks import Attention
from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.row_pages_numba import SPLIT_ROWS, merge_items, weigh
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.token_rows import TokenRows, TokenTable
from kvstrata.kernels.vectors_numba import (
    add,
    load,
    multiply,
    multiply_add,
    splat,
    splat_at,
    store,
    subtract,
    sum_lanes,
)

_GRAIN_ROWS = 512
_NONE, _ZERO = np.float32(-np.inf), np.float32(0.0)


def attend_tokens_numba(
    queries: torch.Tensor, table: TokenTable, rows: TokenRows, scaling: float
) -> Attention:
    """Return what ``attend_tokens_reference`` returns, up to rounding."""
    count, query_heads, dim = queries.shape
    heads = table.keys.shape[1]
    group = query_heads // heads
    ends = rows.ends.numpy()
    longest = int(np.diff(ends).max())
    splits = -(-longest // SPLIT_ROWS)
    items = count * heads * splits
    parts = np.empty(items * group * dim, np.float32)
    state = np.empty(items * group * 2, np.float32)
    scaled = (queries.float() * scaling).flatten().numpy()
    out, lse = torch.empty(queries.shape), torch.empty(queries.shape[:2])
    sizes = (heads, group, dim, 0, splits)
    held = (as_numpy(table.keys.view(-1)), as_numpy(table.values.view(-1)))
    angles = (table.cos.view(-1).numpy(), table.sin.view(-1).numpy())

    def work(first: int, stop: int) -> None:
        _attend(
            first, stop, scaled, *held, *angles, rows.token_ids.numpy(), ends, sizes, parts, state
        )

    for_ranges(work, items, max(1, _GRAIN_ROWS // min(longest, SPLIT_ROWS)))
    merge_items(parts, state, sizes, out.view(-1).numpy(), lse.view(-1).numpy())
    return out, lse


@kernel(error_model="numpy")
def _attend(first, stop, q, keys, values, cos, sin, ids, ends, sizes, parts, state):
    """Attend to items ``first`` to ``stop``, item = (sequence * heads + head) * splits + split."""
    heads, group, dim, _, splits = sizes
    half = dim // 2
    scores = np.empty(group * SPLIT_ROWS + 16, np.float32)
    turned = np.empty(dim, np.float32)
    for item in range(first, stop):
        pair, split = item // splits, item % splits
        head, sequence = pair % heads, pair // heads
        begin = split * SPLIT_ROWS
        count = min(ends[sequence + 1] - ends[sequence] - begin, SPLIT_ROWS)
        target = item * group
        if count <= 0:
            for j in range(group):
                state[2 * (target + j)] = _NONE
                state[2 * (target + j) + 1] = _ZERO
            for i in range(target * dim, (target + group) * dim):
                parts[i] = _ZERO
            continue
        for t in range(count):
            row = (np.int64(ids[ends[sequence] + begin + t]) * heads + head) * dim
            angle = (begin + t) * dim
            for i in range(0, half, 16):
                low, high = load(keys, row + i), load(keys, row + half + i)
                c, s = load(cos, angle + i), load(sin, angle + i)
                store(turned, i, subtract(multiply(low, c), multiply(high, s)))
                store(turned, half + i, add(multiply(high, c), multiply(low, s)))
            for j in range(group):
                total = splat(_ZERO)
                query = (pair * group + j) * dim
                for i in range(0, dim, 16):
                    total = multiply_add(load(q, query + i), load(turned, i), total)
                scores[j * SPLIT_ROWS + t] = sum_lanes(total)
        for j in range(group):
            largest, weight = weigh(scores, j * SPLIT_ROWS, count, scores)
            state[2 * (target + j)] = largest
            state[2 * (target + j) + 1] = weight
            for i in range(0, dim, 16):
                store(parts, (target + j) * dim + i, splat(_ZERO))
        for t in range(count):
            row = (np.int64(ids[ends[sequence] + begin + t]) * heads + head) * dim
            for i in range(0, dim, 16):
                value = load(values, row + i)
                for j in range(group):
                    to = (target + j) * dim + i
                    share = splat_at(scores, j * SPLIT_ROWS + t)
                    store(parts, to, multiply_add(share, value, load(parts, to)))
