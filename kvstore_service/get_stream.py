"""Cutting strata that were read into the messages of a Get stream."""

from collections.abc import Iterator, Mapping, Sequence

from kvstrata.kvstore_service.data_codec import GetPart
from kvstrata.kvstore_service.lower_reader import Found, Piece, Read
from kvstrata.kvstore_service.namespace import Namespace
from kvstrata.kvstore_service.wire import stratum_enum
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import InvalidRequestError
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import ScopeDigest
from kvstrata.protos.service import CHUNK_BYTES, MAX_WHOLE_BYTES

_MAX_SHARED_BYTES = CHUNK_BYTES * 5 // 4

LayerRange = tuple[int, int] | None


def layer_range(request: pb.GetRequest) -> LayerRange:
    """Return the wanted layers, None for all; ``InvalidRequestError`` for an empty range."""
    first, last = request.first_layer, request.last_layer
    if first == last == 0:
        return None
    if first >= last:
        raise InvalidRequestError(
            f"[{first}, {last}) is no range of layers",
            "give first_layer < last_layer, or 0, 0 for all",
        )
    return first, last


def shown(read: Read, scope: ScopeDigest, namespace: Namespace) -> Read:
    """Return what was read as its tenant put it."""
    if not namespace.owner:
        return read
    return {
        stratum: Piece(namespace.shown(scope, found.frame), found.tier)
        if isinstance(found, Piece)
        else found
        for stratum, found in read.items()
    }


def get_parts(
    first_index: int, reads: Sequence[Mapping[int, Found]], layers: LayerRange
) -> Iterator[GetPart]:
    """Yield the messages that carry ``reads``: about 1 MiB each, small blocks together.

    Args:
        first_index: Index of the first block of ``reads`` in the request.
        reads: Blocks, each with the wanted strata in the order to send them.
        layers: Which layers to send.
    """
    pieces: list[pb.Piece] = []
    data: list[memoryview] = []
    num_bytes = 0
    for index, read in enumerate(reads, first_index):
        for stratum, found in read.items():
            for piece, part in _pieces(index, stratum, found, layers):
                if num_bytes and num_bytes + len(part) > _MAX_SHARED_BYTES:
                    yield GetPart(pieces, data)
                    pieces, data, num_bytes = [], [], 0
                pieces.append(piece)
                data.append(part)
                num_bytes += len(part)
    if pieces:
        yield GetPart(pieces, data)


def _pieces(
    index: int, stratum: int, found: Found, layers: LayerRange
) -> Iterator[tuple[pb.Piece, memoryview]]:
    """Yield the pieces of one stratum, or its miss."""
    number = stratum_enum(stratum)
    if not isinstance(found, Piece):
        miss = pb.Miss(reason=found)
        yield pb.Piece(index=index, stratum=number, last=True, miss=miss), memoryview(b"")
        return
    frame = memoryview(found.frame)
    ranges = _byte_ranges(found.frame, layers)
    for begin, end in ranges:
        piece = pb.Piece(
            index=index,
            stratum=number,
            frame_bytes=0 if begin else len(frame),
            offset=begin,
            length=end - begin,
            last=end == ranges[-1][1],
            tier=found.tier,
        )
        yield piece, frame[begin:end]


def _byte_ranges(frame: bytes, layers: LayerRange) -> list[tuple[int, int]]:
    """Return the half-open ranges to send, none longer than a message."""
    if layers is None:
        return _cut(0, len(frame))
    opened = Frame.open(frame)
    begin, end = opened.layer_run(*layers)
    return _cut(0, opened.head_bytes) + _cut(begin, end)


def _cut(begin: int, end: int) -> list[tuple[int, int]]:
    if begin < end <= begin + MAX_WHOLE_BYTES:
        return [(begin, end)]
    return [(first, min(first + CHUNK_BYTES, end)) for first in range(begin, end, CHUNK_BYTES)]
