"""Where a block stands in its prompt, as its frames say: what comes before it."""

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import PRELUDE_BYTES, head_size
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BLOCK_TOKENS, HASH_BYTES, BlockHash, BlockKey


@dataclass(frozen=True, slots=True)
class Ancestry:
    """Of one block.

    Attributes:
        parent: The block before; None for a first block.
        depth: How many blocks come before it.
    """

    parent: BlockKey | None
    depth: int


def ancestry(key: BlockKey, frames: Mapping[int, bytes]) -> Ancestry | None:
    """Return where the block stands; None for bytes that are no frame. Nothing is verified here."""
    frame = next(iter(frames.values()), b"")
    try:
        header = FrameHeader.FromString(frame[PRELUDE_BYTES : head_size(frame)])
    except (CorruptFrameError, DecodeError):
        return None
    return ancestry_by(key, header)


def ancestry_by(key: BlockKey, header: FrameHeader) -> Ancestry:
    """Return where the block stands by the header of one of its frames."""
    depth = header.first_position // BLOCK_TOKENS
    if len(header.parent_hash) != HASH_BYTES or header.parent_hash == key.scope:
        return Ancestry(None, depth)
    return Ancestry(BlockKey(key.scope, BlockHash(header.parent_hash)), depth)
