"""The data codec speaks the same bytes as protobuf."""

import random

import pytest
from google.protobuf.message import DecodeError

from kvstrata.kvstore_service.data_codec import (
    decode_get_reply,
    decode_put_request,
    encode_get_reply,
    encode_put_request,
)
from kvstrata.protos import kvstore_pb2 as pb


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 1 << 20])
def test_both_sides_agree_with_the_generated_messages(size: int) -> None:
    data = random.Random(size).randbytes(size)
    request = pb.PutRequest(data=data)
    assert encode_put_request(memoryview(data)) == request.SerializeToString()
    assert decode_put_request(request.SerializeToString()).data == data
    reply = pb.GetReply(index=7, stratum=pb.GetReply().stratum, frame_bytes=size, tier="dram")
    whole = pb.GetReply()
    whole.CopyFrom(reply)
    whole.data = data
    assert pb.GetReply.FromString(encode_get_reply((reply, memoryview(data)))) == whole
    assert decode_get_reply(whole.SerializeToString()) == (reply, data)


def test_openings_and_misses_pass_unchanged() -> None:
    opening = pb.PutRequest(open=pb.PutOpen(key=pb.BlockKey(scope=b"s" * 16)))
    assert decode_put_request(encode_put_request(opening)) == opening
    miss = pb.GetReply(index=1, last=True, miss=pb.Miss(reason="absent"))
    assert decode_get_reply(encode_get_reply((miss, b""))) == (miss, b"")


def test_damaged_messages_raise_nothing_but_a_decode_error() -> None:
    source = random.Random(3)
    good = pb.GetReply(index=300, frame_bytes=1 << 40, data=b"x" * 50, tier="dram", last=True)
    for _ in range(3000):
        damaged = bytearray(good.SerializeToString())
        for _ in range(source.randrange(1, 4)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        del damaged[source.randrange(len(damaged)) :]
        for decode in (decode_get_reply, decode_put_request):
            try:
                decode(bytes(damaged))
            except DecodeError:
                continue
