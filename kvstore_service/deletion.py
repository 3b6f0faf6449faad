"""Deleting a block everywhere: in tiers that do not answer just now, and in other processes."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from kvstrata.kvstore_service.counters import DELETIONS, TIER_ERRORS, Counters
from kvstrata.kvstore_service.tier import Tier, TierUnavailableError
from kvstrata.kvstore_service.write_behind import WriteBehind
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey


class DeletionFeed(Protocol):
    """How the processes that share a tier learn what one of them deleted."""

    async def tell(self, keys: Sequence[BlockKey]) -> None:
        """Tell all of them; raises what an operation of a tier raises."""
        ...

    async def close(self) -> None:
        """Tell and follow nothing any more. Idempotent."""
        ...


class Deletion:
    """Deletes in tiers. One event loop owns it.

    Args:
        tiers: All of them.
        behind: What each lower tier gets later.
        counters: Where tiers that do not answer, and others' deletions, are counted.
        feed: To and from other processes; none without it.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        behind: Mapping[str, WriteBehind],
        counters: Counters,
        feed: DeletionFeed | None,
    ) -> None:
        self._tiers = tiers
        self._behind = behind
        self._counters = counters
        self._feed = feed

    async def delete(self, tier: Tier, keys: Sequence[BlockKey]) -> bool:
        """Forget blocks in a tier; False if it does not answer.

        A tier of this process alone forgets them when it does. What is shared another process may
        have written again by then, and was promised that it stays.
        """
        behind = self._behind.get(tier.name)
        if behind is not None:
            await behind.forget(keys)
        try:
            await tier.delete(keys)
        except TierUnavailableError:
            self._counters.add(TIER_ERRORS, tier=tier.name)
            if behind is not None and not tier.shared:
                for key in keys:
                    behind.submit_deletion(key)
            return False
        return True

    async def tell(self, keys: Sequence[BlockKey]) -> None:
        """Have other processes forget what only they hold of deleted blocks."""
        if self._feed is None:
            return
        try:
            await self._feed.tell(keys)
        except (TierUnavailableError, CapacityError):
            self._counters.add(DELETIONS, len(keys), outcome="untold")

    async def follow(self, keys: Sequence[BlockKey]) -> None:
        """Forget what this process's memory holds of blocks that another one deleted.

        Its disk keeps them: it may have acknowledged them after the deletion that is told now. What
        this process itself is still to delete there stays to be deleted.
        """
        for tier in self._tiers:
            if tier.resident:
                await self.delete(tier, keys)
            elif tier.name in self._behind:
                await self._behind[tier.name].forget_writes(keys)
        self._counters.add(DELETIONS, len(keys), outcome="followed")

    async def close(self) -> None:
        """Close the feed. Idempotent."""
        if self._feed is not None:
            await self._feed.close()
