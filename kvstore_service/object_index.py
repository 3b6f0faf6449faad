"""Which blocks the bucket holds, as far as this process knows, in order of use."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from kvstrata.kvstore_service.held_blocks import HeldBlocks
from kvstrata.kvstore_service.object_name import ObjectName
from kvstrata.kvstore_service.pin_table import Clock
from kvstrata.protos.identity import BlockKey

_MAX_ABSENT = 65_536


class ObjectIndex(HeldBlocks[ObjectName]):
    """The accounting of the object tier: a cache of the listing.

    Args:
        capacity_bytes: Bound on the objects' bytes, reservations included.
        absent_s: How long a block that was not found counts as absent.
        clock: Monotonic seconds.
    """

    def __init__(self, capacity_bytes: int, absent_s: float, clock: Clock) -> None:
        super().__init__(capacity_bytes, lambda found: found.num_bytes)
        self._absent_s = absent_s
        self._clock = clock
        self._used_ns: dict[BlockKey, int] = {}
        self._absent: OrderedDict[BlockKey, float] = OrderedDict()
        self._changed: set[BlockKey] | None = None

    def knows(self, key: BlockKey) -> bool:
        """Return whether the block is here, or was looked for a moment ago and was not."""
        if key in self._held:
            return True
        until = self._absent.get(key)
        if until is not None and until <= self._clock():
            del self._absent[key]
        return key in self._absent

    def use(self, key: BlockKey) -> ObjectName | None:
        """Return the block's object and make it the most recently used."""
        if key in self._held:
            self._used_ns[key] = time.time_ns()
        return super().use(key)

    def add(self, found: ObjectName) -> None:
        """Hold ``found`` as its block's only object, most recently used."""
        self.remove(found.key)
        self._absent.pop(found.key, None)
        self.replace(found)
        self._used_ns[found.key] = time.time_ns()

    def remove(self, key: BlockKey) -> ObjectName | None:
        """Forget the block and return the object that it had."""
        if self._changed is not None:
            self._changed.add(key)
        self._used_ns.pop(key, None)
        return super().remove(key)

    def note_absent(self, key: BlockKey) -> None:
        """Forget the block, and know for ``absent_s`` that it is not there."""
        self.remove(key)
        self._absent[key] = self._clock() + self._absent_s
        self._absent.move_to_end(key)
        if len(self._absent) > _MAX_ABSENT:
            self._absent.popitem(last=False)

    def begin_listing(self) -> None:
        """Let blocks that change from now on keep their state, whatever the listing says."""
        self._changed = set()

    def add_listed(self, page: Iterable[ObjectName]) -> None:
        """Hold the newest of what a page of the listing shows, last used when it was written."""
        for found in page:
            held = self._held.get(found.key)
            is_news = self._changed is None or found.key not in self._changed
            if is_news and (held is None or held.order < found.order):
                self._absent.pop(found.key, None)
                self.replace(found)
                self._used_ns[found.key] = max(found.number, self._used_ns.get(found.key, 0))

    def end_listing(self, listed: Mapping[BlockKey, ObjectName]) -> None:
        """Forget what the whole listing did not show, and bring the order of use up to date."""
        changed, self._changed = self._changed or set(), None
        for key in [k for k in self._held if k not in listed and k not in changed]:
            self.remove(key)
        order = sorted(self._held, key=self._used_ns.__getitem__)
        self._held = OrderedDict((key, self._held[key]) for key in order)

    def abandon_listing(self) -> None:
        """Keep what the pages showed that came before the failure."""
        self._changed = None
