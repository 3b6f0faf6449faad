"""Compressed blocks of one layer as they lie in memory, for kernels that read them in place.

Legend: N blocks, H KV heads, D head_dim, T = 64 tokens of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.token_masks import to_flags

BLOCK_TOKENS = 64
ABSENT = -1
# Columns of a block's offsets: for keys, then for values at + SIDE_FIELDS, then the biases.
WORDS, MASKS, MID, SCALES, CODES, SIDE_FIELDS = range(6)
BIAS_STEPS, BIAS_CODES, NUM_FIELDS = 10, 11, 12
ESCAPE_ROWS, MID_ROWS = 0, 1


@dataclass(frozen=True, eq=False)
class SideTables:
    """The tables of keys or of values of one layer: x = (y * scale) @ inverse + mean.

    Attributes:
        mean: float32 (H, D), D a multiple of 16.
        scale: float32 (H, D), standard deviation of each component.
        inverse: float32 (H, D, D).
        layout: Bits of each component.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    inverse: torch.Tensor
    layout: PlaneLayout

    def __post_init__(self) -> None:
        """Raise ValueError for tables that do not belong together."""
        heads, head_dim = self.layout.num_heads, self.layout.dim
        if head_dim % 16:
            raise ValueError(f"head_dim must be a multiple of 16, not {head_dim}")
        for name, shape in (
            ("mean", (heads, head_dim)),
            ("scale", (heads, head_dim)),
            ("inverse", (heads, head_dim, head_dim)),
        ):
            table = getattr(self, name)
            if table.shape != shape or table.dtype != torch.float32:
                raise ValueError(
                    f"{name} must be float32 {shape}, not {table.dtype} {tuple(table.shape)}"
                )
            if table.device != self.layout.widths.device:
                raise ValueError(f"{name} and the layout must be on one device")

    @cached_property
    def word_starts(self) -> torch.Tensor:
        """First word of each head, and the number of words in all: int64 (H + 1,)."""
        return F.pad(self.layout.words_per_head.cumsum(0), (1, 0))

    @cached_property
    def num_words(self) -> int:
        """How many words a block has; known to the host, as ``mid_row_bytes`` is."""
        return int(self.word_starts[-1])

    @cached_property
    def mid_row_bytes(self) -> torch.Tensor:
        """Return int64 (H,), on the CPU: bytes of one mid token."""
        return self.layout.mid_row_bytes.cpu()

    @cached_property
    def projection(self) -> torch.Tensor:
        """What turns a row q into q . (dx / dy), for components that have codes: (H, D, R)."""
        kept = self.layout.num_kept(refined=True)
        return (self.scale[..., None] * self.inverse).mT[..., :kept].contiguous()


@dataclass(frozen=True, eq=False)
class BlockRows:
    """Which blocks rows stand for: what is the same in all layers.

    Attributes:
        starts: int64 (N,), what the offsets of each block count from, a byte of the arena.
        num_tokens: int64 (N,), tokens in each block, 0 to 64. Nothing of a block without tokens is
            looked at: such rows wait for ``put``.
    """

    starts: torch.Tensor
    num_tokens: torch.Tensor

    @classmethod
    def empty(cls, count: int) -> "BlockRows":
        """Return rows without tokens."""
        return cls(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))

    def __post_init__(self) -> None:
        """Raise ValueError unless both are as they should be."""
        for name in ("starts", "num_tokens"):
            table: torch.Tensor = getattr(self, name)
            if table.dtype != torch.int64 or table.ndim != 1:
                raise ValueError(f"{name} must be int64 (blocks,)")
            if table.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU")
            object.__setattr__(self, name, table.contiguous())
        if self.starts.shape != self.num_tokens.shape:
            raise ValueError(f"{len(self.starts)} starts, but {len(self.num_tokens)} num_tokens")
        if ((self.num_tokens < 0) | (self.num_tokens > BLOCK_TOKENS)).any():
            raise ValueError(f"a block holds 0 to {BLOCK_TOKENS} tokens")

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self.starts.nbytes + self.num_tokens.nbytes

    def put(self, rows: torch.Tensor, blocks: "BlockRows") -> None:
        """Let rows, int64 (n,), stand for other blocks."""
        self.starts[rows], self.num_tokens[rows] = blocks.starts, blocks.num_tokens

    def select(self, rows: torch.Tensor) -> "BlockRows":
        """Return some rows."""
        return BlockRows(self.starts[rows], self.num_tokens[rows])

    def widen(self, more: int) -> "BlockRows":
        """Return these rows and ``more`` empty ones behind them."""
        return BlockRows(*(F.pad(table, (0, more)) for table in (self.starts, self.num_tokens)))


@dataclass(frozen=True, eq=False)
class BlockPages:
    """Compressed blocks of one layer, in the bytes that came from the store.

    ``offsets`` names where each part of each block starts, so parts may lie anywhere near their
    block: a worker keeps the segments that it received and appends rows. The columns, for keys at 0
    and for values at ``SIDE_FIELDS``:

    - WORDS: uint64 bit planes, head after head, plane after plane; bit t is token t
    - MASKS: uint64 escape masks of all heads, then mid masks; both bits set mean dropped
    - MID: quarter codes of mid tokens, or ABSENT for a BASE read; two bit rows per token
    - SCALES: bf16 scale of each escape;  CODES: int8 (escapes, D), in Hadamard coordinates

    and BIAS_STEPS, uint8 (H,); BIAS_CODES, uint8 (H, D / 2). Rows lie by head, then token. WORDS
    and MASKS start at multiples of 8, SCALES of 2. Everything is checked when this is made.

    Attributes:
        arena: uint8, one dimension, contiguous.
        blocks: Which blocks there are; pages of other layers may share it.
        offsets: int32 (N, NUM_FIELDS), from each block's first byte on, on the CPU.
        keys: The tables that the keys were coded with.
        values: The same of the values.
        counts: uint8 (N, 2 sides, 2, H): escapes and mid tokens of each head, on the CPU.
        num_puts: How often ``put`` has changed rows, for whoever keeps copies.
    """

    arena: torch.Tensor
    blocks: BlockRows
    offsets: torch.Tensor
    keys: SideTables
    values: SideTables
    counts: torch.Tensor = field(init=False)
    num_puts: int = field(init=False, default=0)

    def put(
        self,
        rows: torch.Tensor,
        blocks: BlockRows,
        offsets: torch.Tensor,
        source: tuple[torch.Tensor, BlockRows] | None = None,
    ) -> None:
        """Point rows at other blocks in the arena, whose bytes are there already.

        While it runs, nobody may attend to these rows; to others, anybody may.

        Args:
            rows: int64 (n,), which ones.
            blocks: The n blocks; without tokens they empty a row.
            offsets: int32 (n, NUM_FIELDS).
            source: Memory of the host that holds the same bytes, and where the blocks are in it:
                checked in the arena's place, which may be on a device that is still to be waited
                for. Each block lies in the arena wholly and at a multiple of 8 bytes.

        Raises:
            ValueError: As when pages are made, or a row does not exist; nothing has changed then.
        """
        checked, places = source or (self.arena, blocks)
        new = BlockPages(checked, places, offsets, self.keys, self.values)
        _check_rows("rows", rows, len(self.blocks.starts))
        self.blocks.put(rows, blocks)
        self.offsets[rows], self.counts[rows] = offsets, new.counts
        object.__setattr__(self, "num_puts", self.num_puts + 1)

    def select(self, rows: torch.Tensor) -> "BlockPages":
        """Return some rows, int64 (n,), as pages of their own; they do not follow ``put``."""
        blocks = self.blocks.select(rows)
        return BlockPages(self.arena, blocks, self.offsets[rows], self.keys, self.values)

    def widen(self, blocks: BlockRows) -> "BlockPages":
        """Return pages of more rows: those of now, which stay as they are, then empty ones.

        Args:
            blocks: ``BlockRows.widen`` of those of now.
        """
        more = len(blocks.starts) - len(self.offsets)
        wider = object.__new__(BlockPages)  # what is held was checked when it came
        for name, value in (
            ("arena", self.arena),
            ("blocks", blocks),
            ("offsets", F.pad(self.offsets, (0, 0, 0, more), value=ABSENT)),
            ("keys", self.keys),
            ("values", self.values),
            ("counts", F.pad(self.counts, (0, 0, 0, 0, 0, 0, 0, more))),
            ("num_puts", self.num_puts),
        ):
            object.__setattr__(wider, name, value)
        return wider

    @property
    def num_bytes(self) -> int:
        """Bytes of what this holds of the blocks, without ``blocks``."""
        return self.offsets.nbytes + self.counts.nbytes

    def places(self, rows: torch.Tensor) -> torch.Tensor:
        """Return where in the arena the parts of some blocks start, or ABSENT: int64."""
        offsets = self.offsets[rows].long()
        return torch.where(offsets == ABSENT, ABSENT, offsets + self.blocks.starts[rows, None])

    def row_starts(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows in CODES and bytes in MID before each head: int64 (n, 2 sides, 2, H + 1)."""
        sides = (self.keys, self.values)
        mid_bytes = torch.stack([tables.mid_row_bytes for tables in sides])
        sizes = self.counts[rows].long()
        sizes[:, :, MID_ROWS] *= mid_bytes
        return F.pad(sizes.cumsum(-1), (1, 0))

    def __post_init__(self) -> None:
        """Raise ValueError unless every part lies within the arena, by the masks' own counts.

        Scales must be finite: a score that is no number would count as none.
        """
        if self.arena.dtype != torch.uint8 or self.arena.ndim != 1:
            raise ValueError("the arena must be uint8 with one dimension")
        if not self.arena.is_contiguous() or self.arena.data_ptr() % 8:
            raise ValueError("the arena must be contiguous and start at a multiple of 8 bytes")
        wanted = (len(self.blocks.starts), NUM_FIELDS)
        if self.offsets.dtype != torch.int32 or self.offsets.shape != wanted:
            raise ValueError(f"offsets must be int32 {wanted}")
        if self.offsets.device.type != "cpu":
            raise ValueError("offsets must be on the CPU")
        object.__setattr__(self, "offsets", self.offsets.contiguous())
        if self.keys.mean.shape != self.values.mean.shape:
            raise ValueError("the tables of keys and values have different shapes")
        heads, head_dim = self.keys.mean.shape
        filled = (self.blocks.num_tokens > 0).nonzero().flatten()
        offsets = self.places(filled)
        for at in (offsets[:, MASKS], offsets[:, SIDE_FIELDS + MASKS]):
            self._check_part("masks", at, 16 * heads, 8)
        object.__setattr__(self, "counts", self._count_rows())
        row_starts = self.row_starts(filled)
        for side, tables in enumerate((self.keys, self.values)):
            at = offsets[:, side * SIDE_FIELDS :]
            escapes, mid_bytes = row_starts[:, side, :, -1].unbind(1)
            present = at[:, MID] != ABSENT
            self._check_part("words", at[:, WORDS], 8 * tables.num_words, 8)
            self._check_part("mid", at[present, MID], mid_bytes[present], 1)
            self._check_part("scales", at[:, SCALES], 2 * escapes, 2)
            self._check_scales(at[:, SCALES], escapes)
            self._check_part("codes", at[:, CODES], head_dim * escapes, 1)
        self._check_part("bias steps", offsets[:, BIAS_STEPS], heads, 1)
        self._check_part("bias codes", offsets[:, BIAS_CODES], heads * head_dim // 2, 1)

    def _check_part(
        self, name: str, starts: torch.Tensor, num_bytes: torch.Tensor | int, alignment: int
    ) -> None:
        bad = (starts < 0) | (starts > self.arena.numel() - num_bytes) | (starts % alignment != 0)
        if bad.any():
            at = int(starts[bad][0])
            raise ValueError(
                f"{name} of a block at byte {at} do not fit the arena of {self.arena.numel()} "
                f"bytes, or {at} is not a multiple of {alignment}"
            )

    def _check_scales(self, starts: torch.Tensor, counts: torch.Tensor) -> None:
        firsts = (starts - 2 * (counts.cumsum(0) - counts)).repeat_interleave(counts)
        at = firsts[:, None] + torch.arange(2 * len(firsts)).view(-1, 2)
        if not self.arena[at.to(self.arena.device)].view(torch.bfloat16).isfinite().all():
            raise ValueError("a scale of an escape is not finite")

    @property
    def masks(self) -> torch.Tensor:
        """Bits of the masks: bool (N, 2 sides, 2 (escape, mid), H, T), on the CPU.

        All are set, as for dropped tokens, in a block without tokens.
        """
        heads = self.keys.mean.shape[0]
        filled = (self.blocks.num_tokens > 0).nonzero().flatten()
        places = self.places(filled)[:, [MASKS, SIDE_FIELDS + MASKS], None]
        at = places + torch.arange(16 * heads)
        packed = self.arena[at.to(self.arena.device)].cpu()
        shape = (2, 2, heads, BLOCK_TOKENS)
        flags = torch.ones(len(self.offsets), *shape, dtype=torch.bool)
        flags[filled] = to_flags(packed.view(torch.int64)).view(-1, *shape)
        return flags

    def _count_rows(self) -> torch.Tensor:
        escape, mid = self.masks.unbind(2)
        counts = torch.stack([(escape & ~mid).sum(-1), (mid & ~escape).sum(-1)], 2)
        return counts.to(torch.uint8)

    def take(self, at: int, num_bytes: int) -> torch.Tensor:
        """Return ``num_bytes`` of the arena from byte ``at`` on."""
        return self.arena[at : at + num_bytes]


class Turns(NamedTuple):
    """The rotation to each block's first token, at its absolute position.

    Attributes:
        cos: float32 (N, rotary_dim), as the model's rotary embedding gives it for these positions.
        sin: The same.
    """

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, eq=False)
class PageTable:
    """Which pages the sequences of a batch read, and where these stand.

    Worked example: pages (7, 2, 7), places (0, 1, 4), ends (0, 2, 2, 3): the first of three
    sequences reads page 7 and then 2, the second reads none, the third reads page 7 at another
    position.

    Attributes:
        pages: int64 (M,), rows of ``BlockPages``, sequence after sequence.
        places: int64 (M,), the row of ``Turns`` of each.
        ends: int64 (B + 1,), not decreasing: sequence i reads entries ends[i] to ends[i + 1] - 1.
    """

    pages: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "PageTable":
        """Return the table of sequences whose i-th page stands at place i."""
        lengths = torch.tensor([len(pages) for pages in sequences], dtype=torch.int64)
        return cls(
            torch.tensor([page for pages in sequences for page in pages], dtype=torch.int64),
            torch.cat([torch.arange(n) for n in [0, *lengths.tolist()]]),
            F.pad(lengths.cumsum(0), (1, 0)),
        )

    def __post_init__(self) -> None:
        """Raise ValueError unless the three belong together."""
        for name in ("pages", "places", "ends"):
            table: torch.Tensor = getattr(self, name)
            if table.dtype != torch.int64 or table.ndim != 1 or not table.is_contiguous():
                raise ValueError(f"{name} must be contiguous int64 with one dimension")
            if table.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU")
        if self.pages.shape != self.places.shape:
            raise ValueError(f"{len(self.pages)} pages, but {len(self.places)} places")
        ends = self.ends
        if not len(ends) or ends[0] != 0 or ends[-1] != len(self.pages) or (ends.diff() < 0).any():
            raise ValueError(f"ends must rise from 0 to {len(self.pages)}: {ends.tolist()[:8]}")
        if len(self.pages) and min(self.pages.min(), self.places.min()) < 0:
            raise ValueError("pages and places must not be negative")

    @property
    def num_sequences(self) -> int:
        """Return B."""
        return len(self.ends) - 1

    @cached_property
    def least_rows(self) -> tuple[int, int]:
        """Return how many rows of ``BlockPages`` and of ``Turns`` this needs."""
        if not len(self.pages):
            return 0, 0
        return int(self.pages.max()) + 1, int(self.places.max()) + 1


def _check_rows(name: str, rows: torch.Tensor, count: int) -> None:
    if rows.dtype != torch.int64 or rows.ndim != 1 or ((rows < 0) | (rows >= count)).any():
        raise ValueError(f"{name} must be int64 and below {count}")
