"""Changes that a tier gets after they were acknowledged, or when it is back: a bounded queue."""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.tier import Tier, TierUnavailableError
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey

logger = logging.getLogger(__name__)

Frames = Mapping[int, bytes]
Write = Callable[[Tier, BlockKey, Frames], Awaitable[None]]

_RETRY_S = 0.5
MAX_DELETIONS = 1_000_000  # about 200 MB


class WriteBehind:
    """Blocks on their way to one tier, oldest first, one at a time. One event loop owns it.

    A tier that does not answer is tried again until it does; what does not fit meanwhile is dropped
    and counted, the oldest first. Nothing that was forgotten is written afterwards. Deletions wait
    in the same queue and are never dropped for a block.

    Args:
        tier: Where to.
        write: Puts one block there; may raise what ``Tier.put`` raises.
        counters: Gets ``written_behind_total`` by tier and outcome.
        max_bytes: Bound on what waits.
    """

    def __init__(self, tier: Tier, write: Write, counters: Counters, max_bytes: int) -> None:
        self._tier = tier
        self._write = write
        self._counters = counters
        self._max_bytes = max_bytes
        self._waiting: OrderedDict[BlockKey, Frames | None] = OrderedDict()  # None: to be deleted
        self._num_deletions = 0
        self._num_bytes = 0
        self._current: BlockKey | None = None
        self._worker: asyncio.Task[None] | None = None
        self._is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_bytes(self) -> int:
        """Bytes that wait; never more than the bound."""
        return self._num_bytes

    def submit(self, key: BlockKey, frames: Frames) -> bool:
        """Take the block over; False where it is larger than the bound, which is counted."""
        self._remove(key)
        size = _size(frames)
        if size > self._max_bytes:
            self._count("dropped")
            return False
        while self._num_bytes + size > self._max_bytes:
            self._remove(next(k for k, waiting in self._waiting.items() if waiting is not None))
            self._count("dropped")
        self._waiting[key] = frames
        self._num_bytes += size
        self._wake()
        return True

    def submit_deletion(self, key: BlockKey) -> bool:
        """Have the block deleted when the tier answers; False, and counted, if too many wait."""
        self._remove(key)
        if self._num_deletions >= MAX_DELETIONS:
            self._count("deletion_dropped")
            return False
        self._waiting[key] = None
        self._num_deletions += 1
        self._wake()
        return True

    def _wake(self) -> None:
        self._idle.clear()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def forget(self, keys: Sequence[BlockKey]) -> None:
        """Let none of these be written, or deleted, any more; waits for one that is just now."""
        for key in keys:
            self._remove(key)
        await self._settled(keys)

    async def forget_writes(self, keys: Sequence[BlockKey]) -> None:
        """Let none of these blocks be written any more; deletions of them that wait still do."""
        for key in keys:
            if self._waiting.get(key) is not None:
                self._remove(key)
        await self._settled(keys)

    async def _settled(self, keys: Sequence[BlockKey]) -> None:
        while self._current in keys:
            await asyncio.sleep(0.001)

    async def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits; False when the time was over first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()

    async def close(self) -> None:
        """Stop; what still waits is dropped and counted. Idempotent."""
        self._is_closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        if self._waiting:
            self._count("dropped", len(self._waiting))
            extra = {"tier": self._tier.name, "blocks": len(self._waiting)}
            logger.warning("blocks never reached a tier", extra=extra)
        self._waiting.clear()
        self._num_bytes = self._num_deletions = 0

    async def _work(self) -> None:
        while self._waiting and not self._is_closed:  # a client may swallow a cancellation
            key, frames = next(iter(self._waiting.items()))
            self._current = key
            try:
                if frames is None:
                    await self._tier.delete([key])
                    outcome = "deleted"
                else:
                    await self._write(self._tier, key, frames)
                    outcome = "written"
            except TierUnavailableError:
                self._current = None  # not being written: may be forgotten while it waits
                await asyncio.sleep(_RETRY_S)
                continue
            except CapacityError:
                outcome = "no_room"
            finally:
                self._current = None
            if key in self._waiting and self._waiting[key] is frames:
                self._remove(key)  # neither forgotten nor replaced meanwhile
            self._count(outcome)
        self._idle.set()

    def _remove(self, key: BlockKey) -> None:
        if key not in self._waiting:
            return
        frames = self._waiting.pop(key)
        if frames is None:
            self._num_deletions -= 1
        else:
            self._num_bytes -= _size(frames)

    def _count(self, outcome: str, amount: int = 1) -> None:
        self._counters.add(names.WRITTEN_BEHIND, amount, tier=self._tier.name, outcome=outcome)


def _size(frames: Frames) -> int:
    return sum(map(len, frames.values()))
