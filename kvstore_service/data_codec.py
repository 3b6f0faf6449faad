"""The two messages that carry frames, encoded and decoded with one copy of the bytes or none.

Protobuf's own runtime copies a ``bytes`` field three times on its way out and twice on its way in,
which halves the throughput of Put and Get. The bytes on the wire are those of ``kvstore.proto``: a
``PutRequest`` with ``data``, and a ``GetReply`` whose ``data`` comes last. Any peer may use the
generated stubs instead.
"""

from google.protobuf.message import DecodeError

from kvstrata.protos import kvstore_pb2 as pb

_PUT_DATA_TAG = b"\x12"  # field 2, length-delimited
_GET_DATA_TAG = b"\x2a"  # field 5, length-delimited
_GET_DATA_FIELD = 5

GetPiece = tuple[pb.GetReply, bytes | memoryview]
"""A reply without its data, and the data."""


def encode_put_request(request: pb.PutRequest | memoryview) -> bytes:
    """Return the message of an opening, or of a piece of data."""
    if isinstance(request, memoryview):
        return b"".join((_PUT_DATA_TAG, _varint(len(request)), request))
    return request.SerializeToString()


def decode_put_request(message: bytes) -> pb.PutRequest:
    """Return the request; data that fills its message is copied once."""
    if message[:1] == _PUT_DATA_TAG:
        length, first = _read_varint(message, 1)
        if first + length == len(message):
            return DataRequest(message[first:])  # type: ignore[return-value]
    return pb.PutRequest.FromString(message)


class DataRequest:
    """A ``PutRequest`` that holds nothing but data."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def WhichOneof(self, _: str) -> str:  # noqa: N802
        """Return "data", as the message would."""
        return "data"


def encode_get_reply(piece: GetPiece) -> bytes:
    """Return the message of a reply and its data."""
    reply, data = piece
    if not data:
        return reply.SerializeToString()
    return b"".join((reply.SerializeToString(), _GET_DATA_TAG, _varint(len(data)), data))


def decode_get_reply(message: bytes) -> GetPiece:
    """Return the reply without its data, and the data as a view of ``message``.

    Raises:
        DecodeError: Not a ``GetReply``.
    """
    view = memoryview(message)
    data: bytes | memoryview = b""
    rest: list[memoryview] = []
    cursor = 0
    while cursor < len(message):
        tag, value = _read_varint(message, cursor)
        end = _skip(message, value, tag & 7)
        if tag >> 3 == _GET_DATA_FIELD and tag & 7 == 2:
            data = view[_read_varint(message, value)[1] : end]
        else:
            rest.append(view[cursor:end])
        cursor = end
    return pb.GetReply.FromString(b"".join(rest)), data


def _skip(message: bytes, first: int, wire_type: int) -> int:
    """Return where the field whose value starts at ``first`` ends."""
    if wire_type == 0:
        end = _read_varint(message, first)[1]
    elif wire_type == 1:
        end = first + 8
    elif wire_type == 2:
        length, begin = _read_varint(message, first)
        end = begin + length
    elif wire_type == 5:
        end = first + 4
    else:
        raise DecodeError(f"wire type {wire_type}")
    if end > len(message):
        raise DecodeError("truncated message")
    return end


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
