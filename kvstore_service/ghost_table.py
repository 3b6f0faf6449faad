"""Names of blocks that are gone, so that one that comes back soon is known: 8 bytes a ghost.

An entry holds 30 bits of a fingerprint, 32 of the time of the last use and 2 of the number of uses.
It lies in one of the eight places of its bucket; a full bucket forgets its
oldest, which is nearly first in, first out, without links. The table grows bucket by bucket, by
linear hashing as in ``block_table.py``. A collision makes one hint wrong, nothing else.
"""

from array import array

_WAYS = 8
_FIRST_LEVEL = 4  # of buckets, as a power of two
_TAG_SHIFT, _TIME_SHIFT = 34, 2
_TIMES = (1 << 32) - 1
_MAX_USES = 3


class GhostTable:
    """A bounded memory of fingerprints, each with the last use and the number of uses.

    Fingerprints are 64 bits of a hash.
    """

    def __init__(self) -> None:
        self._level = _FIRST_LEVEL
        self._num_split = 0
        self._entries = array("Q", bytes(8 * _WAYS << _FIRST_LEVEL))

    def __len__(self) -> int:
        """Return how many are remembered; looks at all."""
        return len(self._entries) - self._entries.count(0)

    def grow(self, limit: int) -> None:
        """Remember up to about ``limit`` from now on, if that is more than until now."""
        while len(self._entries) < limit:
            self._split()

    def add(self, fingerprint: int, used: int, uses: int, now: int) -> None:
        """Remember a block that was last used at ``used``; at most three uses are told apart."""
        tag, first = self._place(fingerprint)
        entry = tag << _TAG_SHIFT | (used & _TIMES) << _TIME_SHIFT | min(uses, _MAX_USES)
        oldest, where = -1, first
        for place, known in enumerate(self._entries[first : first + _WAYS], first):
            if known and known >> _TAG_SHIFT == tag:
                where = place
                break
            age = (now - (known >> _TIME_SHIFT)) & _TIMES if known else _TIMES + 1
            if age > oldest:
                oldest, where = age, place
        self._entries[where] = entry

    def pop(self, fingerprint: int, now: int) -> tuple[int, int] | None:
        """Forget the block; return the time since its use and its uses, None if it is unknown."""
        tag, first = self._place(fingerprint)
        for place, known in enumerate(self._entries[first : first + _WAYS], first):
            if known and known >> _TAG_SHIFT == tag:
                self._entries[place] = 0
                return (now - (known >> _TIME_SHIFT)) & _TIMES, known & _MAX_USES
        return None

    def _place(self, fingerprint: int) -> tuple[int, int]:
        """Return the tag of a fingerprint and the first place of its bucket.

        The bucket's number is the fingerprint's lowest bits below those of the tag, so that an
        entry knows where it moves when its bucket is split.
        """
        tag = fingerprint >> _TAG_SHIFT
        mixed = tag << _FIRST_LEVEL | fingerprint & (1 << _FIRST_LEVEL) - 1
        bucket = mixed & (1 << self._level) - 1
        if bucket < self._num_split:
            bucket = mixed & (2 << self._level) - 1
        return tag, _WAYS * bucket

    def _split(self) -> None:
        first = _WAYS * self._num_split
        row = self._entries[first : first + _WAYS]
        bit = _TAG_SHIFT + self._level - _FIRST_LEVEL
        moved = [entry if entry >> bit & 1 else 0 for entry in row]
        stay = [0 if entry >> bit & 1 else entry for entry in row]
        self._entries[first : first + _WAYS] = array("Q", stay)
        self._entries.extend(moved)
        self._num_split += 1
        if self._num_split == 1 << self._level:
            self._level, self._num_split = self._level + 1, 0
