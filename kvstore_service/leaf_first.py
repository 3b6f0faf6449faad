"""The forest of blocks of one tier: what every policy that gives up leaves first shares."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from kvstrata.kvstore_service.eviction import Exempt
from kvstrata.kvstore_service.ranked_leaves import Rank, RankedLeaves
from kvstrata.kvstore_service.slots import NONE, Slots

_HELD, _QUEUED = 1, 2


class LeafFirst(ABC):
    """Keeps ``EvictionPolicy``'s contract; a policy says how leaves wait and which is next.

    A block gets an entry among the leaves when it becomes one. The entry may outlive that: one
    whose block got a child or is gone is dropped when it is met, so that a use costs O(1). A slot
    that is used again keeps the entry that it has. 26 bytes a block, entries and ghosts on top.
    Blocks with a rank have no part in a policy's order; those with low priority go before it, those
    with high priority after.

    Args:
        slots: Who gives the slots, and columns beside them.
        fingerprints: Column of 64 bits of each block's hash, to know one that comes back.
    """

    def __init__(self, slots: Slots, fingerprints: Sequence[int]) -> None:
        self._fingerprints = fingerprints
        self._state = slots.column("B")
        self._parent = slots.column("i")
        self._children = slots.column("I")
        self._bytes = slots.column("I")
        self._stamp = slots.column("Q")
        """When the block, or a child that is gone, was used last, or what the policy orders by."""
        self._uses = slots.column("B")
        """Uses since it came, as far as the policy counts."""
        self._place = slots.column("i")
        """Where it waits as a leaf; the policy says what the number means."""
        self._size = 0
        self._clock = 0
        self.ranked = RankedLeaves()

    @abstractmethod
    def _admitted(self, slot: int) -> None:
        """Set up a new block."""

    @abstractmethod
    def _used(self, slot: int) -> None:
        """Count a use."""

    @abstractmethod
    def _add_entry(self, slot: int) -> None:
        """Let a block that became a leaf wait."""

    @abstractmethod
    def _coldest(self) -> int:
        """Take the leaf that should go next out of the waiting ones; ``NONE`` without any."""

    @abstractmethod
    def _entries(self) -> Sequence[int]:
        """Return the slots of all entries, stale ones too."""

    def _evicted(self, slots: Sequence[int]) -> None:  # noqa: B027
        """Learn which blocks are gone for good."""

    def _resized(self, slot: int, change: int) -> None:  # noqa: B027
        """Learn that the bytes held of the block change, also when it comes and goes."""

    def insert(self, slot: int, parent: int, num_bytes: int) -> None:
        """See ``EvictionPolicy.insert``."""
        if self._state[slot] & _HELD:
            self.touch(slot)
            self.resize(slot, num_bytes)
            return
        self._clock += 1
        self._parent[slot] = NONE if parent == slot else parent
        self._bytes[slot] = num_bytes
        self._uses[slot] = 0
        self._admitted(slot)
        self._link(slot)

    def touch(self, slot: int) -> None:
        """See ``EvictionPolicy.touch``."""
        self._clock += 1
        if self._state[slot] & _HELD:
            self._used(slot)
            self.ranked.touch(slot)

    def rank(self, slot: int, rank: Rank | None) -> None:
        """See ``EvictionPolicy.rank``."""
        if self._state[slot] & _HELD:
            self.ranked.assign(slot, rank, self._bytes[slot])
            self._enqueue(slot)

    def resize(self, slot: int, num_bytes: int) -> None:
        """See ``EvictionPolicy.resize``."""
        if self._state[slot] & _HELD:
            self._weigh(slot, num_bytes - self._bytes[slot])
            self._bytes[slot] = num_bytes

    def remove(self, slot: int) -> None:
        """See ``EvictionPolicy.remove``."""
        if self._state[slot] & _HELD:
            self._unlink(slot)
            self.ranked.assign(slot, None, 0)

    def evict(self, num_bytes: int, is_exempt: Exempt) -> list[int] | None:
        """See ``EvictionPolicy.evict``. An exempt leaf that is met counts as used."""
        taken: list[int] = []
        spared: list[int] = []
        hidden: list[int] = []
        while num_bytes > 0:
            slot = self._next()
            if slot != NONE and is_exempt(slot):
                spared.append(slot)
            elif slot != NONE:
                self._unlink(slot)
                taken.append(slot)
                num_bytes -= self._bytes[slot]
            elif spared:
                # Only ancestors of exempt blocks are left: they surface once those are hidden.
                for exempt in spared:
                    self._unlink(exempt)
                hidden += spared
                spared = []
            else:
                break
        for slot in hidden:
            self._link(slot)
        for slot in (*spared, *hidden):
            self._stamp[slot] = self._clock
            self._enqueue(slot)
        if num_bytes > 0:
            for slot in reversed(taken):
                self._link(slot)
            return None
        for slot in taken:
            self.ranked.assign(slot, None, 0)
        self._evicted(taken)
        return taken

    def _next(self) -> int:
        """Take the leaf out that should go next, ranks considered; ``NONE`` without any."""
        slot = self.ranked.take_first()
        if slot == NONE:
            slot = self._coldest()
        return self.ranked.take_last() if slot == NONE else slot

    def leftovers(self, gone: Sequence[int]) -> set[int]:
        """See ``EvictionPolicy.leftovers``."""
        touched = {*gone, *(self._parent[slot] for slot in gone)} - {NONE}
        unused = {s for s in touched if not (self._state[s] & _HELD or self._children[s])}
        for slot in unused:
            self._parent[slot] = NONE
        return unused

    def _link(self, slot: int) -> None:
        self._state[slot] |= _HELD
        self._size += 1
        self._weigh(slot, self._bytes[slot])
        parent = self._parent[slot]
        if parent != NONE:
            self._children[parent] += 1
            self.ranked.leave(parent)
        self._enqueue(slot)

    def _unlink(self, slot: int) -> None:
        """Take the block out; its parent, if that was the last child, is a leaf of the same age."""
        self._state[slot] &= ~_HELD
        self._size -= 1
        self._weigh(slot, -self._bytes[slot])
        self.ranked.leave(slot)
        parent = self._parent[slot]
        if parent == NONE:
            return
        self._children[parent] -= 1
        if not self._children[parent] and self._state[parent] & _HELD:
            self._stamp[parent] = max(self._stamp[parent], self._stamp[slot])
            self._enqueue(parent)

    def _enqueue(self, slot: int) -> None:
        state = self._state[slot]
        if not state & _HELD or self._children[slot]:
            return
        if slot in self.ranked:
            self.ranked.wait(slot)
        elif not state & _QUEUED:
            self._state[slot] = state | _QUEUED
            self._add_entry(slot)

    def _weigh(self, slot: int, change: int) -> None:
        self.ranked.weigh(slot, change)
        self._resized(slot, change)

    def _is_queued(self, slot: int) -> bool:
        """Whether the policy has an entry of the block among the leaves."""
        return bool(self._state[slot] & _QUEUED)

    def _dequeued(self, slot: int) -> None:
        """Know that the block has no entry any more."""
        self._state[slot] &= ~_QUEUED

    def _is_held(self, slot: int) -> bool:
        return bool(self._state[slot] & _HELD)

    def _is_stale(self, slot: int) -> bool:
        """Whether an entry of the block means nothing: it is gone, or no leaf, or has a rank."""
        held = self._state[slot] & _HELD
        return not held or self._children[slot] > 0 or slot in self.ranked

    def __len__(self) -> int:
        """Return the number of blocks known."""
        return self._size

    def check_integrity(self) -> None:
        """See ``EvictionPolicy.check_integrity``."""
        held = [slot for slot, state in enumerate(self._state) if state & _HELD]
        assert len(held) == self._size, "the policy miscounts blocks"
        children: dict[int, int] = {}
        for slot in held:
            if self._parent[slot] != NONE:
                children[self._parent[slot]] = children.get(self._parent[slot], 0) + 1
        known = {slot: count for slot, count in enumerate(self._children) if count}
        assert children == known, "the policy miscounts children"
        entries = list(self._entries())
        assert len(entries) == len(set(entries)), "a block waits twice"
        assert all(self._is_queued(slot) for slot in entries), "an entry is not known"
        leaves = {slot for slot in held if not self._children[slot]}
        ranked = self.ranked.waiting()
        assert len(ranked) == len(set(ranked)), "a ranked block waits twice"
        assert set(ranked) == {slot for slot in leaves if slot in self.ranked}, (
            "wrong ranked leaves"
        )
        lost = leaves - set(entries) - set(ranked)
        assert not lost, f"{len(lost)} leaves wait nowhere"
        self.ranked.check_integrity({slot: self._bytes[slot] for slot in held})
