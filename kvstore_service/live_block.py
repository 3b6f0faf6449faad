"""A block while it is being made: its segments so far, and how it ended."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstrata.kvstore_service.segment_assembly import StoredSegment
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.kvstore_pb2 import StratumHead


@dataclass(frozen=True, slots=True)
class Ending:
    """How a block ended.

    Attributes:
        reason: Why it was not committed; empty if it was.
        heads: What completes each stratum's segments; empty unless committed.
    """

    reason: str
    heads: Mapping[int, StratumHead] = field(default_factory=dict)


class LiveBlock:
    """What a writer has sent of a block. Any number of readers follow it, each at its own pace.

    One event loop owns it. Segments are kept until the block and its last reader are gone, so a
    reader that comes late starts from the first. A reader looks at ``segments`` from where it
    was and at ``ending``, then waits for the ``news`` that it took before it looked.

    Attributes:
        key: The stored key.
        header: What the block's frames will say, as its writer knows the block.
        segments: In the order of arrival.
        num_bytes: Of all segments.
        heard_at: Loop time at which the writer last showed that it gets on.
        ending: None while it is written.
    """

    def __init__(self, key: BlockKey, header: FrameHeader) -> None:
        self.key = key
        self.header = header
        self.segments: list[StoredSegment] = []
        self.num_bytes = 0
        self.heard_at = asyncio.get_running_loop().time()
        self.ending: Ending | None = None
        self.news = asyncio.Event()

    def add(self, segment: StoredSegment) -> None:
        """Let readers have the next segment."""
        self.segments.append(segment)
        self.num_bytes += len(segment.data)
        self.touch()
        self._tell()

    def touch(self) -> None:
        """Note that the writer gets on."""
        self.heard_at = asyncio.get_running_loop().time()

    def end(self, ending: Ending) -> None:
        """Tell every reader how it ended. Of several endings the first holds."""
        if self.ending is None:
            self.ending = ending
            self._tell()

    def _tell(self) -> None:
        told, self.news = self.news, asyncio.Event()
        told.set()
