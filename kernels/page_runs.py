"""Stored tokens straight into the pages that attention reads, without the rows between them.

What lies in the pages then is what ``expand`` and ``write_rows`` leave there, bit for bit.

Legend: H KV heads, N blocks, D head_dim, P pages, W pages of a head.
"""

from dataclasses import dataclass

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.block_planes import MidRows
from kvstrata.kernels.component_basis import ComponentBasis, check_expand, expand, shift_of
from kvstrata.kernels.escape_rows import EscapeRows
from kvstrata.kernels.row_pages import PAGE_TOKENS, write_rows
from kvstrata.kernels.token_masks import TOKENS, TokenClasses
from kvstrata.kernels.value_bias import ValueBias


@dataclass(frozen=True, slots=True)
class PageRun:
    """Whole pages of some heads, one after the other.

    Attributes:
        memory: Of ``RowPages``, (P, 2, 16 D); its dtype is that of the rows.
        tables: int32 (H, W), the pages of each head.
        first: Which row of each head the first one is, a multiple of 16.
        rotation: cos and sin, float32 (rows, D), both halves of a row equal: keys are rounded to
            the pages' dtype, then turned. None leaves them as they are.
    """

    memory: torch.Tensor
    tables: torch.Tensor
    first: int
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class StoredTokens:
    """What ``expand`` reads of one side: its arguments of these names."""

    words: torch.Tensor
    basis: ComponentBasis
    classes: TokenClasses
    mid: MidRows | None = None
    bias: ValueBias | None = None
    escapes: EscapeRows | None = None

    def expand(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the tokens, (H, N, 64, D)."""
        return expand(
            self.words,
            self.basis,
            self.classes,
            mid=self.mid,
            bias=self.bias,
            escapes=self.escapes,
            dtype=dtype,
        )


def expand_to_pages(keys: StoredTokens, values: StoredTokens, pages: PageRun) -> None:
    """Expand N blocks of keys and values into pages.

    Raises:
        ValueError: Sizes or types do not fit one another; nothing is written.
    """
    dtype, count = pages.memory.dtype, keys.words.shape[0] * TOKENS
    for side in (keys, values):
        check_expand(
            side.words, side.basis, side.classes, side.mid, side.bias, side.escapes,
            pages.rotation, dtype,
        )  # fmt: skip
    _check_pages(pages, keys, values, count)
    dim = keys.basis.layout.dim
    quick = dim % (2 * PAGE_TOKENS) == 0 and pages.memory.is_contiguous()
    if not quick or backend_of(pages.memory, keys.words, values.words) != "numba":
        expand_to_pages_reference(keys, values, pages)
        return
    from kvstrata.kernels.component_basis_numba import expand_to_pages_numba

    for side in (keys, values):
        shift = None if side.bias is None else shift_of(side.basis, side.bias)
        expand_to_pages_numba(
            side.words, side.basis, side.classes, side.mid, shift, side.escapes, pages,
            is_keys=side is keys,
        )  # fmt: skip


def expand_to_pages_reference(keys: StoredTokens, values: StoredTokens, pages: PageRun) -> None:
    """Do what ``expand_to_pages`` does; the definition."""
    k, v = (side.expand(pages.memory.dtype).flatten(1, 2) for side in (keys, values))
    write_rows(pages.memory, pages.tables, pages.first, k, v, pages.rotation)


def _check_pages(pages: PageRun, keys: StoredTokens, values: StoredTokens, count: int) -> None:
    layouts = keys.basis.layout, values.basis.layout
    heads, dim = layouts[0].num_heads, layouts[0].dim
    if (layouts[1].num_heads, layouts[1].dim) != (heads, dim) or len(values.words) != len(
        keys.words
    ):
        raise ValueError("keys and values must be of as many heads, blocks and channels")
    tables, memory = pages.tables, pages.memory
    if tables.dtype != torch.int32 or tables.ndim != 2 or tables.shape[0] != heads:
        raise ValueError(f"tables must be int32 ({heads}, pages), not {tuple(tables.shape)}")
    if memory.ndim != 3 or memory.shape[1:] != (2, PAGE_TOKENS * dim):
        raise ValueError(f"pages must be (P, 2, {PAGE_TOKENS * dim}), not {tuple(memory.shape)}")
    last = pages.first + count
    if pages.first % PAGE_TOKENS or not 0 <= pages.first <= last <= tables.shape[1] * PAGE_TOKENS:
        raise ValueError(f"rows {pages.first} to {last} are no whole pages of the tables")
    own = tables[:, pages.first // PAGE_TOKENS : last // PAGE_TOKENS]
    if own.numel() and not 0 <= int(own.min()) <= int(own.max()) < memory.shape[0]:
        raise ValueError("tables lead to pages that are not there")
