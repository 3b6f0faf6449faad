"""Some slots in an order, as links in columns that several orders may share."""

from array import array
from collections.abc import Iterator
from typing import Any

from kvstrata.kvstore_service.slots import NONE, Slots


class SlotLinks:
    """Links of slots, each of which is in one order at a time at most; 8 bytes a slot."""

    def __init__(self, slots: Slots) -> None:
        self.before: array[Any] = slots.column("i")
        self.after: array[Any] = slots.column("i")


class SlotOrder:
    """An order of slots; all but iterating is O(1). Its owner knows which slots are in it.

    Attributes:
        first: The first slot, ``NONE`` without any.
        last: The last slot, ``NONE`` without any.
    """

    def __init__(self, links: SlotLinks) -> None:
        self.first = self.last = NONE
        self._before, self._after = links.before, links.after
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, slot: int) -> None:
        """Put in a slot that is in no order, as the last one."""
        last = self.last
        self._before[slot] = last
        self._after[slot] = NONE
        if last == NONE:
            self.first = slot
        else:
            self._after[last] = slot
        self.last = slot
        self._size += 1

    def remove(self, slot: int) -> None:
        """Take out a slot that is in this order."""
        before, after = self._before[slot], self._after[slot]
        if before == NONE:
            self.first = after
        else:
            self._after[before] = after
        if after == NONE:
            self.last = before
        else:
            self._before[after] = before
        self._size -= 1

    def __iter__(self) -> Iterator[int]:
        """Yield the slots in order; change nothing meanwhile."""
        slot = self.first
        while slot != NONE:
            yield slot
            slot = self._after[slot]
