"""Attention over rows that are kept by token: one row per distinct token, shared by all sequences.

Layer 0's keys and values depend on the token alone, but for the rotation to its position. So a
sequence needs to hold token ids only; its keys are looked up, and rotated on the way.

Legend: B sequences, M tokens of all of them, V tokens of the table, H KV heads, G query heads per
KV head, D head_dim.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from kvstrata.kernels.attend_blocks import Attention, attend_window
from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.decoder_ops import rotate_heads_reference

_LANES = 16


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Rows by token.

    Attributes:
        keys: (V, H, D), before RoPE; bf16, fp16 or fp32.
        values: As ``keys``.
        cos: float32 (positions, D), both halves of a row equal.
        sin: Likewise.
    """

    keys: torch.Tensor
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Which tokens the sequences of a batch hold, each from position 0 on.

    Attributes:
        token_ids: int32 (M,), sequence after sequence.
        ends: int64 (B + 1,): sequence i holds entries ends[i] to ends[i + 1] - 1.
    """

    token_ids: torch.Tensor
    ends: torch.Tensor


def attend_tokens(
    queries: torch.Tensor, table: TokenTable, rows: TokenRows, scaling: float
) -> Attention:
    """Return attention of one new token of each sequence over the rows of its tokens.

    Args:
        queries: (B, H * G, D), post-RoPE; the dtype of the table.
        table: Rows of every token in ``rows``.
        rows: At least one token per sequence.
        scaling: Factor on the dot products before the softmax.

    Returns:
        Output float32 (B, H * G, D), and lse float32 (B, H * G), as ``attend_batch``.
    """
    backend = backend_of(queries, table.keys)
    if backend == "triton":
        from kvstrata.kernels.token_rows_triton import attend_tokens_triton

        return attend_tokens_triton(queries, table, rows, scaling)
    if backend == "numba" and queries.shape[2] % (2 * _LANES) == 0:
        from kvstrata.kernels.token_rows_numba import attend_tokens_numba

        return attend_tokens_numba(queries, table, rows, scaling)
    return attend_tokens_reference(queries, table, rows, scaling)


def attend_tokens_reference(
    queries: torch.Tensor, table: TokenTable, rows: TokenRows, scaling: float
) -> Attention:
    """Return ``attend_tokens``, one sequence after another."""
    parts = []
    for i, (first, stop) in enumerate(pairwise(rows.ends.tolist())):
        ids = rows.token_ids[first:stop].long().to(table.keys.device)
        places = torch.arange(stop - first)
        keys = rotate_heads_reference(table.keys[ids], table.cos, table.sin, places)
        own = keys.transpose(0, 1), table.values[ids].transpose(0, 1)
        parts.append(attend_window(queries[i], *own, scaling))
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
