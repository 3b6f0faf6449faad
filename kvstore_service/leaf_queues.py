"""Leaves in a few queues, each by age, for the policies that go by the age alone.

Queues are heaps that learn of changes late: an entry whose block was used since, moved to another
queue, got a child or is gone is put right when it comes to the top. So a use costs one assignment,
and an eviction O(log n), amortised.

Example: the chain ``a b c`` was read at times 1 2 3, and ``d``, another child of ``a``, at time 9.
Leaves are ``c`` and ``d``. The least recent leaf ``c`` goes; ``b`` becomes a leaf as old as its
last child, 3, and goes next; ``a`` only after ``d``.
"""

import heapq
from abc import ABC
from collections.abc import Sequence

from kvstrata.kvstore_service.leaf_first import LeafFirst
from kvstrata.kvstore_service.slots import NONE, Slots

_SLACK = 64  # stale entries that a queue may always have


class LeafQueues(LeafFirst, ABC):
    """``num_groups`` queues of leaves; ``_place`` says which, ``_stamp`` where in it."""

    def __init__(self, slots: Slots, fingerprints: Sequence[int], num_groups: int = 1) -> None:
        super().__init__(slots, fingerprints)
        self._queues: list[list[tuple[int, int, int]]] = [[] for _ in range(num_groups)]
        self._group_bytes = [0] * num_groups
        self._num_pushed = 0  # orders entries of equal stamps

    def _resized(self, slot: int, change: int) -> None:
        self._group_bytes[self._place[slot]] += change

    def _regroup(self, slot: int, group: int) -> None:
        """Let the block wait in another queue from now on; its entry follows by itself."""
        if self._is_held(slot):
            self._group_bytes[self._place[slot]] -= self._bytes[slot]
            self._group_bytes[group] += self._bytes[slot]
        self._place[slot] = group

    def _add_entry(self, slot: int) -> None:
        queue = self._queues[self._place[slot]]
        heapq.heappush(queue, self._entry(slot))
        if len(queue) > 2 * len(self) + _SLACK:
            # Blocks that are deleted, not evicted, would pile up.
            for entry in queue:
                if not self._is_held(entry[2]):
                    self._dequeued(entry[2])
            queue[:] = [entry for entry in queue if self._is_queued(entry[2])]
            heapq.heapify(queue)

    def _entry(self, slot: int) -> tuple[int, int, int]:
        self._num_pushed += 1
        return self._stamp[slot], self._num_pushed, slot

    def _oldest(self, group: int) -> int:
        """Return the oldest leaf of a group, still in its queue."""
        queue = self._queues[group]
        while queue:
            stamp, _, slot = queue[0]
            if self._is_stale(slot) or self._place[slot] != group:
                self._pop(group)
                if slot not in self.ranked:  # else it waits there, or was taken a moment ago
                    self._enqueue(slot)
            elif self._stamp[slot] != stamp:
                heapq.heapreplace(queue, self._entry(slot))
            else:
                return slot
        return NONE

    def _pop(self, group: int) -> None:
        """Take the first entry out of a queue."""
        self._dequeued(heapq.heappop(self._queues[group])[2])

    def _entries(self) -> Sequence[int]:
        return [slot for queue in self._queues for _, _, slot in queue]

    def check_integrity(self) -> None:
        """See ``EvictionPolicy.check_integrity``."""
        super().check_integrity()
        group_bytes = [0] * len(self._queues)
        for slot, num_bytes in enumerate(self._bytes):
            if self._is_held(slot):
                group_bytes[self._place[slot]] += num_bytes
        assert group_bytes == self._group_bytes, "the policy miscounts bytes"
