"""Telling the store processes that share a Redis which blocks were deleted.

Deletions are entries of one capped stream, ``kvs:{index}:deleted``. Each process reads on from
where it was, so what happened while it had no connection is told when it has one again, as long as
Redis still has the entries; that some were cut off before is counted.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

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

Apply = Callable[[Sequence[BlockKey]], Awaitable[None]]


class RedisDeletions:
    """The stream, as one process writes and reads it. One event loop owns it.

    Args:
        connection: The way to Redis; whoever made it closes it.
        poll_s: Pause between two looks.

    Attributes:
        on_missed: Called when deletions may have been cut off before this process read them.
    """

    def __init__(self, connection: RedisConnection, poll_s: float = _POLL_S) -> None:
        self._connection = connection
        self._poll_s = poll_s
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._name = secrets.token_hex(8)
        self._read_up_to = ""
        self.on_missed: Callable[[], None] = _ignore

    async def tell(self, keys: Sequence[BlockKey]) -> None:
        """Let every process know that these blocks are deleted.

        Raises:
            TierUnavailableError: Redis does not answer.
            CapacityError: Redis is out of memory.
        """
        async with self._connection.use() as redis:
            pipe = redis.pipeline(transaction=False)
            for first in range(0, len(keys), _KEYS_AN_ENTRY):
                names = " ".join(key.encode() for key in keys[first : first + _KEYS_AN_ENTRY])
                entry = {"keys": names, "by": self._name}
                pipe.xadd(STREAM_KEY, entry, maxlen=MAX_ENTRIES, approximate=True)
            await pipe.execute()

    def follow(self, apply: Apply) -> None:
        """Call ``apply`` with what other processes delete from now on."""
        self._task = asyncio.create_task(self._follow(apply))

    async def _follow(self, apply: Apply) -> None:
        while not self._is_closed:  # redis-py may turn a cancellation into a time-out
            try:
                for keys in await self._read():
                    await apply(keys)
            except (TierUnavailableError, CapacityError):
                pass  # told and counted by whoever needs Redis; read on when it is back
            except Exception:  # whatever it was, the next deletions must be followed
                logger.exception("a deletion of another process was not followed")
            await asyncio.sleep(self._poll_s)

    async def _read(self) -> list[list[BlockKey]]:
        """Return the deletions since the last call; none at the first one."""
        async with self._connection.use() as redis:
            if not self._read_up_to:
                last: Any = await redis.xrevrange(STREAM_KEY, count=1)
                self._read_up_to = last[0][0].decode() if last else "0-0"
                return []
            reply: Any = await redis.xread({STREAM_KEY: self._read_up_to}, count=_READ_ENTRIES)
            entries = reply[0][1] if reply else []
            if entries and self._read_up_to != "0-0":
                # What was read last is still there, unless the stream was cut or lost meanwhile.
                kept: Any = await redis.xrange(STREAM_KEY, self._read_up_to, self._read_up_to)
                if not kept:
                    self.on_missed()
        deleted = []
        for entry_id, fields in entries:
            self._read_up_to = entry_id.decode()
            if fields.get(b"by") == self._name.encode():
                continue
            try:
                deleted.append([BlockKey.decode(n.decode()) for n in fields[b"keys"].split()])
            except (KeyError, ValueError):
                logger.warning("an entry that is not ours is left out", extra={"key": STREAM_KEY})
        return deleted

    async def close(self) -> None:
        """Stop following. Idempotent."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _ignore() -> None:
    """Nobody listens."""
