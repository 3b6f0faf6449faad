"""Uncompressed rows of one sequence in one piece, the form that a prompt is computed in."""

import torch

from kvstrata.engine.kv_arena import Extent, KVArena
from kvstrata.engine.spec import KVSpec


class RowBuffer:
    """Keys and values of consecutive tokens, post-RoPE, in an extent of the arena.

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
    def num_bytes(self) -> int:
        """Bytes in the arena."""
        return self._extent.num_bytes

    def grow(self, capacity: int, held: int) -> None:
        """Make room for more rows, of which the first ``held`` are kept.

        Raises:
            ArenaFullError: There is none; nothing has changed.
        """
        extent, keys, values = self._make(capacity)
        keys[:, :, :held] = self.keys[:, :, :held]
        values[:, :, :held] = self.values[:, :, :held]
        self._arena.release(self._extent)
        self._extent, self.keys, self.values = extent, keys, values

    def release(self) -> None:
        """Give the memory back; the buffer must not be used afterwards."""
        self._arena.release(self._extent)

    def _make(self, capacity: int) -> tuple[Extent, torch.Tensor, torch.Tensor]:
        extent = self._arena.allocate(self.bytes_for(self._spec, capacity), self._moved)
        return extent, *self._rows(extent, capacity)

    def _rows(self, extent: Extent, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self._spec
        rows = self._arena.view(extent)[: self.bytes_for(spec, capacity)].view(spec.dtype)
        keys, values = rows.view(2, spec.num_layers, spec.num_kv_heads, capacity, spec.head_dim)
        return keys, values

    def _moved(self, _distance: int) -> None:
        self.keys, self.values = self._rows(self._extent, self.capacity)
