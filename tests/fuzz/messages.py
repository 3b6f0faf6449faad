"""The messages that are decoded by hand: they mean what protobuf says, or are refused."""

import itertools
import random
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from kvstrata.kvstore_service.data_codec import decode_get_reply, decode_put_request
from kvstrata.kvstore_service.frame_assembly import FrameAssembly
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BlockHash, ScopeDigest
from tests.fuzz.campaign import Target
from tests.fuzz.frames import SAMPLE
from tests.fuzz.mutation import mutate

KEY = pb.BlockKey(scope=b"s" * 16, block_hash=b"h" * 16)
BASE = Stratum.STRATUM_BASE
OPENING = pb.PutOpen(
    key=KEY, strata=[pb.StratumSize(stratum=BASE, frame_bytes=57)], durability="ssd"
)
WHOLE = Frame.open(SAMPLE[1])
PIECES = [
    pb.Piece(index=300, stratum=BASE, frame_bytes=1 << 40, length=50, tier="dram"),
    pb.Piece(length=7, last=True),
    pb.Piece(index=1, last=True, miss=pb.Miss(reason="absent")),
]
PUTS = [
    pb.PutRequest(open=OPENING, data=b"x" * 57).SerializeToString(),
    pb.PutRequest(open=OPENING).SerializeToString(),
    pb.PutRequest(data=b"y" * 200).SerializeToString(),
]
GETS = [
    pb.GetReply(pieces=PIECES, data=b"x" * 57).SerializeToString(),
    pb.GetReply(pieces=PIECES[2:]).SerializeToString(),
    pb.GetReply(pieces=[pb.Piece(length=200, last=True)], data=b"z" * 200).SerializeToString(),
]


def joined(data: Sequence[bytes | memoryview]) -> bytes:
    return b"".join(data)


def check_put(message: bytes) -> str:
    try:
        part = decode_put_request(message)
    except DecodeError:
        return "refused"
    wanted = pb.PutRequest.FromString(message)
    assert part.opening == (wanted.open if wanted.HasField("open") else None)
    assert joined(part.data) == wanted.data
    return "read"


def check_get(message: bytes) -> str:
    try:
        part = decode_get_reply(message)
    except DecodeError:
        return "refused"
    wanted = pb.GetReply.FromString(message)
    assert list(part.pieces) == list(wanted.pieces)
    assert joined(part.data) == wanted.data
    assert [len(data) for data in part.data] == [piece.length for piece in wanted.pieces]
    return "read"


def pieces_of(source: random.Random) -> tuple[list[tuple[int, bytes]], int]:
    """Return a frame in pieces, some of which lie about where they belong, and a told size."""
    frame = SAMPLE[1]
    cuts = sorted({0, len(frame), *(source.randrange(len(frame)) for _ in range(3))})
    pieces = [(a, frame[a:b]) for a, b in itertools.pairwise(cuts)]
    told = len(frame)
    for _ in range(source.randrange(3)):
        kind, place = source.randrange(5), source.randrange(len(pieces))
        offset, data = pieces[place]
        if kind == 0:
            pieces[place] = (source.choice((0, 1, offset + 1, 1 << 62)), data)
        elif kind == 1:
            pieces[place] = (offset, mutate(data, source, [frame]))
        elif kind == 2 and len(pieces) > 1:
            del pieces[place]
        elif kind == 3:
            pieces.insert(place, pieces[place])
        else:
            told = source.choice((0, 1, len(frame) - 1, len(frame) + 1, 1 << 30, 1 << 63))
    return pieces, told


def check_assembly(made: tuple[list[tuple[int, bytes]], int]) -> str:
    """A frame that came in pieces is the one that was sent, or part of it, or is refused."""
    pieces, told = made
    scope, block_hash = ScopeDigest(WHOLE.header.scope), BlockHash(WHOLE.header.block_hash)
    try:
        assembly = FrameAssembly(told, 1 << 20)
        for offset, data in pieces:
            assembly.add(offset, data)
        frame = assembly.finish(scope, block_hash, 1)
    except CorruptFrameError:
        return "refused"
    for entry in frame.header.segments:
        try:
            assert frame.segment(entry.layer) == WHOLE.segment(entry.layer)
        except (CorruptFrameError, KeyError):
            return "partial"
    return "whole"


TARGETS = [
    Target(
        "puts",
        150,
        lambda source: mutate(source.choice(PUTS), source, PUTS + GETS),
        check_put,
        wanted=["refused", "read"],
    ),
    Target(
        "gets",
        150,
        lambda source: mutate(source.choice(GETS), source, PUTS + GETS),
        check_get,
        wanted=["refused", "read"],
    ),
    Target("pieces", 50, pieces_of, check_assembly, wanted=["refused", "partial", "whole"]),
]
