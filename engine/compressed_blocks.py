"""Blocks of one codec that the running sequences of a node hold, as attention reads them.

Each block is a row of a ``BlockPages`` per stored layer; its bytes lie in one extent of the arena
and may be moved. Several sequences may hold one block, counted by ``share`` and ``release``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from kvstrata.engine.kv_arena import Extent, KVArena, Source
from kvstrata.kernels.block_pages import (
    ABSENT,
    MID,
    NUM_FIELDS,
    SIDE_FIELDS,
    BlockPages,
    BlockRows,
    Turns,
)
from kvstrata.kernels.expand_pages import expand_pages
from kvstrata.methods.calibrated_pages import PageLayout, PlacedBlock
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS

_FIRST_ROWS = 32


@dataclass
class _Held:
    extent: Extent
    is_whole: bool
    num_holders: int = 1


class CompressedBlocks:
    """The blocks of one codec. Not thread-safe: one thread runs the model.

    Attributes:
        layout: Of the codec.
        layers: Per stored layer, the pages of all blocks; rows of released ones mean nothing.
    """

    def __init__(self, layout: PageLayout, arena: KVArena) -> None:
        self.layout = layout
        self._arena = arena
        self._held: dict[int, _Held] = {}
        self._free: list[int] = []
        self._blocks = BlockRows.empty(0)
        offsets = torch.zeros(0, NUM_FIELDS, dtype=torch.int32)
        self.layers: list[BlockPages] = [
            BlockPages(arena.memory, self._blocks, offsets, *tables) for tables in layout.tables
        ]

    @property
    def num_blocks(self) -> int:
        """Blocks held."""
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes of the held blocks in the arena."""
        return self.bytes_of(list(self._held))

    def bytes_per_block(self, guess: int) -> int:
        """Return the mean size of the held blocks; ``guess`` while there is none."""
        return self.num_bytes // len(self._held) if self._held else guess

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables that say where the blocks' parts lie."""
        return self._blocks.num_bytes + sum(pages.num_bytes for pages in self.layers)

    def put(self, blocks: Sequence[Mapping[Stratum, Frame]]) -> list[int]:
        """Take blocks in and return their rows, each held once; all of them, or none.

        Raises:
            ArenaFullError: There is no room.
            CorruptFrameError: A block is damaged.
        """
        placed = [self.layout.place(frames) for frames in blocks]
        extents: list[Extent] = []
        rows = [self._next_row() for _ in placed]
        try:
            for row, block in zip(rows, placed, strict=True):
                extents.append(self._arena.allocate(block.num_bytes, self._mover(row)))
            # Only now: making room for one block may have moved another.
            source = self._arena.fill(extents, [block.copy_to for block in placed])
            self._write(torch.tensor(rows), extents, placed, source)
        except BaseException:
            for extent in extents:
                self._arena.release(extent)
            self._free += rows
            raise
        for row, extent, block in zip(rows, extents, placed, strict=True):
            self._held[row] = _Held(extent, block.is_whole)
        return rows

    def exchange(self, rows: Sequence[int], blocks: Sequence[Mapping[Stratum, Frame]]) -> list[int]:
        """Take blocks in and give up ``rows``, which stay held where ``put`` raises."""
        taken = self.put(blocks)
        self.release(rows)
        return taken

    def bytes_of(self, rows: Sequence[int]) -> int:
        """Return the bytes of some blocks."""
        return sum(self._held[row].extent.num_bytes for row in rows)

    def are_whole(self, rows: Sequence[int]) -> bool:
        """Tell whether no head leaves out a token of these blocks."""
        return all(self._held[row].is_whole for row in rows)

    def share(self, rows: Sequence[int]) -> None:
        """Count one more holder of each block."""
        for row in rows:
            self._held[row].num_holders += 1

    def release(self, rows: Sequence[int]) -> None:
        """Give up holding blocks; the last holder frees their bytes."""
        for row in rows:
            held = self._held[row]
            held.num_holders -= 1
            if not held.num_holders:
                self._arena.release(held.extent)
                del self._held[row]
                self._free.append(row)

    def expand(
        self, layer: int, rows: Sequence[int], turns: Turns, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of blocks, one after the other, (H, 64 * len(rows), D).

        Args:
            layer: Counted from the first stored one.
            rows: The blocks.
            turns: Rotation to the first token of each.
            dtype: Of the result.
        """
        pages, basis, at = self.layers[layer], self.layout.bases[layer], torch.tensor(rows)
        parts, start = [], 0
        for _, run in groupby((pages.offsets[at][:, [MID, SIDE_FIELDS + MID]] == ABSENT).tolist()):
            own = slice(start, start + len(list(run)))  # alike: blocks may be refined one by one
            turned = Turns(turns.cos[own], turns.sin[own])
            parts.append(expand_pages(pages, at[own], basis, turned, dtype))
            start = own.stop
        keys, values = zip(*parts, strict=True)
        return (
            (keys[0], values[0]) if len(parts) == 1 else (torch.cat(keys, 1), torch.cat(values, 1))
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every row is held once or free."""
        count = len(self._blocks.starts)
        assert sorted([*self._held, *self._free]) == list(range(count)), "a row is lost or doubled"
        assert all(held.num_holders > 0 for held in self._held.values()), "a block without holder"

    def _next_row(self) -> int:
        if not self._free:
            count = len(self._blocks.starts)
            more = max(_FIRST_ROWS, count // 8)
            self._blocks = self._blocks.widen(more)
            self.layers = [pages.widen(self._blocks) for pages in self.layers]
            self._free = list(range(count + more - 1, count - 1, -1))
        return self._free.pop()

    def _mover(self, row: int) -> Callable[[int], None]:
        def move(distance: int) -> None:
            if row in self._held:  # else its row is not written yet
                self._blocks.starts[row] += distance

        return move

    def _write(
        self,
        rows: torch.Tensor,
        extents: Sequence[Extent],
        placed: Sequence[PlacedBlock],
        source: Source,
    ) -> None:
        """Enter blocks into the tables of all layers; ``source`` holds what is checked of them."""
        counts = torch.full((len(rows),), BLOCK_TOKENS)
        blocks = BlockRows(torch.tensor([extent.offset for extent in extents]), counts)
        held = source.memory, BlockRows(torch.tensor(source.starts), counts)
        offsets = torch.stack([block.offsets for block in placed])
        try:
            for layer, pages in enumerate(self.layers):
                pages.put(rows, blocks, offsets[:, layer].contiguous(), held)
        except ValueError as error:
            raise CorruptFrameError(str(error)) from error
