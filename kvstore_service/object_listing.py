"""Keeping the index up to date: the listing at start, after a failure, and once in a while."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from kvstrata.kvstore_service.object_index import ObjectIndex
from kvstrata.kvstore_service.object_name import ROOT, ObjectName, folder_of
from kvstrata.kvstore_service.object_service import Listed, ObjectService, ReadOnlyError
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.identity import BlockKey

logger = logging.getLogger(__name__)


class ObjectListing:
    """Reads listings into the index and removes the garbage that they show. One event loop owns it.

    Garbage is a writing that a newer one of its block superseded, and an object with a name of ours
    that is not as long as its name says. What bears another name is never touched. To remove
    garbage is safe at any time: writings are never changed, and appear whole.

    Args:
        service: Where the objects are.
        index: What to keep up to date.
        max_stratum_bytes: Objects with a larger stratum are left alone, and are no blocks here.
        relist_s: How long other processes' changes may stay unseen.
        evict: Brings the index down to its bound.

    Attributes:
        num_listed: Blocks seen so far by the listing that runs; None while none does.
        removed: Garbage removed since the start, by kind.
    """

    def __init__(
        self,
        service: ObjectService,
        index: ObjectIndex,
        *,
        max_stratum_bytes: int,
        relist_s: float,
        evict: Callable[[], Awaitable[None]],
    ) -> None:
        self.num_listed: int | None = None
        self.removed: Counter[str] = Counter()
        self._service = service
        self._index = index
        self._max_stratum_bytes = max_stratum_bytes
        self._relist_s = relist_s
        self._evict = evict

    async def run(self) -> None:
        """List, and again every ``relist_s`` and whenever the service is back. Never returns."""
        while True:
            await self._service.is_up.wait()
            self._service.went_down.clear()
            with contextlib.suppress(TierUnavailableError):
                await self.list_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._relist_s):
                    await self._service.went_down.wait()

    async def list_all(self) -> None:
        """Make the index say what the bucket holds, remove garbage, evict down to the bound."""
        listed: dict[BlockKey, ObjectName] = {}
        self._index.begin_listing()
        self.num_listed = 0
        try:
            async for page in self._pages(ROOT):
                garbage = self._sort(page, listed)
                self._index.add_listed(f for f in page if isinstance(f, ObjectName))
                self.num_listed = len(listed)
                await self._remove(garbage)
            self._index.end_listing(listed)
            self.removed["half_written"] += await self._service.remove_staged()
        finally:
            self._index.abandon_listing()
            self.num_listed = None
        await self._evict()
        told = {"url": self._service.url, "blocks": len(self._index)}
        told |= {"bytes": self._index.num_bytes, "garbage": dict(+self.removed)}
        logger.info("object store is listed", extra=told)

    async def find(self, key: BlockKey) -> ObjectName | None:
        """Ask the service for one block, and let the index say what it answered."""
        listed: dict[BlockKey, ObjectName] = {}
        garbage: list[str] = []
        async for page in self._pages(folder_of(key)):
            garbage += self._sort(page, listed)
        found = listed.get(key)
        held = self._index.get(key)
        if found is None:
            self._index.note_absent(key)
        elif held is None or held != found:
            self._index.add(found)
        await self._remove(garbage)
        return found

    async def writings(self, key: BlockKey) -> list[str]:
        """Return the path of every writing of a block, garbage included."""
        found = [f async for page in self._pages(folder_of(key)) for f in page]
        return [f.path if isinstance(f, ObjectName) else f for f in found]

    async def _pages(self, folder: str) -> AsyncIterator[list[ObjectName | str]]:
        """Yield blocks, and the paths of objects that are ours and damaged."""
        async with contextlib.aclosing(self._service.list(folder)) as pages:
            async for page in pages:
                yield [found for item in page if (found := self._judge(item)) is not None]

    def _judge(self, item: Listed) -> ObjectName | str | None:
        name = ObjectName.parse(item["path"])
        if name is None or max(name.sizes.values()) > self._max_stratum_bytes:
            return None
        return name if name.num_bytes == item["size"] else name.path

    def _sort(
        self, page: Sequence[ObjectName | str], listed: dict[BlockKey, ObjectName]
    ) -> list[str]:
        """Add the newest of each block to ``listed``; return the paths of garbage."""
        garbage: list[str] = []
        for found in page:
            if isinstance(found, str):
                garbage.append(found)
                self.removed["damaged"] += 1
                continue
            held = listed.get(found.key)
            newest = found if held is None or held.order < found.order else held
            listed[found.key] = newest
            if held is not None:
                garbage.append((held if newest is found else found).path)
                self.removed["superseded"] += 1
        return garbage

    async def _remove(self, garbage: Sequence[str]) -> None:
        if garbage and not self._service.read_only:
            logger.warning("object store garbage goes", extra={"objects": len(garbage)})
            with contextlib.suppress(ReadOnlyError):
                await self._service.remove(garbage)
