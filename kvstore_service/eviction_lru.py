"""The least recently used leaf goes first."""

from kvstrata.kvstore_service.leaf_queues import LeafQueues
from kvstrata.kvstore_service.slots import NONE


class LruPolicy(LeafQueues):
    """LRU over leaves, the order of the radix caches of SGLang and vLLM."""

    def _admitted(self, slot: int) -> None:
        self._stamp[slot] = self._clock
        self._place[slot] = 0

    def _used(self, slot: int) -> None:
        self._stamp[slot] = self._clock

    def _coldest(self) -> int:
        slot = self._oldest(0)
        if slot != NONE:
            self._pop(0)
        return slot
