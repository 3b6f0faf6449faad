"""Reading the next blocks of a Get while those before are being sent."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

from kvstrata.kvstore_service.counters import ABANDONED, WANTED
from kvstrata.kvstore_service.lower_reader import Piece, Read
from kvstrata.kvstore_service.quota import Usage
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.service import CHUNK_BYTES

_MAX_BLOCKS = 4


async def read_ahead(
    store: BlockStore,
    keys: Sequence[BlockKey],
    strata: list[int],
    wait_until: float,
    usage: Usage,
    may_read_ahead: Callable[[], bool],
) -> AsyncGenerator[list[Read], None]:
    """Yield the blocks in order, those together that are there at once, about 1 MiB.

    Up to four more are being read meanwhile; bytes that were read count as in flight until the next
    ones are asked for. While ``may_read_ahead`` says no, only the next block is read. Strata that
    nobody reads in the end, because the call ended before, are counted as abandoned.
    """
    ahead: deque[asyncio.Task[Read] | Read] = deque()
    upcoming = iter(keys)
    held = 0
    num_read = 0
    store.counters.add(WANTED, len(keys) * len(strata))

    def hold(num_bytes: int) -> None:
        nonlocal held
        held += num_bytes
        usage.in_flight_bytes += num_bytes

    def keep(key: BlockKey, found: Read) -> Read:
        nonlocal num_read
        num_read += 1
        usage.touch(key)
        hold(_size(found))
        return found

    async def read(key: BlockKey) -> Read:
        return keep(key, await store.get(key, strata, wait_until))

    def start() -> None:
        """Begin to read as many as may be read ahead."""
        while len(ahead) < _MAX_BLOCKS and (not ahead or may_read_ahead()):
            key = next(upcoming, None)
            if key is None:
                return
            found = store.get_resident(key, strata)
            if found is None:
                ahead.append(asyncio.create_task(read(key)))
            else:
                ahead.append(keep(key, found))

    try:
        while True:
            ready: list[Read] = []
            num_bytes = 0
            while not ready or (num_bytes < CHUNK_BYTES and may_read_ahead()):
                start()
                if not ahead:
                    break
                first = ahead[0]
                if isinstance(first, asyncio.Task):
                    if ready and not first.done():
                        break
                    first = await first
                ahead.popleft()
                ready.append(first)
                num_bytes += _size(first)
            if not ready:
                return
            yield ready
            hold(-num_bytes)
    finally:
        await cancel(each for each in ahead if isinstance(each, asyncio.Task))
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
