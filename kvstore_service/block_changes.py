"""Changes of blocks in a tier: those of one block come one after another, and each to its end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from kvstrata.protos.identity import BlockKey

T = TypeVar("T")


class BlockChanges:
    """The changes that are under way. One event loop owns it."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._locks: WeakValueDictionary[BlockKey, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._running)

    def touch(self, key: BlockKey) -> bool:
        """Return whether somebody changes the block, or waits to."""
        return key in self._locks

    @contextlib.asynccontextmanager
    async def of(self, key: BlockKey) -> AsyncIterator[None]:
        """Be the only one in this process who changes the block."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        async with lock:
            yield

    def start(self, change: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``change`` to its end, whoever waits for it."""
        task = asyncio.create_task(change)
        self._running.add(task)
        task.add_done_callback(self._settle)
        return task

    def _settle(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen; whoever waits for the task gets it too

    async def to_its_end(self, change: Coroutine[Any, Any, T]) -> T:
        """Run ``change`` to its end, even if the caller is cancelled meanwhile."""
        return await asyncio.shield(self.start(change))

    async def wait(self) -> None:
        """Wait until none is under way."""
        if self._running:
            await asyncio.wait(set(self._running))
