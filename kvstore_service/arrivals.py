"""Who writes which block now, and who waits for it."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from kvstrata.kvstore_service.live_block import LiveBlock
from kvstrata.protos.identity import BlockKey


class Arrivals:
    """The blocks that are being written. One event loop owns it.

    Waiting ends when a block is opened to be followed, at its commit, at the end of its last writer
    without one, or when the time is over.
    """

    def __init__(self) -> None:
        self._writers: dict[BlockKey, int] = {}
        self._live: dict[BlockKey, LiveBlock] = {}
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

    @contextlib.contextmanager
    def following(self, block: LiveBlock) -> Iterator[None]:
        """Count as a writer whose block can be followed; there is one of a key at a time."""
        assert block.key not in self._live, "two live blocks of one key"
        with self.writing(block.key):
            self._live[block.key] = block
            self._tell(block.key, "opened")
            try:
                yield
            finally:
                del self._live[block.key]

    def live(self, key: BlockKey) -> LiveBlock | None:
        """Return the block while it can be followed."""
        return self._live.get(key)

    def num_pending(self, keys: Sequence[BlockKey]) -> int:
        """Return how many of ``keys``, from the first on, are being written."""
        return next((i for i, k in enumerate(keys) if k not in self._writers), len(keys))

    def committed(self, key: BlockKey) -> None:
        """Tell the waiters of ``key`` that it is there."""
        self._tell(key, "committed")

    def drain(self) -> None:
        """Tell every waiter that nothing more will be waited for."""
        for key in list(self._waiters):
            self._tell(key, "draining")

    def waited_for(self) -> list[BlockKey]:
        """Return the keys that somebody waits for."""
        return list(self._waiters)

    def _tell(self, key: BlockKey, news: str) -> None:
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(news)

    @contextlib.contextmanager
    def waiting(self, key: BlockKey) -> Iterator[asyncio.Future[str]]:
        """Give what will be "opened", "committed", "writer_gone" or "draining"."""
        waiter: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, set()).add(waiter)
        try:
            yield waiter
        finally:
            waiters = self._waiters.get(key)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._waiters[key]
