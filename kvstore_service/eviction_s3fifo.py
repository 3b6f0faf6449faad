"""S3-FIFO over leaves: most blocks are asked for once, so a small queue tries them first.

Source:
    Yang et al., FIFO Queues are All You Need for Cache Eviction, SOSP 2023, algorithm 1. Ours
    differs where a prefix demands it: only leaves stand in the queues, and a block comes out after
    its last child as if it had been inserted with it. Sizes are bytes.
"""

from collections.abc import Sequence

from kvstrata.kvstore_service.ghost_table import GhostTable
from kvstrata.kvstore_service.leaf_queues import LeafQueues
from kvstrata.kvstore_service.slots import NONE, Slots

_SMALL, _MAIN = 0, 1
_SMALL_SHARE = 10  # one part in ten
_MAX_USES = 3


class S3FifoPolicy(LeafQueues):
    """Small queue, main queue, and a ghost queue of keys that left the small one."""

    def __init__(self, slots: Slots, fingerprints: Sequence[int]) -> None:
        super().__init__(slots, fingerprints, num_groups=2)
        self._ghosts = GhostTable()

    def _admitted(self, slot: int) -> None:
        self._stamp[slot] = self._clock
        came_back = self._ghosts.pop(self._fingerprints[slot], self._clock) is not None
        self._place[slot] = _MAIN if came_back else _SMALL
        self._ghosts.grow(len(self))

    def _used(self, slot: int) -> None:
        self._uses[slot] = min(self._uses[slot] + 1, _MAX_USES)

    def _coldest(self) -> int:
        while True:
            is_small_full = _SMALL_SHARE * self._group_bytes[_SMALL] >= sum(self._group_bytes)
            group = _SMALL if is_small_full else _MAIN
            slot = self._oldest(group)
            if slot == NONE:
                group = _SMALL + _MAIN - group
                slot = self._oldest(group)
            if slot == NONE:
                return NONE
            self._pop(group)
            if group == _SMALL and self._uses[slot] > 1:
                self._regroup(slot, _MAIN)
                self._uses[slot] = 0
            elif group == _MAIN and self._uses[slot]:
                self._uses[slot] -= 1
            else:
                return slot
            self._stamp[slot] = self._clock
            self._enqueue(slot)

    def _evicted(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if self._place[slot] == _SMALL:
                self._ghosts.add(self._fingerprints[slot], self._clock, 0, self._clock)
