"""Mean errors of values on a CPU: a block's base values are read 16 components at a time.

Roofline per element, D = 64, 1.8 bits on average: reads 2 bytes and takes half a vector instruction
of 16 lanes: an estimate of 6 GB/s of bf16 on one 2.5 GHz core, not a measurement.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import torch

from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.block_planes_numba import plan_of, stage_words, write_columns
from kvstrata.kernels.compiled import VECTORS, kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.token_masks import TOKENS
from kvstrata.kernels.vectors_numba import (
    LANES,
    load,
    multiply_add,
    splat,
    splat_at,
    store,
    subtract,
)

_GRAIN = 16


def mean_errors_numba(
    y: torch.Tensor,
    words: torch.Tensor,
    layout: PlaneLayout,
    weights: torch.Tensor,
    base: torch.Tensor,
) -> torch.Tensor:
    """Return what ``mean_errors_reference`` returns."""
    plan, (heads, blocks, _, dim) = plan_of(layout), y.shape
    sums = torch.empty((heads, blocks, dim), dtype=torch.float32)
    totals = torch.empty((heads, blocks), dtype=torch.float32)
    flat = as_numpy(y.contiguous()).reshape(-1)
    arrays = [table.contiguous().numpy() for table in (weights, base, words)]
    for_ranges(
        lambda a, b: _mean_errors(
            flat, *arrays, plan, np.zeros(2 * MAX_WIDTH * dim, np.int32),
            np.empty(TOKENS * LANES, np.float32), np.empty(TOKENS, np.float32),
            sums.numpy(), totals.numpy(), dim, a, b,
        ),
        heads * blocks,
        _GRAIN,
    )  # fmt: skip
    return sums / totals[..., None]


@kernel(**VECTORS)
def _mean_errors(
    y, weights, base, words, plan, halves, read, chosen, sums, totals, dim, first, last
):  # fmt: skip
    """Add up weights and weighted errors of the (head, block) pairs ``first`` to ``last``."""
    num_blocks = words.shape[0]
    for item in range(first, last):
        h, n = item // num_blocks, item % num_blocks
        whole = np.float32(0)
        for t in range(TOKENS):
            chosen[t] = weights[h, n, t] if (base[h, n] >> t) & 1 else np.float32(0)
            whole += chosen[t]
        totals[h, n] = whole
        stage_words(words[n], plan, halves, dim, h)
        start, target = item * TOKENS * dim, sums[h, n]
        for c in range(0, dim, LANES):
            planes = np.int64(plan.widths[h * dim + c])
            write_columns(halves, plan.steps, planes, h, c, dim, read, 0, LANES)
            total = splat(np.float32(0))
            for t in range(TOKENS):
                rest = subtract(load(y, start + t * dim + c), load(read, t * LANES))
                total = multiply_add(splat_at(chosen, t), rest, total)
            store(target, c, total)
