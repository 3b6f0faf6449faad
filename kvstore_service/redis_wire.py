"""One connection to a Redis server on which requests follow each other, none waiting for another.

A pooled client reads one reply after another, each with a time limit, tasks and copies of its own;
for values of a few hundred kB that costs more than moving them. Here replies are cut out of what
the socket gave, a value with one copy, and whoever asked is woken once, when all of them are there.
redis-py makes the connection: addresses, Sentinels, TLS and passwords are its business.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hiredis import pack_command
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kvstrata.kvstore_service.redis_reply import ReplyParser

Command = Sequence[bytes | str | int]


class _Asked:
    """A request on its way: how many replies it waits for, and those that came."""

    __slots__ = ("count", "done", "replies")

    def __init__(self, count: int, done: asyncio.Future[list[Any]]) -> None:
        self.count = count
        self.done = done
        self.replies: list[Any] = []


class _Wire(asyncio.Protocol):
    """The protocol of one connection, in place of the streams that redis-py set up."""

    def __init__(self, transport: Any, parser: ReplyParser) -> None:
        self.transport = transport
        self._loop = asyncio.get_running_loop()
        # redis-py closes the connection by its streams: they hear of its end.
        self._streams = transport.get_protocol()
        self._parser = parser
        self.asked: deque[_Asked] = deque()
        self.heard_s = 0.0
        self.is_lost = False

    def data_received(self, data: bytes) -> None:
        self.heard_s = self._loop.time()
        try:
            replies = self._parser.feed(data)
        except InvalidResponse as error:
            self.fail(error)
            return
        for reply in replies:
            if not self.asked:
                self.fail(InvalidResponse("a reply that nobody asked for"))
                return
            first = self.asked[0]
            first.replies.append(reply)
            if len(first.replies) == first.count:
                self.asked.popleft()
                if not first.done.done():
                    first.done.set_result(first.replies)

    def eof_received(self) -> bool | None:
        self.fail(RedisConnectionError("the server closed the connection"))
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(RedisConnectionError("the connection is lost"))
        self._streams.connection_lost(exc)

    def pause_writing(self) -> None:
        self._streams.pause_writing()

    def resume_writing(self) -> None:
        self._streams.resume_writing()

    def fail(self, error: RedisError) -> None:
        """Tell everybody who waits, and end the connection."""
        self.is_lost = True
        self.transport.abort()
        while self.asked:
            asked = self.asked.popleft()
            if not asked.done.done():
                asked.done.set_exception(error)


class RedisWire:
    """Sends commands to one server, and gives their replies. One event loop owns it.

    Connects when it is first used, and again after a failure.

    Args:
        make_connection: Returns a connection of redis-py that is not connected yet.
        timeout_s: How long the server may be silent while a reply is due, and how long it may take
            for each reply of a request.
        max_value_bytes: No longer value is accepted.
    """

    def __init__(
        self,
        make_connection: Callable[[], Any],
        timeout_s: float,
        max_value_bytes: int = 1 << 30,
    ) -> None:
        self._make_connection = make_connection
        self._timeout_s = timeout_s
        self._max_value_bytes = max_value_bytes
        self._connecting = asyncio.Lock()
        self._connection: Any = None
        self._wire: _Wire | None = None
        self._is_closed = False

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Return the reply of each command, error replies as exceptions, after one round trip.

        The commands may run twice if the connection breaks meanwhile.

        Raises:
            RedisError: The server does not answer, or not as Redis does.
            OSError: It cannot be reached.
        """
        request = b"".join(map(pack_command, map(tuple, commands)))
        try:
            return await self._ask(request, len(commands))
        except RedisConnectionError:  # as after a restart of the server: once more
            return await self._ask(request, len(commands))

    async def _ask(self, request: bytes, count: int) -> list[Any]:
        wire = self._wire
        if wire is None or wire.is_lost:
            wire = await self._connect()
        loop = asyncio.get_running_loop()
        asked = _Asked(count, loop.create_future())
        wire.asked.append(asked)
        wire.transport.write(request)
        began_s = loop.time()
        try:
            while not asked.done.done():
                heard_s = max(began_s, wire.heard_s) + self._timeout_s
                left_s = min(heard_s, began_s + count * self._timeout_s) - loop.time()
                if left_s <= 0:
                    wire.fail(RedisTimeoutError("no reply in time"))
                else:
                    await asyncio.wait([asked.done], timeout=left_s)
        finally:
            asked.done.cancel()  # of a caller that was cancelled: its replies are counted, not kept
        replies = asked.done.result()
        if any(isinstance(reply, ReadOnlyError) for reply in replies):
            wire.fail(RedisConnectionError("the server is no master any more"))
            raise RedisConnectionError("the server is no master any more")
        return replies

    async def _connect(self) -> _Wire:
        async with self._connecting:
            if self._wire is not None and not self._wire.is_lost:
                return self._wire  # somebody else connected meanwhile
            if self._is_closed:
                raise RedisConnectionError("the connection was closed")
            await self._disconnect(nowait=True)
            self._connection = connection = self._make_connection()
            await connection.connect()
            # From here on its streams read nothing: they are left to close it.
            parser = ReplyParser(self._max_value_bytes, connection._parser.parse_error)
            self._wire = wire = _Wire(connection._writer.transport, parser)
            wire.transport.set_protocol(wire)
            return wire

    async def _disconnect(self, *, nowait: bool = False) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect(nowait=nowait)

    async def close(self) -> None:
        """Close the connection; whoever waits is told. Idempotent."""
        self._is_closed = True
        if self._wire is not None:
            self._wire.fail(RedisConnectionError("the connection was closed"))
        async with self._connecting:  # whoever connects just now has done so
            await self._disconnect()
