"""Names of blocks that are gone, so that one that comes back soon is known."""

from collections import OrderedDict
from collections.abc import Hashable


class GhostQueue:
    """A bounded memory of keys, oldest out first, each with one number.

    Keys are kept as their 64-bit hash: a collision makes one hint wrong, nothing else.
    """

    def __init__(self) -> None:
        self._notes: OrderedDict[int, int] = OrderedDict()

    def add(self, key: Hashable, note: int) -> None:
        """Remember ``key`` as the latest."""
        ghost = hash(key)
        self._notes[ghost] = note
        self._notes.move_to_end(ghost)

    def pop(self, key: Hashable) -> int | None:
        """Forget ``key`` and return its note; None if it was not remembered."""
        return self._notes.pop(hash(key), None)

    def shrink(self, limit: int) -> None:
        """Forget the oldest until ``limit`` are left."""
        while len(self._notes) > limit:
            self._notes.popitem(last=False)

    def __len__(self) -> int:
        """Return how many are remembered."""
        return len(self._notes)
