"""Which block has which slot: a hash table in arrays, 36 bytes a block and no object.

Chains of slots hang at buckets, one bucket a block. The table grows by linear hashing: a bucket is
split with every block beyond, so no call waits until millions of blocks have moved.

Example: of buckets 0 to 3, bucket 0 was split last: a block whose fingerprint ends in 000 (binary)
hangs at 0, one in 100 at 4, and those in 01, 10 and 11 at 1, 2 and 3, which are split next.

A fingerprint is Python's keyed hash of the block hash, so nobody can choose tokens whose blocks all
hang at one bucket.

Source:
    Litwin, Linear hashing: a new tool for file and table addressing, VLDB 1980.
"""

import struct
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvstrata.kvstore_service.slots import NONE, Slots
from kvstrata.protos.identity import HASH_BYTES, BlockHash, BlockKey, ScopeDigest

_FIRST_LEVEL = 10  # of buckets, as a power of two
_WORD = (1 << 64) - 1
_HASH = struct.Struct("<QQ")
assert _HASH.size == HASH_BYTES


class BlockTable(Slots):
    """Slots of blocks by key. Every method is O(1) but ``find_run``.

    Attributes:
        fingerprints: Column of 64 bits a block, as good as random.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fingerprints = self.column("Q")
        self._low = self.column("Q")
        self._high = self.column("Q")
        self._scope = self.column("I")
        self._scopes = _Scopes()
        self._size = 0
        self._level = _FIRST_LEVEL
        self._num_split = 0
        self._heads = array("i", [NONE]) * (1 << _FIRST_LEVEL)

    def __len__(self) -> int:
        return self._size

    def find(self, key: BlockKey) -> int:
        """Return the block's slot, ``NONE`` for an unknown block."""
        fingerprint = hash(key.block_hash) & _WORD
        slot: int = self._heads[self._bucket(fingerprint)]
        while slot != NONE:
            if (
                self.fingerprints[slot] == fingerprint
                and (self._low[slot], self._high[slot]) == _HASH.unpack(key.block_hash)
                and self._scopes.name(self._scope[slot]) == key.scope
            ):
                return slot
            slot = self._next[slot]
        return NONE

    def find_run(self, scope: ScopeDigest, hashes: bytes) -> npt.NDArray[np.int32]:
        """Return the slots of the blocks of concatenated ``hashes``, ``NONE`` for unknown ones.

        A tenth of the time that as many calls of ``find`` take.
        """
        words = np.frombuffer(hashes, "<u8").reshape(-1, 2)
        found = np.full(len(words), NONE, np.int32)
        number = self._scopes.find(scope)
        if number == NONE:
            return found
        hashed = [hash(hashes[i : i + HASH_BYTES]) for i in range(0, len(hashes), HASH_BYTES)]
        fingerprints = np.array(hashed, np.int64).view(np.uint64)
        low, high = np.frombuffer(self._low, np.uint64), np.frombuffer(self._high, np.uint64)
        scopes = np.frombuffer(self._scope, np.uint32)
        following = np.frombuffer(self._next, np.int32)
        slots = np.frombuffer(self._heads, np.int32)[self._buckets(fingerprints)]
        open_ = np.flatnonzero(slots != NONE)
        while len(open_):
            slot, wanted = slots[open_], words[open_]
            same = (low[slot] == wanted[:, 0]) & (high[slot] == wanted[:, 1])
            same &= scopes[slot] == number
            found[open_[same]] = slot[same]
            open_, slot = open_[~same], following[slot[~same]]
            slots[open_] = slot
            open_ = open_[slot != NONE]
        return found

    def add(self, key: BlockKey) -> int:
        """Return a slot for a block that has none."""
        slot = self.take()
        fingerprint = self.fingerprints[slot] = hash(key.block_hash) & _WORD
        self._low[slot], self._high[slot] = _HASH.unpack(key.block_hash)
        self._scope[slot] = self._scopes.add(key.scope)
        bucket = self._bucket(fingerprint)
        self._next[slot] = self._heads[bucket]
        self._heads[bucket] = slot
        self._size += 1
        if self._size > len(self._heads):
            self._split()
        return slot

    def remove(self, slot: int) -> None:
        """Forget the block in ``slot``, which is free then."""
        bucket = self._bucket(self.fingerprints[slot])
        if self._heads[bucket] == slot:
            self._heads[bucket] = self._next[slot]
        else:
            before = self._heads[bucket]
            while self._next[before] != slot:
                before = self._next[before]
            self._next[before] = self._next[slot]
        self._scopes.remove(self._scope[slot])
        self._size -= 1
        self.give_back(slot)

    def key(self, slot: int) -> BlockKey:
        """Return the key of the block in ``slot``."""
        block_hash = _HASH.pack(self._low[slot], self._high[slot])
        return BlockKey(self._scopes.name(self._scope[slot]), BlockHash(block_hash))

    def _bucket(self, fingerprint: int) -> int:
        bucket = fingerprint & (1 << self._level) - 1
        return bucket if bucket >= self._num_split else fingerprint & (2 << self._level) - 1

    def _buckets(self, fingerprints: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        few, many = np.uint64((1 << self._level) - 1), np.uint64((2 << self._level) - 1)
        buckets = fingerprints & few
        return np.where(buckets >= self._num_split, buckets, fingerprints & many)

    def _split(self) -> None:
        """Share out the chain of the next bucket between it and a new one."""
        slot: int = self._heads[self._num_split]
        stay = move = NONE
        while slot != NONE:
            after = self._next[slot]
            if self.fingerprints[slot] >> self._level & 1:
                self._next[slot], move = move, slot
            else:
                self._next[slot], stay = stay, slot
            slot = after
        self._heads[self._num_split] = stay
        self._heads.append(move)
        self._num_split += 1
        if self._num_split == 1 << self._level:
            self._level, self._num_split = self._level + 1, 0

    def _slots(self) -> Iterator[int]:
        for slot in self._heads:
            while slot != NONE:
                yield slot
                slot = self._next[slot]

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless every block is found where it hangs."""
        slots = list(self._slots())
        assert len(slots) == len(set(slots)) == self._size, "the table miscounts blocks"
        for slot in slots:
            assert self.find(self.key(slot)) == slot, f"{self.key(slot)} hangs at a wrong bucket"
        self._scopes.check_integrity(self._scope[slot] for slot in slots)


class _Scopes:
    """A number for each scope, as long as one of its blocks is known."""

    def __init__(self) -> None:
        self._numbers: dict[ScopeDigest, int] = {}
        self._names: list[ScopeDigest] = []
        self._counts: list[int] = []
        self._free: list[int] = []

    def find(self, scope: ScopeDigest) -> int:
        return self._numbers.get(scope, NONE)

    def name(self, number: int) -> ScopeDigest:
        return self._names[number]

    def add(self, scope: ScopeDigest) -> int:
        """Return the scope's number and count a block more."""
        number = self._numbers.get(scope)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._names[number] = scope
            else:
                number = len(self._names)
                self._names.append(scope)
                self._counts.append(0)
            self._numbers[scope] = number
        self._counts[number] += 1
        return number

    def remove(self, number: int) -> None:
        """Count a block less."""
        self._counts[number] -= 1
        if not self._counts[number]:
            del self._numbers[self._names[number]]
            self._free.append(number)

    def check_integrity(self, numbers: Iterator[int]) -> None:
        counts = [0] * len(self._names)
        for number in numbers:
            counts[number] += 1
        assert counts == self._counts, "the table miscounts the blocks of scopes"
