"""What a Lookup promised to keep for a while: blocks that stay until a reader had time to come."""

import time
from collections.abc import Sequence

from kvstrata.kvstore_service.pin_table import Clock
from kvstrata.protos.identity import BlockKey

_FIRST_SWEEP = 4096


class LeaseTable:
    """Exemptions from eviction that nobody ends early, on a monotonic clock.

    A lease is over at its deadline whether or not anybody looks; a repeated one only extends. Made
    for runs of thousands of blocks: leases of one length cost a dict update.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[BlockKey, float] = {}
        self._latest = 0.0
        self._sweep_at = _FIRST_SWEEP

    def add(self, keys: Sequence[BlockKey], ttl_s: float) -> None:
        """Exempt ``keys`` for at least ``ttl_s`` from now."""
        deadline = self._clock() + ttl_s
        if deadline >= self._latest:
            self._latest = deadline
            self._until.update(dict.fromkeys(keys, deadline))
        else:
            for key in keys:
                self._until[key] = max(deadline, self._until.get(key, 0.0))
        if len(self._until) >= self._sweep_at:
            self._sweep_at = max(_FIRST_SWEEP, 2 * self.usage())

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """Promise nothing of blocks that were deleted."""
        for key in keys:
            self._until.pop(key, None)

    def holds(self, key: BlockKey) -> bool:
        """Return whether ``key`` is leased now."""
        deadline = self._until.get(key)
        if deadline is None:
            return False
        if deadline <= self._clock():
            del self._until[key]
            return False
        return True

    def usage(self) -> int:
        """Return the number of leased blocks."""
        now_s = self._clock()
        self._until = {key: end for key, end in self._until.items() if end > now_s}
        return len(self._until)
