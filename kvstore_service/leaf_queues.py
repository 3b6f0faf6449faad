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

from kvstrata.kvstore_service.eviction import Key
from kvstrata.kvstore_service.leaf_first import LeafFirst, Node

_SLACK = 64  # stale entries that a queue may always have


class LeafQueues(LeafFirst[Key], ABC):
    """``num_groups`` queues of leaves; ``Node.place`` says which, ``Node.stamp`` where in it."""

    def __init__(self, num_groups: int = 1) -> None:
        super().__init__()
        self._queues: list[list[tuple[int, int, Node[Key]]]] = [[] for _ in range(num_groups)]
        self._group_bytes = [0] * num_groups
        self._num_pushed = 0  # orders entries of equal stamps

    def _resized(self, node: Node[Key], change: int) -> None:
        self._group_bytes[node.place] += change

    def _regroup(self, node: Node[Key], group: int) -> None:
        """Let ``node`` wait in another queue from now on; its entry follows by itself."""
        if node.is_held:
            self._group_bytes[node.place] -= node.num_bytes
            self._group_bytes[group] += node.num_bytes
        node.place = group

    def _add_entry(self, node: Node[Key]) -> None:
        queue = self._queues[node.place]
        heapq.heappush(queue, self._entry(node))
        if len(queue) > 2 * len(self._nodes) + _SLACK:
            # Blocks that are deleted, not evicted, would pile up.
            self._queues[node.place] = [entry for entry in queue if entry[2].is_held]
            heapq.heapify(self._queues[node.place])

    def _entry(self, node: Node[Key]) -> tuple[int, int, Node[Key]]:
        self._num_pushed += 1
        return node.stamp, self._num_pushed, node

    def _oldest(self, group: int) -> Node[Key] | None:
        """Return the oldest leaf of a group, still in its queue."""
        queue = self._queues[group]
        while queue:
            stamp, _, node = queue[0]
            if self._is_stale(node) or node.place != group:
                self._pop(group)
                self._enqueue(node)
            elif node.stamp != stamp:
                heapq.heapreplace(queue, self._entry(node))
            else:
                return node
        return None

    def _pop(self, group: int) -> None:
        """Take the first entry out of a queue."""
        heapq.heappop(self._queues[group])[2].is_queued = False

    def _entries(self) -> Sequence[Node[Key]]:
        return [node for queue in self._queues for _, _, node in queue]

    def check_integrity(self) -> None:
        """See ``EvictionPolicy.check_integrity``."""
        super().check_integrity()
        group_bytes = [0] * len(self._queues)
        for node in self._nodes.values():
            group_bytes[node.place] += node.num_bytes
        assert group_bytes == self._group_bytes, "the policy miscounts bytes"
