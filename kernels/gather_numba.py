"""Gather and scatter by mask on a CPU: runs of kept tokens are copied as one piece.

Roofline: each kept byte is read and written once, a mask costs 64 steps: the speed of a copy.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.threads import for_ranges

_TOKENS = 64
_BYTES_PER_THREAD = 1 << 18


def gather_numba(
    blocks: torch.Tensor,
    masks: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write the kept rows of contiguous blocks to ``rows`` and ``positions``."""
    source, target, row_bytes = _flat(blocks), _flat(rows), blocks.shape[3] * blocks.element_size()
    bits, starts, where = masks.view(-1).numpy(), _starts(counts), positions.numpy()

    def work(a: int, b: int) -> None:
        _gather(source, bits, starts, masks.shape[1], row_bytes, target, where, a, b)

    for_ranges(work, bits.size, _BYTES_PER_THREAD // (row_bytes * _TOKENS + 1) + 1)


def scatter_numba(
    rows: torch.Tensor, masks: torch.Tensor, counts: torch.Tensor, out: torch.Tensor
) -> None:
    """Write contiguous ``rows`` to the kept tokens of contiguous ``out``."""
    source, target, row_bytes = _flat(rows), _flat(out), rows.shape[1] * rows.element_size()
    bits, starts = masks.view(-1).numpy(), _starts(counts)

    def work(a: int, b: int) -> None:
        _scatter(source, bits, starts, row_bytes, target, a, b)

    for_ranges(work, bits.size, _BYTES_PER_THREAD // (row_bytes * _TOKENS + 1) + 1)


def _flat(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    return tensor.view(-1).view(torch.uint8).numpy()


def _starts(counts: torch.Tensor) -> "np.ndarray[Any, Any]":
    """Return the index of the first row of each block."""
    return (counts.view(-1).cumsum(0) - counts.view(-1)).numpy()


@kernel()
def _copy(source, at, target, to, count):
    piece = source[at : at + count]
    place = target[to : to + count]
    for i in range(count):
        place[i] = piece[i]


@kernel()
def _run(mask, token):
    """Return the first kept token from ``token`` on and the end of the run that it begins."""
    while token < _TOKENS and not (mask >> token) & 1:
        token += 1
    end = token
    while end < _TOKENS and (mask >> end) & 1:
        end += 1
    return token, end


@kernel()
def _gather(blocks, masks, starts, num_blocks, row_bytes, rows, positions, start, stop):
    for block in range(start, stop):
        row = starts[block]
        first = (block % num_blocks) * _TOKENS
        token, end = _run(masks[block], 0)
        while token < end:
            at = (block * _TOKENS + token) * row_bytes
            _copy(blocks, at, rows, row * row_bytes, (end - token) * row_bytes)
            for i in range(end - token):
                positions[row + i] = first + token + i
            row += end - token
            token, end = _run(masks[block], end)


@kernel()
def _scatter(rows, masks, starts, row_bytes, blocks, start, stop):
    for block in range(start, stop):
        row = starts[block]
        token, end = _run(masks[block], 0)
        while token < end:
            to = (block * _TOKENS + token) * row_bytes
            _copy(rows, row * row_bytes, blocks, to, (end - token) * row_bytes)
            row += end - token
            token, end = _run(masks[block], end)
