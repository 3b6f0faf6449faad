"""When a block may be committed: what its frames must say about it and about each other."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from kvstrata.kvstore_service.segment_assembly import StoredSegment
from kvstrata.kvstore_service.tier import SEALED_MAGIC
from kvstrata.protos.errors import CorruptFrameError, KVStrataError
from kvstrata.protos.frame import Frame, open_head, stratum_name
from kvstrata.protos.frame_pb2 import FrameHeader, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, HASH_BYTES, BlockKey, block_hash

BASE, MID = int(Stratum.STRATUM_BASE), int(Stratum.STRATUM_MID)
FINE, EXACT = int(Stratum.STRATUM_FINE), int(Stratum.STRATUM_EXACT)
ALL_STRATA = (BASE, MID, FINE, EXACT)
UNDECRYPTABLE = "undecryptable"  # a miss, not damage: another process may have the key
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


_SAID_BEFORE = (
    *("scope", "block_hash", "parent_hash", "token_ids", "first_position"),
    *("codec", "codec_version", "profile", "rope"),
    *("kv_dtype", "num_layers", "num_kv_heads", "head_dim"),
)


def check_draft(key: BlockKey, header: FrameHeader, strata: Collection[int]) -> None:
    """Raise ``BlockRejectedError`` unless ``header`` may be that of a block that is being made."""
    if set(strata) not in VALID_SUBSETS:
        raise BlockRejectedError("strata", f"{_named(strata)} is no valid set of strata")
    if header.scope != key.scope or header.block_hash != key.block_hash:
        raise BlockRejectedError("identity", "the header belongs to another block")
    if header.segments or header.attachments:
        raise BlockRejectedError("identity", "a block that is being made has no tables yet")
    _check_tokens(key, header)


def check_finished(draft: FrameHeader, head: bytes, segments: Sequence[StoredSegment]) -> None:
    """Raise ``BlockRejectedError`` unless a frame's head fits what was said and sent before it."""
    try:
        header = open_head(head)[0]
    except CorruptFrameError as error:
        raise BlockRejectedError("corrupt", error.message) from error
    for name in _SAID_BEFORE:
        if getattr(header, name) != getattr(draft, name):
            raise BlockRejectedError("identity", f"{name} is not what the opening said")
    table = [(entry.layer, entry.length, entry.checksum) for entry in header.segments]
    if table != [(s.layer, len(s.data), s.checksum) for s in segments]:
        raise BlockRejectedError("corrupt", "the offset table describes other segments than came")


def check_block(key: BlockKey, frames: Mapping[int, bytes]) -> None:
    """Raise ``BlockRejectedError`` unless ``frames`` make up the block, every checksum included."""
    if set(frames) not in VALID_SUBSETS:
        raise BlockRejectedError("strata", f"{_named(frames)} is no valid set of strata")
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


def _named(strata: Iterable[int]) -> str:
    return "+".join(stratum_name(s) for s in sorted(strata)) or "nothing"


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
    if frame[: len(SEALED_MAGIC)] == SEALED_MAGIC:
        raise BlockRejectedError(UNDECRYPTABLE, "it is encrypted, and the key is not here")
    try:
        opened = Frame.open(frame, is_stored=True)  # verify checks the table
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
