"""Waiting for blocks that are absent now: until this process, or another one, commits them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from kvstrata.kvstore_service.arrivals import Arrivals
from kvstrata.protos.identity import BlockKey

_POLL_S = 0.05  # how often is looked for what other store processes committed

Look = Callable[[Sequence[BlockKey]], Awaitable[list[bool]]]


class CommitWaits:
    """Waits that no news is lost on. One event loop owns it.

    Args:
        arrivals: What this process writes.
        look: Tells which blocks are committed anywhere.
        is_shared: Whether other processes may commit them too; then somebody has to look.
    """

    def __init__(self, arrivals: Arrivals, look: Look, *, is_shared: bool) -> None:
        self._arrivals = arrivals
        self._look = look
        self._is_shared = is_shared
        self._polling: asyncio.Task[None] | None = None
        self._is_closed = False

    async def commit(self, key: BlockKey, until: float) -> str:
        """Return "committed", "writer_gone", "draining"; "wait_expired" at loop time ``until``."""
        try:
            async with asyncio.timeout_at(until):
                news = "opened"
                while news == "opened":
                    news = await self.news(key, may_follow=False)
                return news
        except TimeoutError:
            return "wait_expired"

    async def news(self, key: BlockKey, *, may_follow: bool = True) -> str:
        """Wait until a block is committed, or whoever writes it gave up.

        Returns "committed", "writer_gone" or "draining"; "opened" if it began to be written, at
        once if it is being written and the caller ``may_follow`` it.
        """
        with self._arrivals.waiting(key) as news:
            if may_follow and self._arrivals.live(key) is not None:
                return "opened"
            if (await self._look([key]))[0]:
                return "committed"
            if self._is_shared and (self._polling is None or self._polling.done()):
                self._polling = asyncio.create_task(self._poll())
            return await news

    async def _poll(self) -> None:
        while not self._is_closed and (keys := self._arrivals.waited_for()):
            for key, is_committed in zip(keys, await self._look(keys), strict=True):
                if is_committed:
                    self._arrivals.committed(key)
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """End what runs. Idempotent."""
        self._is_closed = True
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
