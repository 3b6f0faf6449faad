"""Reading the next blocks of a Get while the one before is being sent."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

from kvstrata.kvstore_service.counters import ABANDONED, WANTED
from kvstrata.kvstore_service.lower_reader import Piece, Read
from kvstrata.kvstore_service.quota import Usage
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.protos.identity import BlockKey

_MAX_BLOCKS = 4


async def read_ahead(
    store: BlockStore,
    keys: Sequence[BlockKey],
    strata: list[int],
    wait_until: float,
    usage: Usage,
    may_read_ahead: Callable[[], bool],
) -> AsyncGenerator[Read, None]:
    """Yield the blocks in order, up to four of them being read; their bytes count as in flight.

    While ``may_read_ahead`` says no, only the block that is wanted next is read. Strata that nobody
    reads in the end, because the call ended before, are counted as abandoned.
    """
    ahead: deque[asyncio.Task[Read]] = deque()
    upcoming = iter(keys)
    held = 0
    num_read = 0
    store.counters.add(WANTED, len(keys) * len(strata))

    def hold(num_bytes: int) -> None:
        nonlocal held
        held += num_bytes
        usage.in_flight_bytes += num_bytes

    async def read(key: BlockKey) -> Read:
        nonlocal num_read
        found = await store.get(key, strata, wait_until)
        num_read += 1
        usage.touch(key)
        hold(_size(found))
        return found

    try:
        while True:
            while len(ahead) < _MAX_BLOCKS and (not ahead or may_read_ahead()):
                key = next(upcoming, None)
                if key is None:
                    break
                ahead.append(asyncio.create_task(read(key)))
            if not ahead:
                return
            found = await ahead[0]
            yield found
            ahead.popleft()
            hold(-_size(found))
    finally:
        await cancel(ahead)
        hold(-held)
        if num_read < len(keys):
            store.counters.add(ABANDONED, (len(keys) - num_read) * len(strata))


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


def _size(read: Read) -> int:
    return sum(len(found.frame) for found in read.values() if isinstance(found, Piece))
