"""A tier around another one, for what all tiers shall do and none should have to know."""

from collections.abc import Mapping, Sequence

from kvstrata.kvstore_service.ancestry import Ancestry
from kvstrata.kvstore_service.tier import StratumSizes, Tier, TierUsage, Wanted
from kvstrata.protos.identity import BlockKey


class WrappedTier:
    """Passes every call on to ``inner``; keeps ``Tier``. Subclasses change some of them.

    Attributes:
        inner: The tier inside.
    """

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name
        self.resident = inner.resident
        self.shared = inner.shared

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """See ``Tier.get``."""
        return await self.inner.get(key, strata)

    async def get_all(self, wanted: Wanted) -> list[dict[int, bytes]]:
        """See ``Tier.get_all``."""
        return await self.inner.get_all(wanted)

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """See ``Tier.examine``."""
        return await self.inner.examine(key, strata)

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """See ``Tier.put``."""
        return await self.inner.put(key, frames, standing)

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """See ``Tier.contains``."""
        return await self.inner.contains(keys)

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """See ``Tier.delete``."""
        return await self.inner.delete(keys)

    async def drop(self, key: BlockKey, stratum: int) -> None:
        """See ``Tier.drop``."""
        await self.inner.drop(key, stratum)

    async def keys(self, limit: int) -> list[BlockKey]:
        """See ``Tier.keys``."""
        return await self.inner.keys(limit)

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """See ``Tier.pin``."""
        return await self.inner.pin(keys, ttl_s)

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """See ``Tier.unpin``."""
        await self.inner.unpin(keys)

    async def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """See ``Tier.lease``."""
        return await self.inner.lease(keys, ttl_s)

    async def usage(self) -> TierUsage:
        """See ``Tier.usage``."""
        return await self.inner.usage()

    async def check_integrity(self) -> None:
        """See ``Tier.check_integrity``."""
        await self.inner.check_integrity()

    async def close(self) -> None:
        """See ``Tier.close``."""
        await self.inner.close()
