"""How much one new row of each sequence attends to the newest of its uncompressed rows.

While a block fills, each of its tokens is a probe: its attention to the block's tokens is added up
as it passes, so that neither queries nor earlier keys are needed when the block is full.
"""

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.row_pages import RowStep, read_rows


def add_row_saliency(
    queries: torch.Tensor,
    lse: torch.Tensor,
    step: RowStep,
    layer: int,
    scaling: float,
    firsts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Add exp(score - lse), the mean over a KV head's query heads, to the sums of some rows.

    Args:
        queries: (R, H * G, D), those of ``step_rows``, whose rows are in their pages already.
        lse: float32 (R, H * G), of each query over all that it attended to.
        step: Which sequences.
        layer: Which layer of the tables.
        scaling: Factor on the dot products.
        firsts: int32 (R,), the first row to count of each sequence, the same for all its heads, at
            most the new one; below 0 to leave a sequence out.
        sums: float32 (S, L, H, n), contiguous, on the CPU or where the pages are; the new row less
            ``firsts`` is below n. Written at the step's slots.
    """
    backend = backend_of(queries, lse, step.pages.memory)
    if backend == "triton":
        from kvstrata.kernels.row_saliency_triton import add_row_saliency_triton

        add_row_saliency_triton(queries, lse, step, layer, scaling, firsts, sums)
    elif backend == "numba" and step.pages.head_dim % 16 == 0:
        from kvstrata.kernels.row_saliency_numba import add_row_saliency_numba

        add_row_saliency_numba(queries, lse, step, layer, scaling, firsts, sums)
    else:
        add_row_saliency_reference(queries, lse, step, layer, scaling, firsts, sums)


def add_row_saliency_reference(
    queries: torch.Tensor,
    lse: torch.Tensor,
    step: RowStep,
    layer: int,
    scaling: float,
    firsts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Do what ``add_row_saliency`` says, one head after another."""
    heads = step.lengths.shape[2]
    group = queries.shape[1] // heads
    for i, (slot, first) in enumerate(zip(step.slots.tolist(), firsts.tolist(), strict=True)):
        if first < 0:
            continue
        for head in range(heads):
            last = int(step.lengths[i, layer, head]) + 1
            table = step.pages.tables[slot, layer, head][None]
            keys = read_rows(step.pages.memory, table, first, last)[0][0].float()
            own = slice(head * group, (head + 1) * group)
            scores = queries[i, own].float() @ keys.T * scaling
            weights = (scores - lse[i, own, None]).exp().mean(0)
            sums[slot, layer, head, : last - first] += weights.to(sums.device)
