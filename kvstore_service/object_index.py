"""Which blocks the bucket holds, as far as this process knows, in order of use."""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

from kvstrata.kvstore_service.object_name import ObjectName
from kvstrata.kvstore_service.pin_table import Clock
from kvstrata.protos.identity import BlockKey

_MAX_ABSENT = 65_536


class ObjectIndex:
    """A cache of the listing. One event loop owns it; no method awaits.

    Args:
        capacity_bytes: Bound on the objects' bytes, reservations included.
        absent_s: How long a block that was not found counts as absent.
        clock: Monotonic seconds.
    """

    def __init__(self, capacity_bytes: int, absent_s: float, clock: Clock) -> None:
        self.num_bytes = 0
        self.num_reservations = 0
        self._capacity_bytes = capacity_bytes
        self._absent_s = absent_s
        self._clock = clock
        self._reserved_bytes = 0
        self._objects: OrderedDict[BlockKey, ObjectName] = OrderedDict()
        self._used_ns: dict[BlockKey, int] = {}
        self._absent: OrderedDict[BlockKey, float] = OrderedDict()
        self._changed: set[BlockKey] | None = None

    def __len__(self) -> int:
        return len(self._objects)

    def objects(self) -> list[ObjectName]:
        """Return every object, least recently used first."""
        return list(self._objects.values())

    def keys(self, limit: int) -> list[BlockKey]:
        """Return at most ``limit`` keys, most recently used first."""
        return list(islice(reversed(self._objects), limit))

    def get(self, key: BlockKey) -> ObjectName | None:
        """Return the block's object."""
        return self._objects.get(key)

    def knows(self, key: BlockKey) -> bool:
        """Return whether the block is here, or was looked for a moment ago and was not."""
        if key in self._objects:
            return True
        until = self._absent.get(key)
        if until is not None and until <= self._clock():
            del self._absent[key]
        return key in self._absent

    def use(self, key: BlockKey) -> ObjectName | None:
        """Return the block's object and make it the most recently used."""
        if key in self._objects:
            self._objects.move_to_end(key)
            self._used_ns[key] = time.time_ns()
        return self._objects.get(key)

    def add(self, found: ObjectName) -> None:
        """Hold ``found`` as its block's only object, most recently used."""
        self.remove(found.key)
        self._absent.pop(found.key, None)
        self._objects[found.key] = found
        self._used_ns[found.key] = time.time_ns()
        self.num_bytes += found.num_bytes

    def remove(self, key: BlockKey) -> ObjectName | None:
        """Forget the block and return the object that it had."""
        if self._changed is not None:
            self._changed.add(key)
        found = self._objects.pop(key, None)
        self._used_ns.pop(key, None)
        self.num_bytes -= found.num_bytes if found else 0
        return found

    def note_absent(self, key: BlockKey) -> None:
        """Forget the block, and know for ``absent_s`` that it is not there."""
        self.remove(key)
        self._absent[key] = self._clock() + self._absent_s
        self._absent.move_to_end(key)
        if len(self._absent) > _MAX_ABSENT:
            self._absent.popitem(last=False)

    def victims(
        self, extra_bytes: int, is_exempt: Callable[[BlockKey], bool]
    ) -> list[ObjectName] | None:
        """Return whom to remove so that ``extra_bytes`` more fit; None if they cannot fit now."""
        victims, excess = self._coldest(extra_bytes, is_exempt)
        return victims if excess <= 0 else None

    def surplus(self, is_exempt: Callable[[BlockKey], bool]) -> list[ObjectName]:
        """Return whom to remove to come as near to the bound as exemptions allow."""
        return self._coldest(0, is_exempt)[0]

    def _coldest(
        self, extra_bytes: int, is_exempt: Callable[[BlockKey], bool]
    ) -> tuple[list[ObjectName], int]:
        excess = self.num_bytes + self._reserved_bytes + extra_bytes - self._capacity_bytes
        victims: list[ObjectName] = []
        for key, found in self._objects.items():
            if excess <= 0:
                break
            if not is_exempt(key):
                victims.append(found)
                excess -= found.num_bytes
        return victims, excess

    @contextlib.contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Count ``num_bytes`` as taken while a change of the bucket is under way."""
        self._reserved_bytes += num_bytes
        self.num_reservations += 1
        try:
            yield
        finally:
            self._reserved_bytes -= num_bytes
            self.num_reservations -= 1

    def begin_listing(self) -> None:
        """Let blocks that change from now on keep their state, whatever the listing says."""
        self._changed = set()

    def add_listed(self, page: Iterable[ObjectName]) -> None:
        """Hold the newest of what a page of the listing shows, last used when it was written."""
        for found in page:
            held = self._objects.get(found.key)
            is_news = self._changed is None or found.key not in self._changed
            if is_news and (held is None or held.order < found.order):
                self.num_bytes += found.num_bytes - (held.num_bytes if held else 0)
                self._absent.pop(found.key, None)
                self._objects[found.key] = found
                self._used_ns[found.key] = max(found.number, self._used_ns.get(found.key, 0))

    def end_listing(self, listed: Mapping[BlockKey, ObjectName]) -> None:
        """Forget what the whole listing did not show, and bring the order of use up to date."""
        changed, self._changed = self._changed or set(), None
        for key in [k for k in self._objects if k not in listed and k not in changed]:
            self.remove(key)
        order = sorted(self._objects, key=self._used_ns.__getitem__)
        self._objects = OrderedDict((key, self._objects[key]) for key in order)

    def abandon_listing(self) -> None:
        """Keep what the pages showed that came before the failure."""
        self._changed = None
