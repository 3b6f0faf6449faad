"""What the store's client found: the values that its look-ups and reads return."""

from dataclasses import dataclass

from kvstrata.kvstore_service.frame_assembly import FrameAssembly
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BlockKey


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """One block of a run: its strata, their bytes in all, and the nearest tier that holds it."""

    strata: tuple[int, ...]
    num_bytes: int
    tier: str


@dataclass(frozen=True, slots=True)
class LookupResult:
    """The longest run of committed blocks.

    Attributes:
        blocks: The run.
        degraded: A tier was silent, so the run may be longer.
        pending: Blocks right after the run that somebody writes now.
    """

    blocks: tuple[FoundBlock, ...]
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


def fetched(reply: pb.GetReply, key: BlockKey, assembly: FrameAssembly) -> FetchedStratum:
    """Return the stratum that ``reply`` closes; a miss if it is not what was asked for."""
    try:
        frame = assembly.finish(key, reply.stratum)
    except CorruptFrameError:
        return FetchedStratum(reply.index, reply.stratum, None, "corrupt", reply.tier)
    return FetchedStratum(
        reply.index, reply.stratum, frame, tier=reply.tier, num_bytes=assembly.num_bytes
    )
