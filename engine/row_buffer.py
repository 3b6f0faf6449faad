"""Uncompressed rows of one sequence in one piece, the form that a prompt is computed in."""

import torch

from kvstrata.engine.kv_arena import ArenaFullError, Extent, KVArena
from kvstrata.engine.spec import KVSpec
from kvstrata.kernels.row_pages import write_rows


class RowBuffer:
    """Keys and values of consecutive tokens, post-RoPE, in an extent of the arena.

    Layer after layer, keys before values, so that the last layer can be given back by itself.

    Attributes:
        keys: ``spec.dtype``, (num_layers, num_kv_heads, capacity, head_dim). Of now: after an
            allocation in the arena, read the attribute anew.
        values: As ``keys``.
    """

    def __init__(self, spec: KVSpec, arena: KVArena, capacity: int) -> None:
        """Make room for ``capacity`` rows. The arena may move them when others need room.

        Raises:
            ArenaFullError: There is none.
        """
        self._spec = spec
        self._arena = arena
        self._num_layers = spec.num_layers
        self._extent, self.keys, self.values = self._make(capacity)

    @staticmethod
    def bytes_for(spec: KVSpec, capacity: int) -> int:
        """Return the bytes of a buffer."""
        rows = spec.num_layers * spec.num_kv_heads * capacity
        return 2 * rows * spec.head_dim * spec.dtype.itemsize

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return self.keys.shape[2]

    @property
    def extent(self) -> Extent:
        """Its part of the arena."""
        return self._extent

    def grow(self, capacity: int, held: int) -> None:
        """Make room for at least ``capacity`` rows, if possible twice; the first ``held`` are kept.

        Raises:
            ArenaFullError: There is none; nothing has changed.
        """
        try:
            extent, keys, values = self._make(min(2 * capacity, self._spec.max_positions))
        except ArenaFullError:
            extent, keys, values = self._make(capacity)
        keys[:, :, :held] = self.keys[:, :, :held]
        values[:, :, :held] = self.values[:, :, :held]
        self._arena.release(self._extent)
        self._extent, self.keys, self.values = extent, keys, values

    def move_to_pages(self, memory: torch.Tensor, tables: torch.Tensor, num_rows: int) -> None:
        """Write the first rows to pages and give everything back; the buffer is of no use then.

        Layer by layer, each given back before its pages are taken.

        Args:
            memory: Of ``RowPages``.
            tables: int32 (num_layers, num_kv_heads, columns), which becomes the pages of each head.
            num_rows: How many.

        Raises:
            ArenaFullError: There is no room; never where ``KVArena.can_replace`` says so.
        """
        for table in reversed(tables.unbind()):
            keys, values = (part[-1, :, :num_rows].clone() for part in (self.keys, self.values))
            self._drop_layer()
            pages = self._arena.take_pages(table.numel())
            table.copy_(torch.from_numpy(pages).view_as(table))
            write_rows(memory, table, 0, keys, values)

    def _drop_layer(self) -> None:
        capacity = self.capacity
        self._num_layers -= 1
        if not self._num_layers:
            self.release()
            return
        left = self.bytes_for(self._spec, capacity) // self._spec.num_layers * self._num_layers
        self._arena.shrink(self._extent, left)
        self.keys, self.values = self.keys[:-1], self.values[:-1]

    def release(self) -> None:
        """Give the memory back; the buffer must not be used afterwards."""
        self._arena.release(self._extent)

    def _make(self, capacity: int) -> tuple[Extent, torch.Tensor, torch.Tensor]:
        extent = self._arena.allocate(self.bytes_for(self._spec, capacity), self._moved)
        return extent, *self._rows(extent, capacity)

    def _rows(self, extent: Extent, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self._spec
        num_bytes = self.bytes_for(spec, capacity) // spec.num_layers * self._num_layers
        rows = self._arena.view(extent)[:num_bytes].view(spec.dtype)
        shape = self._num_layers, 2, spec.num_kv_heads, capacity, spec.head_dim
        keys, values = rows.view(shape).unbind(1)
        return keys, values

    def _moved(self, _distance: int) -> None:
        self.keys, self.values = self._rows(self._extent, self.capacity)
