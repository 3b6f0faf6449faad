"""S3-FIFO over leaves: most blocks are asked for once, so a small queue tries them first.

Source:
    Yang et al., FIFO Queues are All You Need for Cache Eviction, SOSP 2023, algorithm 1. Ours
    differs where a prefix demands it: only leaves stand in the queues, and a block comes out after
    its last child as if it had been inserted with it. Sizes are bytes.
"""

from collections.abc import Sequence

from kvstrata.kvstore_service.eviction import Key
from kvstrata.kvstore_service.ghost_queue import GhostQueue
from kvstrata.kvstore_service.leaf_first import Node
from kvstrata.kvstore_service.leaf_queues import LeafQueues

_SMALL, _MAIN = 0, 1
_SMALL_SHARE = 10  # one part in ten
_MAX_USES = 3


class S3FifoPolicy(LeafQueues[Key]):
    """Small queue, main queue, and a ghost queue of keys that left the small one."""

    def __init__(self) -> None:
        super().__init__(num_groups=2)
        self._ghosts = GhostQueue()

    def _admitted(self, node: Node[Key]) -> None:
        node.stamp = self._clock
        node.place = _MAIN if self._ghosts.pop(node.key) is not None else _SMALL

    def _used(self, node: Node[Key]) -> None:
        node.uses = min(node.uses + 1, _MAX_USES)

    def _coldest(self) -> Node[Key] | None:
        while True:
            is_small_full = _SMALL_SHARE * self._group_bytes[_SMALL] >= sum(self._group_bytes)
            group = _SMALL if is_small_full else _MAIN
            node = self._oldest(group)
            if node is None:
                group = _SMALL + _MAIN - group
                node = self._oldest(group)
            if node is None:
                return None
            self._pop(group)
            if group == _SMALL and node.uses > 1:
                self._regroup(node, _MAIN)
                node.uses = 0
            elif group == _MAIN and node.uses:
                node.uses -= 1
            else:
                return node
            node.stamp = self._clock
            self._enqueue(node)

    def _evicted(self, nodes: Sequence[Node[Key]]) -> None:
        for node in nodes:
            if node.place == _SMALL:
                self._ghosts.add(node.key, 0)
        self._ghosts.shrink(len(self._nodes))
