"""How long the operations of a tier below dram take, and how many bytes they move."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

from kvstrata.kvstore_service.ancestry import Ancestry
from kvstrata.kvstore_service.counters import TIER_BYTES, TIER_SECONDS, Counters
from kvstrata.kvstore_service.tier import StratumSizes, Tier, Wanted
from kvstrata.kvstore_service.wrapped_tier import WrappedTier
from kvstrata.protos.identity import BlockKey


class MeasuredTier(WrappedTier):
    """Counts what ``inner`` does, failed operations included.

    Dram is not measured: its operations wait for nothing, so their time is that of the calls.
    """

    def __init__(self, inner: Tier, counters: Counters) -> None:
        super().__init__(inner)
        self._counters = counters

    @contextlib.contextmanager
    def _timed(self, operation: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - begin
            self._counters.observe(TIER_SECONDS, seconds, tier=self.name, operation=operation)

    def _moved(self, frames: Mapping[int, bytes], direction: str) -> None:
        num_bytes = sum(map(len, frames.values()))
        self._counters.add(TIER_BYTES, num_bytes, tier=self.name, direction=direction)

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """See ``Tier.get``."""
        with self._timed("get"):
            frames = await self.inner.get(key, strata)
        self._moved(frames, "read")
        return frames

    async def get_all(self, wanted: Wanted) -> list[dict[int, bytes]]:
        """See ``Tier.get_all``; one operation."""
        with self._timed("get"):
            found = await self.inner.get_all(wanted)
        for frames in found:
            self._moved(frames, "read")
        return found

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """See ``Tier.examine``."""
        with self._timed("examine"):
            frames = await self.inner.examine(key, strata)
        self._moved(frames, "read")
        return frames

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """See ``Tier.put``."""
        with self._timed("put"):
            victims = await self.inner.put(key, frames, standing)
        self._moved(frames, "written")
        return victims

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """See ``Tier.contains``."""
        with self._timed("contains"):
            return await self.inner.contains(keys)

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """See ``Tier.delete``."""
        with self._timed("delete"):
            return await self.inner.delete(keys)

    async def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """See ``Tier.lease``."""
        with self._timed("lease"):
            return await self.inner.lease(keys, ttl_s)
