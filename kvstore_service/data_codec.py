"""The two messages that carry frames, encoded and decoded with one copy of the bytes or none.

Protobuf's own runtime copies a ``bytes`` field three times on its way out and twice on its way in,
which halves the throughput of Put and Get. The bytes on the wire are those of ``kvstore.proto``.
Any peer may use the generated stubs instead.
"""

from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from kvstrata.protos import kvstore_pb2 as pb

_PUT_OPEN_TAG = b"\x0a"  # field 1, length-delimited
_PUT_DATA_TAG = b"\x12"  # field 2, length-delimited
_GET_DATA_TAG = b"\x0a"  # field 1, length-delimited


class PutPart(NamedTuple):
    """A ``PutRequest``: the block that it opens, if it does, and bytes of the open block."""

    opening: pb.PutOpen | None
    data: Sequence[bytes | memoryview]


class GetPart(NamedTuple):
    """A ``GetReply``: its pieces and their bytes, one after another."""

    pieces: Sequence[pb.Piece]
    data: Sequence[bytes | memoryview]


def encode_put_request(part: PutPart) -> bytes:
    """Return the message of a part."""
    head = b""
    if part.opening is not None:
        opening = part.opening.SerializeToString()
        head = b"".join((_PUT_OPEN_TAG, _varint(len(opening)), opening))
    size = sum(map(len, part.data))
    if not size:
        return head
    return b"".join((head, _PUT_DATA_TAG, _varint(size), *part.data))


def decode_put_request(message: bytes) -> PutPart:
    """Return the part; its data is one view of ``message``, or nothing.

    Raises:
        DecodeError: Not a ``PutRequest``.
    """
    rest, view = _split(message, _PUT_DATA_TAG[0])
    request = pb.PutRequest.FromString(rest)
    data = request.data or view
    opening = request.open if request.HasField("open") else None
    return PutPart(opening, (data,) if len(data) else ())


def encode_get_reply(part: GetPart) -> bytes:
    """Return the message of pieces and their data."""
    pieces = pb.GetReply(pieces=part.pieces).SerializeToString()
    size = sum(map(len, part.data))
    if not size:
        return pieces
    return b"".join((_GET_DATA_TAG, _varint(size), *part.data, pieces))


def decode_get_reply(message: bytes) -> GetPart:
    """Return the pieces, and a view of ``message`` for the data of each.

    Raises:
        DecodeError: Not a ``GetReply``, or its pieces do not add up to its data.
    """
    rest, whole = _split(message, _GET_DATA_TAG[0])
    reply = pb.GetReply.FromString(rest)
    whole = memoryview(reply.data) if reply.data else whole
    data = []
    cursor = 0
    pieces = list(reply.pieces)
    for piece in pieces:
        end = cursor + piece.length
        data.append(whole[cursor:end])
        cursor = end
    if cursor != len(whole):
        raise DecodeError(f"pieces of {cursor} bytes came with {len(whole)}")
    return GetPart(pieces, data)


def _split(message: bytes, tag: int) -> tuple[bytes, memoryview]:
    """Return the message without its first field of that tag, and a view of the field's bytes."""
    cursor = 0
    while cursor < len(message):
        found, value = _read_varint(message, cursor)
        if found == tag:
            length, first = _read_varint(message, value)
            end = first + length
            if end > len(message):
                raise DecodeError("truncated message")
            return message[:cursor] + message[end:], memoryview(message)[first:end]
        cursor = _skip(message, value, found & 7)
    return message, memoryview(b"")


def _skip(message: bytes, first: int, wire_type: int) -> int:
    """Return where the field whose value starts at ``first`` ends."""
    if wire_type == 0:
        return _read_varint(message, first)[1]
    if wire_type == 1:
        return first + 8
    if wire_type == 2:
        length, begin = _read_varint(message, first)
        return begin + length
    if wire_type == 5:
        return first + 4
    raise DecodeError(f"wire type {wire_type}")


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(message: bytes, first: int) -> tuple[int, int]:
    """Return the number at ``first`` and the offset after it."""
    number = 0
    for position in range(first, min(first + 10, len(message))):
        byte = message[position]
        number |= (byte & 0x7F) << (7 * (position - first))
        if byte < 0x80:
            return number, position + 1
    raise DecodeError("truncated number")
