"""The reader's side of an Attach stream: provisional segments, and how each block ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvstrata.kvstore_service.segment_assembly import SegmentAssembly, StoredSegment
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import CorruptFrameError, LimitError, MalformedMessageError
from kvstrata.protos.frame import Frame, assemble_frame
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockKey


@dataclass(frozen=True, slots=True)
class AttachedSegment:
    """One layer of one stratum of a block that has not ended yet: provisional.

    Attributes:
        index: Into the hashes asked for.
        header: What the block's frames say, as far as its writer knows the block.
        stratum: Which one.
        layer: Which one.
        data: The bytes; their checksum holds.
    """

    index: int
    header: FrameHeader
    stratum: int
    layer: int
    data: bytes


@dataclass(frozen=True, slots=True)
class AttachedBlock:
    """How one block ended.

    Attributes:
        index: Into the hashes asked for.
        frames: Its strata, if it is committed.
        missing: Wanted strata that it lacks, and why.
        reason: Why it is not committed: nothing that came of it may be used. Empty if it is.
        tier: Where the store found it; "live" if it was being written.
        num_bytes: Bytes of frames received.
    """

    index: int
    frames: dict[int, Frame] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)
    reason: str = ""
    tier: str = ""
    num_bytes: int = 0


class _Coming:
    """A block of which something has come."""

    def __init__(self, header: FrameHeader, strata: Sequence[int], max_bytes: int) -> None:
        self.header = header
        self.assemblies = {stratum: SegmentAssembly(max_bytes) for stratum in strata}
        self.segments: dict[int, list[StoredSegment]] = {stratum: [] for stratum in strata}


class Attachment:
    """What has come of each wanted block. Verifies everything that it yields.

    Args:
        keys: The wanted blocks.
        strata: The wanted strata.
        max_frame_bytes: A stratum that grows beyond this ends its block as "corrupt".
    """

    def __init__(self, keys: Sequence[BlockKey], strata: Sequence[int], max_bytes: int) -> None:
        self._keys = keys
        self._strata = strata
        self._max_bytes = max_bytes
        self._coming: dict[int, _Coming] = {}
        self._ended: set[int] = set()

    def take(self, reply: pb.AttachReply) -> Iterator[AttachedSegment | AttachedBlock]:
        """Yield what a reply brings. What comes of a block after its end is dropped."""
        for opened in reply.opened:
            yield from self._open(opened)
        for part in reply.segments:
            yield from self._add(part)
        for done in reply.done:
            if self._is_expected(done.block):
                yield self._end(self._finish(done))
        for miss in reply.misses:
            if self._is_expected(miss.block):
                yield self._end(AttachedBlock(miss.block, reason=miss.miss.reason or "absent"))

    def unfinished(self) -> Iterator[AttachedBlock]:
        """Yield the blocks that a store which broke its promise left without an end."""
        for index in range(len(self._keys)):
            if index not in self._ended:
                yield self._end(AttachedBlock(index, reason="absent"))

    def _is_expected(self, index: int) -> bool:
        return index < len(self._keys) and index not in self._ended

    def _open(self, opened: pb.AttachOpened) -> Iterator[AttachedBlock]:
        index, header = opened.block, opened.header
        if not self._is_expected(index):
            return
        key = self._keys[index]
        if (header.scope, header.block_hash) != (key.scope, key.block_hash):
            yield self._end(AttachedBlock(index, reason="corrupt"))
            return
        self._coming[index] = _Coming(header, self._strata, self._max_bytes)

    def _add(self, part: pb.LayerSegment) -> Iterator[AttachedSegment | AttachedBlock]:
        coming = self._coming.get(part.block)
        stratum = int(part.stratum)
        if coming is None or stratum not in coming.segments:
            return
        try:
            segment = coming.assemblies[stratum].add(part)
        except (CorruptFrameError, LimitError, MalformedMessageError):
            yield self._end(AttachedBlock(part.block, reason="corrupt"))
            return
        if segment is not None:
            coming.segments[stratum].append(segment)
            yield AttachedSegment(part.block, coming.header, stratum, segment.layer, segment.data)

    def _finish(self, done: pb.AttachDone) -> AttachedBlock:
        coming = self._coming.get(done.block)
        if coming is None:
            return AttachedBlock(done.block, reason="corrupt")
        try:
            frames = {
                int(head.stratum): self._frame(coming, int(head.stratum), head)
                for head in done.heads
            }
        except CorruptFrameError:
            return AttachedBlock(done.block, reason="corrupt")
        return AttachedBlock(
            done.block,
            frames,
            {int(missing.stratum): missing.miss.reason for missing in done.missing},
            tier=done.tier,
            num_bytes=sum(len(s.data) for found in coming.segments.values() for s in found)
            + sum(len(head.head) + sum(map(len, head.attachments)) for head in done.heads),
        )

    def _frame(self, coming: _Coming, stratum: int, head: pb.StratumHead) -> Frame:
        segments = coming.segments.get(stratum)
        if segments is None:
            raise CorruptFrameError(f"stratum {stratum} was not asked for")
        parts = [*(segment.data for segment in segments), *head.attachments]
        frame = Frame.open(assemble_frame(head.head, parts, self._max_bytes))
        header = frame.header
        said = (coming.header.scope, coming.header.block_hash, stratum)
        if (header.scope, header.block_hash, header.stratum) != said:
            raise CorruptFrameError("the head belongs to another block or stratum")
        if [entry.checksum for entry in header.segments] != [s.checksum for s in segments]:
            raise CorruptFrameError("the offset table describes other segments than came")
        return frame

    def _end(self, block: AttachedBlock) -> AttachedBlock:
        self._coming.pop(block.index, None)
        self._ended.add(block.index)
        return block
