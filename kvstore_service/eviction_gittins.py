"""The leaf that is worth least goes first: expected uses per time and byte, learned as it runs.

A leaf is worth the same 64 tokens as any other, times the rate at which blocks like it are read
again (``reuse_ages.py``), for its bytes. Like it are those used as often and waiting as long.
Blocks that are gone are remembered by hash, four times as many as are held, so that waits longer
than a stay are learned too, and a block that comes back is known to have been used before. A flood
of blocks that nobody asks for twice teaches that new blocks are worth nothing, and goes first.

Uses in quick succession (a write and its first read, the strata of one block) count as one, as in
LRU-K. Leaves are compared in random samples, with the worst of earlier ones, since no order by age
would last: O(1) for everything, amortised. 62 bytes of memory a held block, ghosts included.

Source:
    The index: Gittins, Bandit Processes and Dynamic Allocation Indices, 1979. Close relatives: LHD
    (Beckmann et al., NSDI 2018), which samples and ranks by hit density, and the ghosts of 2Q.
"""

import random
from array import array
from collections.abc import Sequence

from kvstrata.kvstore_service.ghost_table import GhostTable
from kvstrata.kvstore_service.leaf_first import LeafFirst
from kvstrata.kvstore_service.reuse_ages import ReuseAges, age_bucket
from kvstrata.kvstore_service.slots import NONE, Slots

_NUM_CLASSES = 4
_SAMPLES = 8
_POOL = 8  # the worst of earlier samples, compared again
_GHOSTS_PER_BLOCK = 4
_MEMORY = 0.9
_LEAST_PERIOD = 1024  # calls between two lessons; as many as blocks are held if that is more
_SLACK = 64  # stale entries that there may always be
_AT_ONCE = 64  # a use within 1/64 of the blocks held after the last one is the same use


class GittinsPolicy(LeafFirst):
    """Samples leaves and gives up the one of least worth, the least recent among equals.

    Args:
        slots: Who gives the slots, and columns beside them.
        fingerprints: Column of 64 bits of each block's hash.
        seed: Chooses the samples.
    """

    def __init__(self, slots: Slots, fingerprints: Sequence[int], seed: int = 0) -> None:
        super().__init__(slots, fingerprints)
        self._ages = ReuseAges(_NUM_CLASSES, _MEMORY)
        self._ghosts = GhostTable()
        self._leaves = array("i")
        self._pool: list[int] = []
        self._random = random.Random(seed).random
        self._next_lesson = _LEAST_PERIOD

    def _admitted(self, slot: int) -> None:
        ghost = self._ghosts.pop(self._fingerprints[slot], self._clock)
        if ghost is not None:
            age, uses = ghost
            self._ages.end(uses, age)
            self._uses[slot] = min(uses + 1, _NUM_CLASSES - 1)
        self._ghosts.grow(_GHOSTS_PER_BLOCK * len(self))
        self._wait(slot)

    def _used(self, slot: int) -> None:
        age = self._clock - self._stamp[slot]
        if age <= 2 + len(self) // _AT_ONCE:
            self._stamp[slot] = self._clock
            return
        uses = self._uses[slot]
        self._ages.end(uses, age)
        self._uses[slot] = min(uses + 1, _NUM_CLASSES - 1)
        self._wait(slot)

    def _wait(self, slot: int) -> None:
        self._stamp[slot] = self._clock
        self._ages.begin(self._uses[slot])

    def _evicted(self, slots: Sequence[int]) -> None:
        for slot in slots:
            used, uses = self._stamp[slot], self._uses[slot]
            self._ghosts.add(self._fingerprints[slot], used, uses, self._clock)

    def _coldest(self) -> int:
        if self._clock >= self._next_lesson:
            self._next_lesson = self._clock + max(_LEAST_PERIOD, len(self))
            self._ages.learn()
        clock, worth = self._clock, self._ages.worth
        ranked = []
        for i, slot in enumerate(self._candidates()):
            stamp = self._stamp[slot]
            value = worth[self._uses[slot]][age_bucket(clock - stamp)]
            ranked.append((value / (self._bytes[slot] or 1), stamp, i, slot))
        if not ranked:
            return NONE
        ranked.sort()
        coldest, *self._pool = [slot for _, _, _, slot in ranked[: _POOL + 1]]
        self._drop_entry(coldest)
        return coldest

    def _candidates(self) -> list[int]:
        """Return the pool and new samples, or all leaves if there are few; drop stale entries."""
        leaves = self._leaves
        if len(leaves) <= 4 * _SAMPLES:
            for slot in [slot for slot in leaves if self._is_stale(slot)]:
                self._drop_entry(slot)
            return list(leaves)
        chosen = [s for s in self._pool if self._is_queued(s) and not self._is_stale(s)]
        wanted = len(chosen) + _SAMPLES
        while leaves and len(chosen) < wanted:
            slot = leaves[int(self._random() * len(leaves))]
            if self._is_stale(slot):
                self._drop_entry(slot)
            else:
                chosen.append(slot)
        return list(dict.fromkeys(chosen))

    def _add_entry(self, slot: int) -> None:
        self._place[slot] = len(self._leaves)
        self._leaves.append(slot)
        if len(self._leaves) > 2 * len(self) + _SLACK:
            # Blocks that are deleted, not evicted, would pile up.
            for stale in [entry for entry in self._leaves if not self._is_held(entry)]:
                self._drop_entry(stale)

    def _drop_entry(self, slot: int) -> None:
        last = self._leaves.pop()
        if last != slot:
            self._leaves[self._place[slot]] = last
            self._place[last] = self._place[slot]
        self._dequeued(slot)

    def _entries(self) -> Sequence[int]:
        return self._leaves

    def check_integrity(self) -> None:
        """See ``EvictionPolicy.check_integrity``."""
        super().check_integrity()
        places = [self._place[slot] for slot in self._leaves]
        assert places == list(range(len(places))), "leaves are not where they say"
