"""Uncompressed rows of one sequence in pages, the form for generating token by token.

Whole pages hold 16 tokens of one layer's head. Where a sequence's other tokens lie in compressed
blocks, its newest, fewer than 16, are in the tail, which all layers and heads share
(``kernels/row_tails.py``). So it holds what its rows take, less than a page's worth more for all of
its heads together, and one page per KV head to attend by. Where all tokens are rows, last pages
that are half empty are a small share of them, and bringing a tail to its page would take longer.

Example, 30 layers of 3 heads: 33 rows are 2 pages of each of 90 heads, a tail of 6 pages, which
takes one token of 90 rows, and 3 pages more.
"""

import numpy as np
import torch

from kvstrata.engine.kv_arena import ArenaFullError, PageIds
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.row_buffer import RowBuffer
from kvstrata.kernels.rope import rotate
from kvstrata.kernels.row_pages import PAGE_TOKENS, read_rows, write_rows
from kvstrata.kernels.row_tails import rows_of, tail_rows

_EVERY = slice(None)


class PagedRows:
    """The pages of one sequence. Not thread-safe: one thread runs the model."""

    def __init__(self, pool: KVPool, slot: int, *, shares_tail: bool = True) -> None:
        """Start without any, in a place of the pool's tables that is free."""
        self._pool = pool
        self._slot = slot
        self._shares_tail = shares_tail
        self._num_columns = 0  # whole pages of each head
        self._num_tail_pages = 0
        pool.tails.firsts[slot] = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        count = self._num_columns * self._pool.pages_per_step + self._num_tail_pages
        return (count + self._num_stages) * self._pool.arena.page_bytes

    @property
    def has_tail(self) -> bool:
        """Whether attention must have the tail brought to its pages."""
        return self._num_tail_pages > 0

    def reserve(self, num_rows: int) -> None:
        """Have room for that many rows in every layer and head.

        Raises:
            ArenaFullError: There is none; the rows are as before.
        """
        columns, left = self._split(num_rows)
        if columns > self._num_columns:
            self._add_columns(columns)
        if columns == self._num_columns and left:
            self._extend_tail(left)

    def take_over(self, buffer: RowBuffer, num_rows: int) -> None:
        """Bring the first rows of a buffer into pages, and have room for one row more.

        Layer by layer, so that no more than the larger of the two forms is held. The buffer is of
        no use afterwards.

        Raises:
            ArenaFullError: There is no room; nothing has changed.
        """
        assert not self._num_columns, "rows in one form only"
        assert not self._num_tail_pages, "rows in one form only"
        pool = self._pool
        columns, left = self._split(num_rows + 1)
        count = columns * pool.pages_per_step
        if left:
            count += self._tail_pages_for(left) + pool.model.spec.num_kv_heads
        if not pool.arena.can_replace(buffer.extent, count):
            raise ArenaFullError(f"no room for {num_rows} rows in pages")
        full = min(num_rows, columns * PAGE_TOKENS)
        newest = [part[:, :, full:num_rows].clone() for part in (buffer.keys, buffer.values)]
        tables = pool.widen(columns).tables[self._slot, :, :, :columns]
        buffer.move_to_pages(pool.rows.memory, tables, full)
        self._set_columns(columns)
        self.reserve(num_rows + 1)
        self.write(full, newest[0], newest[1])

    def write(
        self,
        first: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        layers: slice = _EVERY,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Write rows that there is room for.

        Args:
            first: The first row.
            keys: (layers, num_kv_heads, n, head_dim).
            values: As ``keys``.
            layers: Which layers.
            rotation: Of the keys, as ``row_pages.write_rows`` takes it.
        """
        memory, paged = self._pool.rows.memory, self._num_in_pages(first, first + keys.shape[2])
        if paged:
            k, v = (part[:, :, :paged].flatten(0, 1) for part in (keys, values))
            turns = rotation and (rotation[0][:paged], rotation[1][:paged])
            write_rows(memory, self.table[layers].flatten(0, 1), first, k, v, turns)
        if paged < keys.shape[2]:
            k, v = keys[:, :, paged:], values[:, :, paged:]
            if rotation is not None:
                k = rotate(k, rotation[0][paged:], rotation[1][paged:])
            rows = self._tail_rows(first + paged, first + keys.shape[2], layers)
            both = torch.stack([k, v]).to(memory.dtype)  # (2, layers, heads, n, D)
            rows_of(memory)[rows] = both.permute(3, 1, 2, 0, 4)

    def read(
        self, first: int, last: int, layers: slice = _EVERY
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of rows ``first`` to ``last`` - 1, (layers, heads, n, head_dim) each."""
        memory, paged = self._pool.rows.memory, self._num_in_pages(first, last)
        table = self.table[layers]
        parts = []
        if paged:
            found = read_rows(memory, table.flatten(0, 1), first, first + paged)
            parts.append([part.unflatten(0, table.shape[:2]) for part in found])
        if not parts or first + paged < last:
            rows = rows_of(memory)[self._tail_rows(first + paged, last, layers)]
            parts.append(list(rows.permute(3, 1, 2, 0, 4)))
        keys, values = (torch.cat(side, 2) for side in zip(*parts, strict=True))
        return keys, values

    def drop(self, num_rows: int) -> None:
        """Free the first rows, whole pages; the later ones move up."""
        assert num_rows % PAGE_TOKENS == 0, "whole pages only"
        count, table = num_rows // PAGE_TOKENS, self._pool.rows.tables[self._slot]
        self._pool.arena.release_pages(table[:, :, :count].flatten().numpy())
        table[:, :, : table.shape[2] - count] = table[:, :, count:].clone()
        self._set_columns(self._num_columns - count)

    def release(self) -> None:
        """Give everything back."""
        self._pool.arena.release_pages(self.table.flatten().numpy())
        self._pool.arena.release_pages(self._tail_pages())
        self._num_tail_pages = 0
        self._set_columns(0)

    @property
    def table(self) -> torch.Tensor:
        """The whole pages of every layer and head: int32 (L, H, columns)."""
        return self._pool.rows.tables[self._slot, :, :, : self._num_columns]

    @property
    def _num_stages(self) -> int:
        """Pages that the tail is brought to for attention."""
        return self._pool.model.spec.num_kv_heads if self._num_tail_pages else 0

    def _set_columns(self, count: int) -> None:
        self._num_columns = count
        self._pool.tails.firsts[self._slot] = count * PAGE_TOKENS

    def _num_in_pages(self, first: int, last: int) -> int:
        """Return how many rows of a range lie in whole pages."""
        return max(0, min(last, self._num_columns * PAGE_TOKENS) - first)

    def _split(self, num_rows: int) -> tuple[int, int]:
        """Return how many whole pages each head needs, and for how many tokens a tail.

        None where its pages would be as many as whole ones, as in models of few layers.
        """
        columns, left = divmod(num_rows, PAGE_TOKENS)
        if not self._shares_tail:
            return columns + (left > 0), 0
        count = self._tail_pages_for(left) + self._pool.model.spec.num_kv_heads
        is_smaller = count < self._pool.pages_per_step
        return (columns, left) if is_smaller or not left else (columns + 1, 0)

    def _tail_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens * self._pool.pages_per_step // PAGE_TOKENS)

    def _tail_rows(self, first: int, last: int, layers: slice) -> torch.Tensor:
        """Return where in ``rows_of`` the tail has rows: int64 (n, layers, heads)."""
        count, start = self._pool.pages_per_step, self._num_columns * PAGE_TOKENS
        numbers = torch.arange(count).view(-1, self._pool.model.spec.num_kv_heads)[layers]
        pages = self._pool.tails.pages[self._slot]
        rows = tail_rows(pages, count, numbers, first - start, last - start)
        return rows.to(self._pool.rows.memory.device)

    def _add_columns(self, columns: int) -> None:
        """Have that many pages of each head; the tail becomes some of them, and its rows move."""
        pool, before = self._pool, self._num_columns
        own = self._tail_pages()  # fewer than a column has
        count = (columns - before) * pool.pages_per_step
        pages = np.concatenate([own, pool.arena.take_pages(count - len(own))])
        held = self._num_tail_pages * PAGE_TOKENS // pool.pages_per_step
        first = before * PAGE_TOKENS
        newest = self.read(first, first + held) if held else None
        table = pool.widen(columns + 1).tables[self._slot, :, :, before:columns]
        table.copy_(torch.from_numpy(pages).view_as(table))
        self._num_tail_pages = 0
        self._set_columns(columns)
        if newest is not None:
            self.write(first, *newest)

    def _extend_tail(self, num_tokens: int) -> None:
        """Have room for that many tokens in the tail, and pages to bring them to."""
        pool, count = self._pool, self._tail_pages_for(num_tokens)
        if count <= self._num_tail_pages:
            return
        stages = 0 if self._num_tail_pages else pool.model.spec.num_kv_heads
        pages = torch.from_numpy(pool.arena.take_pages(count - self._num_tail_pages + stages))
        if stages:
            columns = self._num_columns
            pool.widen(columns + 1).tables[self._slot, :, :, columns] = pages[:stages]
        pool.tails.pages[self._slot, self._num_tail_pages : count] = pages[stages:]
        self._num_tail_pages = count

    def _tail_pages(self) -> PageIds:
        """Return the tail's pages, and those that it is brought to."""
        own = self._pool.tails.pages[self._slot, : self._num_tail_pages].numpy()
        stages = self._pool.rows.tables[self._slot, 0, : self._num_stages, self._num_columns :]
        return np.concatenate([own, stages[:, :1].flatten().numpy()])
