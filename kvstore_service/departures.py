"""What became of blocks that are no longer here: the last of them, bounded."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstrata.kvstore_service.counters import EVICTIONS, Counters
from kvstrata.protos.identity import BlockKey

MAX_BLOCKS = 16_384
_MAX_OF_ONE_BLOCK = 8

CAPACITY, QUOTA, ADMIN = "capacity", "quota", "admin"
_EVICTED = (CAPACITY, QUOTA, ADMIN)


@dataclass(frozen=True, slots=True)
class Departure:
    """A block left a tier, or was not let in.

    Attributes:
        tier: Which; empty for all.
        reason: See ``admin.proto``.
        unix_s: When.
    """

    tier: str
    reason: str
    unix_s: float


class Departures:
    """A log of departures by block, about 10 MB when full. One event loop owns it.

    The blocks whose last departure is the longest ago are forgotten first; a block that is put
    again is forgotten at once.

    Args:
        counters: Where evictions are counted, by tier and reason.
        max_blocks: The bound.

    Attributes:
        since_unix_s: Departures before this time may be forgotten.
    """

    def __init__(self, counters: Counters, max_blocks: int = MAX_BLOCKS) -> None:
        self.since_unix_s = time.time()
        self._counters = counters
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[BlockKey, tuple[Departure, ...]] = OrderedDict()

    def evicted(self, keys: Sequence[BlockKey], tier: str, reason: str) -> None:
        """Count blocks that a tier gave up, and remember them."""
        self.note(keys, tier, reason)
        if keys:
            self._counters.add(EVICTIONS, len(keys), tier=tier or "all", reason=reason)

    def note(self, keys: Iterable[BlockKey], tier: str, reason: str) -> None:
        """Remember that blocks left a tier, or were not let in."""
        departure = Departure(tier, reason, time.time())
        for key in keys:
            known = self._blocks.pop(key, ())
            self._blocks[key] = (*known[1 - _MAX_OF_ONE_BLOCK :], departure)
        while len(self._blocks) > self._max_blocks:
            _, forgotten = self._blocks.popitem(last=False)
            self.since_unix_s = max(self.since_unix_s, forgotten[-1].unix_s)

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Forget blocks: they are here again."""
        for key in keys:
            self._blocks.pop(key, None)

    def of(self, key: BlockKey) -> tuple[Departure, ...]:
        """Return what became of a block, oldest first; nothing if it is not known."""
        return self._blocks.get(key, ())

    def was_evicted(self, key: BlockKey) -> bool:
        """Whether the last that is known of an absent block is its eviction."""
        known = self._blocks.get(key)
        return known is not None and known[-1].reason in _EVICTED
