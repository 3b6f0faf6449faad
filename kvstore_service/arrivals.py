"""Waiting for a block that somebody is writing."""

import asyncio
import contextlib
from collections.abc import Iterator

from kvstrata.protos.identity import BlockKey


class Arrivals:
    """Who writes which block now, and who waits for it.

    Waiting ends at the commit, at the end of the last writer without one, or when the time is over.
    """

    def __init__(self) -> None:
        self._writers: dict[BlockKey, int] = {}
        self._waiters: dict[BlockKey, set[asyncio.Future[str]]] = {}

    @contextlib.contextmanager
    def writing(self, key: BlockKey) -> Iterator[None]:
        """Count as a writer of ``key``; the last one to leave tells whoever still waits."""
        self._writers[key] = self._writers.get(key, 0) + 1
        try:
            yield
        finally:
            self._writers[key] -= 1
            if not self._writers[key]:
                del self._writers[key]
                self._tell(key, "writer_gone")

    def committed(self, key: BlockKey) -> None:
        """Tell the waiters of ``key`` that it is there."""
        self._tell(key, "committed")

    def drain(self) -> None:
        """Tell every waiter that nothing more will be waited for."""
        for key in list(self._waiters):
            self._tell(key, "draining")

    def _tell(self, key: BlockKey, news: str) -> None:
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(news)

    async def wait(self, key: BlockKey, timeout_s: float) -> str:
        """Return "committed", "writer_gone", "draining", or "wait_expired" after ``timeout_s``."""
        waiter: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, set()).add(waiter)
        try:
            async with asyncio.timeout(max(timeout_s, 0)):
                return await waiter
        except TimeoutError:
            return "wait_expired"
        finally:
            waiters = self._waiters.get(key)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._waiters[key]
