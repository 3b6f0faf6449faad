"""Replies of Redis, cut in any way: what is read is what hiredis reads of them."""

import contextlib
import random

import hiredis
from redis.exceptions import InvalidResponse

from kvstrata.kvstore_service.redis_reply import ReplyParser
from tests.fuzz.campaign import Target
from tests.fuzz.mutation import mutate

REPLIES = [
    b"$5\r\nvalue\r\n",
    b"$0\r\n\r\n",
    b"$-1\r\n",
    b"$300\r\n" + bytes(range(256)) + b"\r\n" * 22 + b"\r\n",
    b"*3\r\n$3\r\none\r\n$-1\r\n*2\r\n:-7\r\n+OK\r\n",
    b"-NOSCRIPT No matching script.\r\n:1700000000000\r\n*0\r\n*-1\r\n",
    b"*1\r\n*1\r\n*1\r\n$2\r\n\r\n\r\n+PONG\r\n",
]
MAX_VALUE_BYTES = 4096


class FailedError(Exception):
    """An error reply, to either reader."""


def make(source: random.Random) -> list[bytes]:
    stream = b"".join(source.choices(REPLIES, k=source.randrange(1, 5)))
    if source.randrange(4):
        stream = mutate(stream, source, REPLIES)
    cuts = sorted(source.choices(range(len(stream) + 1), k=source.randrange(6)))
    return [stream[i:j] for i, j in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def told(reply: object) -> object:
    if isinstance(reply, list):
        return [told(item) for item in reply]
    return ("error", str(reply)) if isinstance(reply, FailedError) else reply


def check(parts: list[bytes]) -> str:
    parser = ReplyParser(MAX_VALUE_BYTES, FailedError)
    reader = hiredis.Reader(replyError=FailedError, errors="replace")
    found: list[object] = []
    outcome = "read"
    try:
        for part in parts:
            found += parser.feed(part)
    except InvalidResponse:
        outcome = "refused"
    for part in parts:
        reader.feed(part)
    for reply in found:
        wanted = reader.gets()
        assert told(reply) == told(wanted), f"{reply!r}, hiredis reads {wanted!r}"
    if outcome == "read":
        with contextlib.suppress(hiredis.ProtocolError):  # which judges the begin of a line, too
            assert reader.gets() is False, "hiredis reads more"
    return outcome


TARGETS = [Target("replies", 100, make, check, wanted=["read", "refused"])]
