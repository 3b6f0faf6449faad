"""The leaf that is worth least goes first: expected uses per time and byte, learned as it runs.

A leaf is worth the same 64 tokens as any other, times the rate at which blocks like it are read
again (``reuse_ages.py``), for its bytes. Like it are those used as often and waiting as long.
Blocks that are gone are remembered by hash, four times as many as are held, so that waits longer
than a stay are learned too, and a block that comes back is known to have been used before. A flood
of blocks that nobody asks for twice teaches that new blocks are worth nothing, and goes first.

Uses in quick succession (a write and its first read, the strata of one block) count as one, as in
LRU-K. Leaves are compared in random samples, with the worst of earlier ones, since no order by age
would last: O(1) for everything, amortised. About 1 KiB of memory a held block, ghosts included.

Source:
    The index: Gittins, Bandit Processes and Dynamic Allocation Indices, 1979. Close relatives: LHD
    (Beckmann et al., NSDI 2018), which samples and ranks by hit density, and the ghosts of 2Q.
"""

import random
from collections.abc import Sequence

from kvstrata.kvstore_service.eviction import Key
from kvstrata.kvstore_service.ghost_queue import GhostQueue
from kvstrata.kvstore_service.leaf_first import LeafFirst, Node
from kvstrata.kvstore_service.reuse_ages import ReuseAges, age_bucket

_NUM_CLASSES = 4
_SAMPLES = 8
_POOL = 8  # the worst of earlier samples, compared again
_GHOSTS_PER_BLOCK = 4
_MEMORY = 0.9
_LEAST_PERIOD = 1024  # calls between two lessons; as many as blocks are held if that is more
_SLACK = 64  # stale entries that there may always be
_AT_ONCE = 64  # a use within 1/64 of the blocks held after the last one is the same use


class GittinsPolicy(LeafFirst[Key]):
    """Samples leaves and gives up the one of least worth, the least recent among equals.

    Args:
        seed: Chooses the samples.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._ages = ReuseAges(_NUM_CLASSES, _MEMORY)
        self._ghosts = GhostQueue()
        self._leaves: list[Node[Key]] = []
        self._pool: list[Node[Key]] = []
        self._random = random.Random(seed).random
        self._next_lesson = _LEAST_PERIOD

    def _admitted(self, node: Node[Key]) -> None:
        note = self._ghosts.pop(node.key)
        if note is not None:
            stamp, uses = divmod(note, _NUM_CLASSES)
            self._ages.end(uses, self._clock - stamp)
            node.uses = min(uses + 1, _NUM_CLASSES - 1)
        self._wait(node)

    def _used(self, node: Node[Key]) -> None:
        age = self._clock - node.stamp
        if age <= 2 + len(self._nodes) // _AT_ONCE:
            node.stamp = self._clock
            return
        self._ages.end(node.uses, age)
        node.uses = min(node.uses + 1, _NUM_CLASSES - 1)
        self._wait(node)

    def _wait(self, node: Node[Key]) -> None:
        node.stamp = self._clock
        self._ages.begin(node.uses)

    def _evicted(self, nodes: Sequence[Node[Key]]) -> None:
        for node in nodes:
            self._ghosts.add(node.key, node.stamp * _NUM_CLASSES + node.uses)
        self._ghosts.shrink(_GHOSTS_PER_BLOCK * len(self._nodes))

    def _coldest(self) -> Node[Key] | None:
        if self._clock >= self._next_lesson:
            self._next_lesson = self._clock + max(_LEAST_PERIOD, len(self._nodes))
            self._ages.learn()
        clock, worth = self._clock, self._ages.worth
        candidates = self._candidates()
        ranked = [
            (worth[n.uses][age_bucket(clock - n.stamp)] / (n.num_bytes or 1), n.stamp, i)
            for i, n in enumerate(candidates)
        ]
        if not ranked:
            return None
        ranked.sort()
        coldest, *self._pool = [candidates[i] for _, _, i in ranked[: _POOL + 1]]
        self._drop_entry(coldest)
        return coldest

    def _candidates(self) -> list[Node[Key]]:
        """Return the pool and new samples, or all leaves if there are few; drop stale entries."""
        leaves = self._leaves
        if len(leaves) <= 4 * _SAMPLES:
            for node in [node for node in leaves if self._is_stale(node)]:
                self._drop_entry(node)
            return list(leaves)
        chosen = [node for node in self._pool if node.is_queued and not self._is_stale(node)]
        wanted = len(chosen) + _SAMPLES
        while leaves and len(chosen) < wanted:
            node = leaves[int(self._random() * len(leaves))]
            if not node.is_held or node.key in self._children:
                self._drop_entry(node)
            else:
                chosen.append(node)
        return list(dict.fromkeys(chosen))

    def _add_entry(self, node: Node[Key]) -> None:
        node.place = len(self._leaves)
        self._leaves.append(node)
        if len(self._leaves) > 2 * len(self._nodes) + _SLACK:
            # Blocks that are deleted, not evicted, would pile up.
            for stale in [entry for entry in self._leaves if not entry.is_held]:
                self._drop_entry(stale)

    def _drop_entry(self, node: Node[Key]) -> None:
        last = self._leaves.pop()
        if last is not node:
            self._leaves[node.place] = last
            last.place = node.place
        node.is_queued = False

    def _entries(self) -> Sequence[Node[Key]]:
        return self._leaves

    def check_integrity(self) -> None:
        """See ``EvictionPolicy.check_integrity``."""
        super().check_integrity()
        places = [node.place for node in self._leaves]
        assert places == list(range(len(places))), "leaves are not where they say"
