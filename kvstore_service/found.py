"""What the store's client found: the values that its look-ups and reads return."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from kvstrata.kvstore_service.data_codec import GetPart
from kvstrata.kvstore_service.frame_assembly import FrameAssembly
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BlockHash, ScopeDigest


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """One block of a run: its strata, their bytes in all, and the nearest tier that holds it."""

    strata: tuple[int, ...]
    num_bytes: int
    tier: str


class FoundBlocks(Sequence[FoundBlock]):
    """The blocks of a run, each made when it is asked for.

    Args:
        reply: The store's answer; columns that disagree are cut to the shortest.
    """

    def __init__(self, reply: pb.LookupReply) -> None:
        self._strata, self._tiers = reply.strata, reply.tiers
        self._num_bytes = reply.block_bytes
        self._tier_names = reply.tier_names
        self._length = min(map(len, (self._strata, self._tiers, self._num_bytes)))

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> FoundBlock: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[FoundBlock]: ...

    def __getitem__(self, index: "int | slice") -> "FoundBlock | Sequence[FoundBlock]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        position = range(self._length)[index]
        tier = self._tiers[position]
        name = self._tier_names[tier] if tier < len(self._tier_names) else ""
        return FoundBlock(_STRATA[self._strata[position]], self._num_bytes[position], name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


_STRATA = [tuple(s for s in range(8) if mask >> s & 1) for mask in range(256)]


@dataclass(frozen=True, slots=True)
class LookupResult:
    """The longest run of committed blocks.

    Attributes:
        blocks: The run.
        degraded: A tier was silent, so the run may be longer.
        pending: Blocks right after the run that somebody writes now.
    """

    blocks: Sequence[FoundBlock]
    degraded: bool
    pending: int = 0


@dataclass(frozen=True, slots=True)
class FetchedStratum:
    """One stratum of one wanted block, or why it is missing.

    Attributes:
        index: Into the hashes asked for.
        stratum: Which one.
        frame: Header verified; a segment is verified when it is taken. None on a miss.
        miss: Why there is no frame; empty when there is one.
        tier: Where the store found it.
        num_bytes: Bytes received.
    """

    index: int
    stratum: int
    frame: Frame | None
    miss: str = ""
    tier: str = ""
    num_bytes: int = 0


class GetAssembly:
    """What one Get asked for, as it arrives.

    Args:
        scope: Whose blocks.
        hashes: Which blocks.
        max_frame_bytes: A frame announced larger than this is refused.
    """

    def __init__(
        self, scope: ScopeDigest, hashes: Sequence[BlockHash], max_frame_bytes: int
    ) -> None:
        self._scope = scope
        self._hashes = hashes
        self._max_frame_bytes = max_frame_bytes
        self._frame: FrameAssembly | None = None

    def add(self, part: GetPart) -> Iterator[FetchedStratum]:
        """Take a message and yield the strata that it closes.

        Raises:
            CorruptFrameError: Pieces that do not fit together, too large a frame, or a block that
                was not asked for.
        """
        for piece, data in zip(part.pieces, part.data, strict=True):
            if piece.index >= len(self._hashes):
                raise CorruptFrameError(f"block {piece.index} of {len(self._hashes)} came")
            if piece.HasField("miss"):
                self._frame = None
                yield FetchedStratum(piece.index, piece.stratum, None, piece.miss.reason)
                continue
            if self._frame is None:
                self._frame = FrameAssembly(piece.frame_bytes, self._max_frame_bytes)
            self._frame.add(piece.offset, data)
            if piece.last:
                yield self._fetched(piece, self._frame)
                self._frame = None

    def _fetched(self, piece: pb.Piece, assembly: FrameAssembly) -> FetchedStratum:
        index, stratum = piece.index, piece.stratum
        try:
            frame = assembly.finish(self._scope, self._hashes[index], stratum)
        except CorruptFrameError:
            return FetchedStratum(index, stratum, None, "corrupt", piece.tier)
        return FetchedStratum(index, stratum, frame, "", piece.tier, assembly.num_bytes)
