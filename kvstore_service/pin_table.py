"""Which blocks are exempt from eviction, and until when."""

import time
from collections.abc import Callable

from kvstrata.protos.identity import BlockKey

Clock = Callable[[], float]


class PinTable:
    """Time-bounded promises not to evict, on a monotonic clock.

    A pin is over at its deadline whether or not anybody looks; a repeated pin only extends.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._pins: dict[BlockKey, tuple[float, int]] = {}
        self._sweep_at = 1024

    def __len__(self) -> int:
        """Return the number of pins, those included that are over and were not looked at since."""
        return len(self._pins)

    def add(self, key: BlockKey, ttl_s: float, num_bytes: int = 0) -> None:
        """Pin ``key`` for at least ``ttl_s`` from now; ``num_bytes`` is for the accounting."""
        deadline = self._clock() + ttl_s
        previous = self._pins.get(key, (0.0, 0))[0]
        self._pins[key] = (max(deadline, previous), num_bytes)
        if len(self._pins) >= self._sweep_at:
            self._sweep_at = max(1024, 2 * self.usage()[0])

    def remove(self, key: BlockKey) -> None:
        """End a pin early. Idempotent."""
        self._pins.pop(key, None)

    def holds(self, key: BlockKey) -> bool:
        """Return whether ``key`` is pinned now."""
        pin = self._pins.get(key)
        if pin is None:
            return False
        if pin[0] <= self._clock():
            del self._pins[key]
            return False
        return True

    def usage(self) -> tuple[int, int]:
        """Return the number of pinned blocks and their bytes."""
        alive = [key for key in list(self._pins) if self.holds(key)]
        return len(alive), sum(self._pins[key][1] for key in alive)
