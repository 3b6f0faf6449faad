"""Numbers for blocks, small and used again, and columns of what is known about them.

An object a block, in dicts, costs about 1 KiB; a column costs the bytes of its type. Millions of
blocks are also nothing that the garbage collector walks through.
"""

from array import array
from typing import Any

_LEAST_GROWTH, _MOST_GROWTH = 64, 1 << 16
NONE = -1


class Slots:
    """Gives out slots. One event loop owns it.

    A column has one entry a slot. Entries of new slots are 0, or None in a column of objects; those
    of slots that are used again are as they were left.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self._columns: list[array[Any] | list[Any]] = []
        self._num_used = 0  # slots that were ever given out
        self._first_free = NONE
        self._next = self.column("i")
        """The next free slot. Of slots in use a subclass may keep what it likes here."""

    def column(self, typecode: str) -> "array[Any]":
        """Return a new column of numbers, by ``array``'s letter for their type."""
        made = array(typecode, bytes(array(typecode).itemsize * self.capacity))
        self._columns.append(made)
        return made

    def object_column(self) -> list[Any]:
        """Return a new column of objects."""
        made = [None] * self.capacity
        self._columns.append(made)
        return made

    def take(self) -> int:
        """Return a slot that is free until now."""
        slot = self._first_free
        if slot != NONE:
            self._first_free = self._next[slot]
            return slot
        if self._num_used == self.capacity:
            self._grow()
        self._num_used += 1
        return self._num_used - 1

    def give_back(self, slot: int) -> None:
        """Let ``slot`` be used again."""
        self._next[slot] = self._first_free
        self._first_free = slot

    def _grow(self) -> None:
        """Add a sixteenth at most, in steps that take milliseconds."""
        count = min(max(_LEAST_GROWTH, self.capacity >> 4), _MOST_GROWTH)
        for column in self._columns:
            if isinstance(column, array):
                column.frombytes(bytes(column.itemsize * count))
            else:
                column.extend([None] * count)
        self.capacity += count
