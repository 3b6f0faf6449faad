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
    ahead: deque[asyncio.Task[list[Read]] | Read] = deque()
    num_ahead = 0
    upcoming = deque(keys)
    held = 0
    num_read = 0
    max_run = 1 if wait_until else _MAX_BLOCKS  # who waits for one block gets the others meanwhile
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

    async def read(run: Sequence[BlockKey]) -> list[Read]:
        if wait_until:
            reads = [await store.get(key, strata, wait_until) for key in run]
        else:
            reads = await store.get_run(run, strata)
        return list(map(keep, run, reads))

    def start() -> None:
        """Begin to read as many as may be read ahead, those together that dram does not have.

        A run is at least half of what may be read ahead, lest runs become single blocks.
        """
        nonlocal num_ahead
        run: list[BlockKey] = []
        if num_ahead > _MAX_BLOCKS // 2 and max_run > 1:
            return
        while upcoming and num_ahead < _MAX_BLOCKS and (not num_ahead or may_read_ahead()):
            key = upcoming.popleft()
            num_ahead += 1
            found = store.get_resident(key, strata)
            if found is None:
                run.append(key)
            if run and (found is not None or len(run) == max_run):
                ahead.append(asyncio.create_task(read(run)))
                run = []
            if found is not None:
                ahead.append(keep(key, found))
        if run:
            ahead.append(asyncio.create_task(read(run)))

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
                    await asyncio.wait([first])
                    ahead.popleft()
                    ahead.extendleft(reversed(first.result()))
                    continue
                ahead.popleft()
                num_ahead -= 1
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
