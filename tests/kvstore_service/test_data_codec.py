"""The data codec speaks the same bytes as protobuf."""

import random
from collections.abc import Sequence

import pytest
from google.protobuf.message import DecodeError

from kvstrata.kvstore_service.data_codec import (
    GetPart,
    PutPart,
    decode_get_reply,
    decode_put_request,
    encode_get_reply,
    encode_put_request,
)
from kvstrata.protos import kvstore_pb2 as pb

OPENING = pb.PutOpen(key=pb.BlockKey(scope=b"s" * 16))


def joined(data: Sequence[bytes | memoryview]) -> bytes:
    return b"".join(data)


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 1 << 20])
@pytest.mark.parametrize("opening", [None, OPENING], ids=["data", "open and data"])
def test_both_sides_agree_with_the_generated_put_request(
    size: int, opening: pb.PutOpen | None
) -> None:
    data = random.Random(size).randbytes(size)
    request = pb.PutRequest(open=opening, data=data)
    parts = (data[: size // 3], memoryview(data)[size // 3 :])
    assert encode_put_request(PutPart(opening, parts)) == request.SerializeToString()
    decoded = decode_put_request(request.SerializeToString())
    assert (decoded.opening, joined(decoded.data)) == (opening, data)


@pytest.mark.parametrize("sizes", [[1], [127, 1], [128, 0, 5], [16_384] * 3, [1 << 20]])
def test_both_sides_agree_with_the_generated_get_reply(sizes: list[int]) -> None:
    data = [random.Random(size).randbytes(size) for size in sizes]
    pieces = [pb.Piece(index=7, length=size, tier="dram", last=True) for size in sizes]
    reply = pb.GetReply(data=joined(data), pieces=pieces)
    assert encode_get_reply(GetPart(pieces, data)) == reply.SerializeToString()
    decoded = decode_get_reply(reply.SerializeToString())
    assert (decoded.pieces, list(map(bytes, decoded.data))) == (pieces, data)


def test_fields_of_other_peers_may_come_in_any_order() -> None:
    last = pb.GetReply(data=b"abc").SerializeToString()
    first = pb.GetReply(pieces=[pb.Piece(length=1), pb.Piece(length=2)]).SerializeToString()
    assert list(map(bytes, decode_get_reply(first + last).data)) == [b"a", b"bc"]
    twice = pb.GetReply(data=b"lost").SerializeToString() + last + first
    assert list(map(bytes, decode_get_reply(twice).data)) == [b"a", b"bc"], "as protobuf has it"
    head = pb.PutRequest(open=OPENING).SerializeToString()
    decoded = decode_put_request(pb.PutRequest(data=b"x").SerializeToString() + head)
    assert (decoded.opening, joined(decoded.data)) == (OPENING, b"x")


def test_openings_and_misses_pass_unchanged() -> None:
    assert decode_put_request(encode_put_request(PutPart(OPENING, ()))) == (OPENING, ())
    miss = pb.Piece(index=1, last=True, miss=pb.Miss(reason="absent"))
    assert decode_get_reply(encode_get_reply(GetPart([miss], [b""]))) == ([miss], [b""])


def test_pieces_that_do_not_add_up_to_their_data_are_refused() -> None:
    for length in (2, 4, 1 << 63):
        reply = pb.GetReply(data=b"abc", pieces=[pb.Piece(length=length)])
        with pytest.raises(DecodeError, match="came with 3"):
            decode_get_reply(reply.SerializeToString())


def test_damaged_messages_raise_nothing_but_a_decode_error() -> None:
    source = random.Random(3)
    pieces = [
        pb.Piece(index=300, frame_bytes=1 << 40, length=50, tier="dram"),
        pb.Piece(length=7, last=True),
    ]
    good = [
        pb.GetReply(pieces=pieces, data=b"x" * 57).SerializeToString(),
        pb.PutRequest(open=OPENING, data=b"x" * 57).SerializeToString(),
    ]
    for turn in range(6000):
        damaged = bytearray(good[turn % 2])
        for _ in range(source.randrange(1, 4)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        del damaged[source.randrange(len(damaged)) :]
        for decode in (decode_get_reply, decode_put_request):
            try:
                decode(bytes(damaged))
            except DecodeError:
                continue
