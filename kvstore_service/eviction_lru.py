"""The least recently used leaf goes first."""

from kvstrata.kvstore_service.eviction import Key
from kvstrata.kvstore_service.leaf_first import Node
from kvstrata.kvstore_service.leaf_queues import LeafQueues


class LruPolicy(LeafQueues[Key]):
    """LRU over leaves, the order of the radix caches of SGLang and vLLM."""

    def _admitted(self, node: Node[Key]) -> None:
        node.stamp = self._clock

    def _used(self, node: Node[Key]) -> None:
        node.stamp = self._clock

    def _coldest(self) -> Node[Key] | None:
        node = self._oldest(0)
        if node is not None:
            self._pop(0)
        return node
