"""Telling the store processes that share a Redis which blocks were deleted.

Deletions are entries of one capped stream, ``kvs:{index}:deleted``. Each process reads on from
where it was, so what happened while it had no connection is told when it has one again, as long as
Redis still has the entries; that some were cut off before is counted. So is a Redis that refuses
the stream, by an access rule or a value of another type: all else in it is used as before.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey

STREAM_KEY = "kvs:{index}:deleted"
MAX_ENTRIES = 10_000
_KEYS_AN_ENTRY = 256
_READ_ENTRIES = 64
_POLL_S = 0.05

logger = logging.getLogger(__name__)

# What Redis answers if it lets nobody, or not us, use the stream; subclasses say other things.
_REFUSALS = (ResponseError, NoPermissionError)

Apply = Callable[[Sequence[BlockKey]], Awaitable[None]]
Entries = list[tuple[bytes, dict[bytes, bytes]]]
"""Of the stream: the id and the fields of each."""


class RedisDeletions:
    """The stream, as one process writes and reads it. One event loop owns it.

    Args:
        connection: The way to Redis; whoever made it closes it.
        poll_s: Pause between two looks.

    Attributes:
        on_missed: Called when deletions may not have been followed: they were cut off before this
            process read them, Redis refuses the stream, or what they call failed.
    """

    def __init__(self, connection: RedisConnection, poll_s: float = _POLL_S) -> None:
        self._connection = connection
        self._poll_s = poll_s
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._name = secrets.token_hex(8)
        self._read_up_to = ""
        self._refused: set[str] = set()
        self.on_missed: Callable[[], None] = _ignore

    async def tell(self, keys: Sequence[BlockKey]) -> None:
        """Let every process know that these blocks are deleted.

        Raises:
            TierUnavailableError: Redis does not answer, or refuses the stream.
            CapacityError: Redis is out of memory.
        """
        async with self._connection.use() as redis:
            pipe = redis.pipeline(transaction=False)
            for first in range(0, len(keys), _KEYS_AN_ENTRY):
                names = " ".join(key.encode() for key in keys[first : first + _KEYS_AN_ENTRY])
                entry = {"keys": names, "by": self._name}
                pipe.xadd(STREAM_KEY, entry, maxlen=MAX_ENTRIES, approximate=True)
            try:
                await pipe.execute()
            except ResponseError as error:
                self._check_refused(error, "tell")
                raise TierUnavailableError(
                    f"redis refuses {STREAM_KEY}", "let the store use this stream", tier="redis"
                ) from None
        self._refused.discard("tell")

    def _check_refused(self, error: ResponseError, what: str) -> bool:
        """Log that Redis refuses the stream, and return whether it is news; else raise ``error``.

        Whatever else Redis answers makes ``RedisConnection`` take it for down.
        """
        if type(error) not in _REFUSALS:
            raise error
        if what in self._refused:
            return False
        self._refused.add(what)
        extra = {"key": STREAM_KEY, "what": what, "reason": type(error).__name__}
        logger.warning("redis refuses the stream of deletions", extra=extra)
        return True

    def follow(self, apply: Apply) -> None:
        """Call ``apply`` with what other processes delete from now on."""
        self._task = asyncio.create_task(self._follow(apply))

    async def _follow(self, apply: Apply) -> None:
        while not self._is_closed:  # redis-py may turn a cancellation into a time-out
            entries: Entries = []
            try:
                entries = await self._read()
                for entry_id, fields in entries:
                    await self._apply(apply, fields)
                    self._read_up_to = entry_id.decode()
            except (TierUnavailableError, CapacityError):
                pass  # told and counted by whoever needs Redis; read on when it is back
            except Exception:  # whatever it was, the next deletions must be followed
                logger.exception("deletions of other processes were not read")
            if len(entries) < _READ_ENTRIES:  # else more are waiting
                await asyncio.sleep(self._poll_s)

    async def _apply(self, apply: Apply, fields: dict[bytes, bytes]) -> None:
        """Follow one entry; what fails is counted, and not tried again."""
        if fields.get(b"by") == self._name.encode():
            return
        try:
            keys = [BlockKey.decode(name.decode()) for name in fields[b"keys"].split()]
        except (KeyError, ValueError):
            logger.warning("an entry that is not ours is left out", extra={"key": STREAM_KEY})
            return
        try:
            await apply(keys)
        except Exception:  # whatever it was, the next deletions must be followed
            logger.exception("a deletion of another process was not followed")
            self.on_missed()

    async def _read(self) -> Entries:
        """Return entries after the last that was followed; none at the first call."""
        async with self._connection.use() as redis:
            try:
                if not self._read_up_to:
                    last: Any = await redis.xrevrange(STREAM_KEY, count=1)
                    self._read_up_to = last[0][0].decode() if last else "0-0"
                    return []
                reply: Any = await redis.xread({STREAM_KEY: self._read_up_to}, count=_READ_ENTRIES)
                entries: Entries = reply[0][1] if reply else []
                if entries and self._read_up_to != "0-0":
                    # What was read last is still there, unless the stream was cut or lost since.
                    kept: Any = await redis.xrange(STREAM_KEY, self._read_up_to, self._read_up_to)
                    if not kept:
                        self.on_missed()
            except ResponseError as error:
                if self._check_refused(error, "follow"):
                    self.on_missed()
                return []
        self._refused.discard("follow")
        return entries

    async def close(self) -> None:
        """Stop following. Idempotent."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _ignore() -> None:
    """Nobody listens."""
