"""When a block may be committed: what its frames must say about it and about each other."""

from collections.abc import Mapping

from kvstrata.protos.errors import CorruptFrameError, KVStrataError
from kvstrata.protos.frame import Frame, stratum_name
from kvstrata.protos.frame_pb2 import FrameHeader, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, HASH_BYTES, BlockKey, block_hash

BASE, MID = int(Stratum.STRATUM_BASE), int(Stratum.STRATUM_MID)
FINE, EXACT = int(Stratum.STRATUM_FINE), int(Stratum.STRATUM_EXACT)
ALL_STRATA = (BASE, MID, FINE, EXACT)
VALID_SUBSETS = ({BASE}, {BASE, MID}, {BASE, MID, FINE}, {EXACT})


class BlockRejectedError(KVStrataError):
    """A block that breaks the commit rule; never leaves the store but as a REJECTED reply.

    Args:
        kind: One word for the counters.
        message: What was wrong.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def check_block(key: BlockKey, frames: Mapping[int, bytes]) -> None:
    """Raise ``BlockRejectedError`` unless ``frames`` make up the block, every checksum included."""
    if set(frames) not in VALID_SUBSETS:
        names = "+".join(stratum_name(s) for s in sorted(frames)) or "nothing"
        raise BlockRejectedError("strata", f"{names} is no valid set of strata")
    headers = [open_verified(key, stratum, frame) for stratum, frame in frames.items()]
    first = headers[0]
    if len({header.encoding_id for header in headers}) > 1:
        raise BlockRejectedError("encoding", "the strata come from different writings")
    if len(first.encoding_id) != HASH_BYTES:
        raise BlockRejectedError("encoding", f"encoding_id must be {HASH_BYTES} bytes")
    if any(header.token_ids != first.token_ids for header in headers):
        raise BlockRejectedError("tokens", "the strata name different tokens")
    if any(header.parent_hash != first.parent_hash for header in headers):
        raise BlockRejectedError("tokens", "the strata name different parents")
    _check_tokens(key, first)


def _check_tokens(key: BlockKey, header: FrameHeader) -> None:
    if len(header.token_ids) != BLOCK_TOKENS:
        raise BlockRejectedError(
            "tokens", f"a block has {BLOCK_TOKENS} token ids, not {len(header.token_ids)}"
        )
    if block_hash(header.parent_hash, header.token_ids) != key.block_hash:
        raise BlockRejectedError("tokens", "the block hash is not that of parent and tokens")


def open_verified(key: BlockKey, stratum: int, frame: bytes) -> FrameHeader:
    """Return the header of a frame that is wholly verified and belongs to ``key`` and ``stratum``.

    Raises:
        BlockRejectedError: A checksum does not hold, or it is another block's or stratum's frame.
    """
    try:
        opened = Frame.open(frame)
        opened.verify()
    except CorruptFrameError as error:
        raise BlockRejectedError("corrupt", error.message) from error
    header = opened.header
    if header.scope != key.scope or header.block_hash != key.block_hash:
        raise BlockRejectedError("identity", "the frame belongs to another block")
    if header.stratum != stratum:
        raise BlockRejectedError(
            "identity", f"a frame of stratum {header.stratum} came as {stratum_name(stratum)}"
        )
    return header
