"""What a tier has promised not to evict: pins and leases of blocks that it holds."""

from collections.abc import Callable, Sequence

from kvstrata.kvstore_service.lease_table import LeaseTable
from kvstrata.kvstore_service.pin_table import Clock, PinTable
from kvstrata.protos.identity import BlockKey


class Promises:
    """The pins and leases of one tier, which this process gave and which end with it.

    Args:
        is_held: Whether a block is in the tier: to others nothing is promised.
        clock: Monotonic seconds.
    """

    def __init__(self, is_held: Callable[[BlockKey], bool], clock: Clock) -> None:
        self._is_held = is_held
        self._pins = PinTable(clock)
        self._leases = LeaseTable(clock)

    def hold(self, key: BlockKey) -> bool:
        """Return whether a block is pinned or leased now."""
        return self._pins.holds(key) or self._leases.holds(key)

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """Promise nothing of blocks that are deleted."""
        self._leases.forget(keys)
        self.unpin(keys)

    def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Pin the blocks that are held and return the others; see ``Tier.pin``."""
        missing = self._missing(keys)
        for key in set(keys).difference(missing):
            self._pins.add(key, ttl_s)
        return missing

    def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins; see ``Tier.unpin``."""
        for key in keys:
            self._pins.remove(key)

    def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Lease the blocks that are held and return the others; see ``Tier.lease``."""
        missing = self._missing(keys)
        self._leases.add(keys if not missing else list(filter(self._is_held, keys)), ttl_s)
        return missing

    def _missing(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        return [key for key in keys if not self._is_held(key)]
