"""Reading blocks from Redis: those that are wanted at the same time share a round trip."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from redis.exceptions import NoScriptError

from kvstrata.kvstore_service import redis_scripts as scripts
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_eval import run_script, script_command
from kvstrata.kvstore_service.redis_wire import Command
from kvstrata.kvstore_service.tier import Wanted
from kvstrata.protos.identity import BlockKey

_MAX_BLOCKS = 4
"""Of a round trip: a few share its cost, and the first one does not wait for many."""

# KEYS: values. ARGV: ttl_ms. Renews their time to live.
_RENEW = "for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[1]) end"


class Value(NamedTuple):
    """What Redis has of a block.

    Attributes:
        frames: The wanted strata that are here.
        entry: What the accounting says of the block; None if it does not know it.
    """

    frames: dict[int, bytes]
    entry: bytes | None


@dataclass(frozen=True, slots=True)
class _Asked:
    key: BlockKey
    strata: Sequence[int]
    found: asyncio.Future[Value]


class RedisReads:
    """Reads blocks, each of which then counts as used. One event loop owns it.

    What is asked for in one turn of the loop goes in one pipeline: the values, each in one bounded
    read, then one look at the accounting and one touch of it for all of them.

    Args:
        connection: The way to Redis.
        names: Returns the Redis keys of the strata, in the order of their numbers from 1.
        ttl_ms: What the time to live of what was read becomes.
        max_stratum_bytes: No value beyond this is read.
    """

    def __init__(
        self,
        connection: RedisConnection,
        names: Callable[[BlockKey], list[bytes]],
        ttl_ms: int,
        max_stratum_bytes: int,
    ) -> None:
        self._connection = connection
        self._names = names
        self._ttl_ms = ttl_ms
        self._max_stratum_bytes = max_stratum_bytes
        self._wanted: list[_Asked] = []
        self._reading: set[asyncio.Task[None]] = set()

    async def read(self, wanted: Wanted) -> list[Value]:
        """Return what there is of each block.

        Raises:
            TierUnavailableError: Redis is down, or went down meanwhile.
            CapacityError: Redis is out of memory.
        """
        loop = asyncio.get_running_loop()
        if wanted and not self._wanted:
            loop.call_soon(self._start)
        asked = [_Asked(key, strata, loop.create_future()) for key, strata in wanted]
        self._wanted += asked
        if len(asked) == 1:
            return [await asked[0].found]
        return list(await asyncio.gather(*(each.found for each in asked)))

    def commands(self, key: BlockKey, strata: Sequence[int]) -> list[Command]:
        """Return the bounded reads of a block's strata."""
        names = self._names(key)
        return [("GETRANGE", names[s - 1], 0, self._max_stratum_bytes) for s in strata]

    def _start(self) -> None:
        wanted, self._wanted = self._wanted, []
        for first in range(0, len(wanted), _MAX_BLOCKS):
            task = asyncio.create_task(self._read(wanted[first : first + _MAX_BLOCKS]))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)

    async def _read(self, wanted: Sequence[_Asked]) -> None:
        """Read blocks, and tell whoever still waits for them what came of it."""
        wanted = [each for each in wanted if not each.found.done()]
        try:
            values = await self._values(wanted)
        except BaseException as error:
            for each in wanted:
                if not each.found.done():
                    each.found.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for each, value in zip(wanted, values, strict=True):
            if not each.found.done():
                each.found.set_result(value)

    async def _values(self, wanted: Sequence[_Asked]) -> list[Value]:
        if not wanted:
            return []
        members = [each.key.encode() for each in wanted]
        groups = [self._names(each.key) for each in wanted]
        if not self._connection.is_cluster:  # where only a block's keys share a slot
            groups = [[name for names in groups for name in names]]
        commands = [one for each in wanted for one in self.commands(each.key, each.strata)]
        commands.append(("HMGET", scripts.SIZES_KEY, *members))
        commands += [script_command(_RENEW, names, [self._ttl_ms]) for names in groups]
        commands.append(script_command(scripts.TOUCH, scripts.INDEX_KEYS, members))
        replies = await self._connection.exchange(commands)
        *renewed, touched = replies[-len(groups) - 1 :]
        for names, reply in zip(groups, renewed, strict=True):
            if isinstance(reply, NoScriptError):
                await run_script(self._connection, _RENEW, names, [self._ttl_ms])
        if isinstance(touched, NoScriptError):
            await run_script(self._connection, scripts.TOUCH, scripts.INDEX_KEYS, members)
        entries = replies[-len(groups) - 2]
        found = iter(replies)
        return [
            Value(values_of(each.strata, found), entries[i] if isinstance(entries, list) else None)
            for i, each in enumerate(wanted)
        ]

    async def close(self) -> None:
        """Wait for reads that are under way."""
        await asyncio.gather(*self._reading, return_exceptions=True)


def values_of(strata: Sequence[int], replies: Any) -> dict[int, bytes]:
    """Return what there is of each, the next of ``replies``; an error or nothing is none."""
    return {
        stratum: value
        for stratum, value in zip(strata, replies, strict=False)
        if isinstance(value, bytes) and value
    }
