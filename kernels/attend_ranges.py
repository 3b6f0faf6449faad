"""Which compressed blocks each program of a GPU takes, for all sequences of a batch."""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.kernels.block_pages import BlockPages, PageTable

PROGRAMS = 512  # about four for each multiprocessor of a large GPU
LEAST_BLOCKS = 4  # of a range: its result is as large as a block


class BlockRanges:
    """The M blocks of a table that hold tokens, in ranges of one sequence each.

    Tensors are on the device of the arena.

    Attributes:
        num_blocks: M.
        num_ranges: P.
        sequences: int64 (M,), whose block it is.
        places: int64 (M,), its row of ``Turns``.
        offsets: int64 (M, NUM_FIELDS), ``BlockPages.places``.
        row_starts: int64 (M, 2, 2, H + 1), as ``BlockPages`` returns them.
        num_tokens: int64 (M,).
        ranges: int32 (P, 2), the first block of each range and the one behind its last.
        starts: int64 (B + 1,), the first range of each sequence.
    """

    def __init__(self, pages: BlockPages, table: PageTable) -> None:
        """Cut by a sequence's own length alone, so that its sums do not depend on the others."""
        device, heads = pages.arena.device, pages.keys.mean.shape[0]
        filled = pages.blocks.num_tokens[table.pages] > 0
        rows = table.pages[filled]
        every = torch.arange(table.num_sequences)
        sequences = every.repeat_interleave(table.ends.diff())[filled]
        counts = torch.bincount(sequences, minlength=len(every))
        ends = F.pad(counts.cumsum(0), (1, 0))
        sizes = -(-counts * heads // PROGRAMS).clamp_max(-LEAST_BLOCKS)
        starts = F.pad((-(-counts // sizes)).cumsum(0), (1, 0))
        owners = every.repeat_interleave(starts.diff())
        firsts = ends[owners] + (torch.arange(len(owners)) - starts[owners]) * sizes[owners]
        stops = torch.minimum(firsts + sizes[owners], ends[owners + 1])
        self.num_blocks, self.num_ranges = len(rows), len(owners)
        self.sequences, self.places = sequences.to(device), table.places[filled].to(device)
        self.offsets, self.row_starts = (
            pages.places(rows).to(device),
            pages.row_starts(rows).to(device),
        )
        self.num_tokens = pages.blocks.num_tokens[rows].to(device)
        self.ranges = torch.stack([firsts, stops], 1).int().to(device)
        self.starts = starts.to(device)


_Held = WeakKeyDictionary[BlockPages, tuple[int, BlockRanges]]
_held: WeakKeyDictionary[PageTable, _Held] = WeakKeyDictionary()


def ranges_of(pages: BlockPages, table: PageTable) -> BlockRanges:
    """Return the ranges of a table, made at the first call and after ``BlockPages.put``."""
    made = _held.setdefault(table, WeakKeyDictionary())
    num_puts = pages.num_puts
    found = made.get(pages)
    if found is None or found[0] != num_puts:
        found = made[pages] = num_puts, BlockRanges(pages, table)
    return found[1]
