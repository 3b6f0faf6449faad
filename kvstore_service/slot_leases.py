"""What a Lookup promised to keep for a while, as a column: ``LeaseTable`` for blocks in slots."""

import numpy as np
import numpy.typing as npt

from kvstrata.kvstore_service.pin_table import Clock
from kvstrata.kvstore_service.slots import Slots


class SlotLeases:
    """Exemptions from eviction that nobody ends early; 8 bytes a block, held or not."""

    def __init__(self, slots: Slots, clock: Clock) -> None:
        self._clock = clock
        self._until = slots.column("d")

    def add(self, slots: npt.NDArray[np.int32], ttl_s: float) -> None:
        """Exempt the blocks for at least ``ttl_s`` from now."""
        until = np.frombuffer(self._until, np.float64)
        until[slots] = np.maximum(until[slots], self._clock() + ttl_s)

    def forget(self, slot: int) -> None:
        """Promise nothing of a block that is gone."""
        self._until[slot] = 0.0

    def holds(self, slot: int) -> bool:
        """Return whether the block is leased now."""
        return bool(self._until[slot] > self._clock())

    def usage(self) -> int:
        """Return the number of leased blocks."""
        if not self._until:
            return 0
        return int(np.count_nonzero(np.frombuffer(self._until, np.float64) > self._clock()))
