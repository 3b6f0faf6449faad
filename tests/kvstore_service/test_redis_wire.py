"""The connection on which values come: its replies, and what a server may do to it."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kvstrata.kvstore_service.redis_wire import RedisWire
from kvstrata.kvstore_service.testing import RedisServer

Answer = Callable[[bytes], bytes]


def make_wire(port: int, timeout_s: float = 5.0, max_value_bytes: int = 1 << 20) -> RedisWire:
    def connect() -> Connection:
        return Connection(host="127.0.0.1", port=port, protocol=2, socket_timeout=5)

    return RedisWire(connect, timeout_s, max_value_bytes)


@pytest.fixture
async def wire(redis: RedisServer) -> AsyncIterator[RedisWire]:
    made = make_wire(redis.port)
    yield made
    await made.close()


class Impostor:
    """A server that greets as Redis does, then answers GET as ``answer`` says.

    With ``trickle_s`` a byte follows after each such pause, for as long as somebody listens.
    """

    def __init__(self, answer: Answer, trickle_s: float = 0.0) -> None:
        self._answer = answer
        self._trickle_s = trickle_s
        self.num_connections = 0
        self._serving: set[asyncio.Future[None]] = set()

    async def __aenter__(self) -> "Impostor":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()
        await asyncio.wait_for(asyncio.gather(*self._serving), 20)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._serving.add(ended)
        while data := await reader.read(1 << 16):
            answer = self._answer(data) if b"GET" in data else b"+OK\r\n" * data.count(b"*")
            if not answer:
                break
            writer.write(answer)
            while self._trickle_s and b"GET" in data and not reader.at_eof():
                await asyncio.sleep(self._trickle_s)
                writer.write(b"x")
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        ended.set_result(None)


async def test_every_kind_of_reply_comes_back_in_order(wire: RedisWire) -> None:
    value = bytes(range(256)) * 4000 + b"\r\n"
    replies = await wire.exchange(
        [
            ("SET", "{w}:a", value),
            ("GETRANGE", "{w}:a", 0, -1),
            ("GETRANGE", "{w}:a", 5, 6),
            ("GET", "{w}:none"),
            ("STRLEN", "{w}:a"),
            ("EVALSHA", "0" * 40, 0),
            ("MGET", "{w}:a", "{w}:none"),
            ("DEL", "{w}:a"),
        ]
    )
    assert replies[:5] == [b"OK", value, b"\x05\x06", None, len(value)]
    assert isinstance(replies[5], NoScriptError)
    assert replies[6:] == [[value, None], 1]


async def test_requests_share_the_connection_and_do_not_wait_for_each_other(
    wire: RedisWire,
) -> None:
    await wire.exchange([("SET", f"w:{n}", b"%d" % n * 70_000) for n in range(20)])
    found = await asyncio.gather(*(wire.exchange([("GET", f"w:{n}")]) for n in range(20)))
    assert found == [[b"%d" % n * 70_000] for n in range(20)]
    ((listed,),) = [await wire.exchange([("CLIENT", "LIST")])]
    assert listed.count(b"cmd=client|list") == 1


async def test_a_request_that_is_given_up_leaves_the_others_their_replies(wire: RedisWire) -> None:
    await wire.exchange([("SET", f"w:{n}", b"%d" % n) for n in range(3)])
    asking = [asyncio.create_task(wire.exchange([("GET", f"w:{n}")])) for n in range(3)]
    await asyncio.sleep(0)
    asking[1].cancel()
    assert [await asking[0], await asking[2]] == [[b"0"], [b"2"]]


async def test_a_restarted_server_is_found_again_without_an_error(own_redis: RedisServer) -> None:
    wire = make_wire(own_redis.port)
    assert await wire.exchange([("PING",)]) == [b"PONG"]
    own_redis.restart()
    assert await wire.exchange([("PING",)]) == [b"PONG"]
    await wire.close()


async def test_a_server_that_is_silent_is_given_up_in_time() -> None:
    async with Impostor(lambda data: b"$9\r\nhalf") as server:
        wire = make_wire(server.port, timeout_s=0.2)
        began = time.monotonic()
        with pytest.raises(RedisTimeoutError):
            await wire.exchange([("GET", "a")])
        assert 0.2 <= time.monotonic() - began < 5
        await wire.close()


async def test_a_server_that_trickles_is_given_up_in_time() -> None:
    async with Impostor(lambda data: b"$99\r\n", trickle_s=0.02) as server:
        wire = make_wire(server.port, timeout_s=0.2)
        began = time.monotonic()
        with pytest.raises(RedisTimeoutError):
            await wire.exchange([("GET", "a"), ("PING",)])
        assert 0.4 <= time.monotonic() - began < 5
        await wire.close()


async def test_a_server_that_closes_in_a_reply_is_asked_once_more() -> None:
    answers = iter([b"", b"$2\r\nok\r\n", b"", b""])
    async with Impostor(lambda data: next(answers)) as server:
        wire = make_wire(server.port)
        assert await wire.exchange([("GET", "a")]) == [b"ok"]
        with pytest.raises(RedisConnectionError):
            await wire.exchange([("GET", "a")])
        assert server.num_connections == 3
        await wire.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"$2000000\r\n",
        b"$2\r\nlonger\r\n",
        b"*99999999\r\n",
        b"*1\r\n" * 9,
        b":1_0\r\n",
        b"+" + bytes(70_000),
        b"+one\r\n+two\r\n",
    ],
)
async def test_what_is_no_reply_ends_the_connection(answer: bytes) -> None:
    async with Impostor(lambda data: answer) as server:
        wire = make_wire(server.port, timeout_s=0.5)
        asked = asyncio.gather(
            wire.exchange([("GET", "a"), ("PING",), ("PING",)]), return_exceptions=True
        )
        (found,) = await asyncio.wait_for(asked, 20)
        assert isinstance(found, RedisError), found
        assert isinstance(found, InvalidResponse) or answer.startswith(b"+one")
        await wire.close()


async def test_a_server_that_is_no_master_any_more_is_left() -> None:
    refusal = b"-READONLY You can't write against a read only replica.\r\n"
    async with Impostor(lambda data: refusal) as server:
        wire = make_wire(server.port)
        with pytest.raises(RedisConnectionError):
            await wire.exchange([("GET", "a")])
        assert server.num_connections == 2
        await wire.close()


async def test_whoever_waits_is_told_when_it_is_closed() -> None:
    async with Impostor(lambda data: b"$9\r\nhalf") as server:
        wire = make_wire(server.port)
        asking = asyncio.create_task(wire.exchange([("GET", "a")]))
        while not server.num_connections:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        await wire.close()
        with pytest.raises(RedisError):
            await asyncio.wait_for(asking, 20)


async def test_a_cancelled_request_leaves_nothing_behind_when_the_connection_ends(
    wire: RedisWire,
) -> None:
    told: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["message"]))
    await wire.exchange([("PING",)])
    waiting = asyncio.create_task(wire.exchange([("BLPOP", "nobody-pushes", "0")]))
    async with asyncio.timeout(30):
        while not (wire._wire and wire._wire.asked):
            await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    await wire.close()
    del waiting
    gc.collect()
    await asyncio.sleep(0)
    assert told == []
