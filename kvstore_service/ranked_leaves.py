"""Leaves that do not wait in their policy's order: some go before all others, some after.

High priority is bounded: beyond ``max_high_bytes`` the tenant that holds most such bytes gives up
its least recently used leaf of high priority first, of its accounts the one that holds most. So a
tenant that marks everything as important pays itself, and not those that mark little.

Example: 100 bytes may be high. Tenant ``a`` holds 90, ``b`` 20; ``a`` gives up 10 or more.
"""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from kvstrata.kvstore_service.slots import NONE
from kvstrata.protos.retention import HIGH, LOW

Owner = tuple[str, str]
"""Tenant and account."""


class Rank(NamedTuple):
    """``LOW`` or ``HIGH``, and on whose account; blocks between them have none."""

    priority: int
    owner: Owner


class RankedLeaves:
    """The ranks of blocks, and those of them that are leaves, least recently used first.

    About 400 bytes a ranked block, nothing for others. O(1), or O(accounts) beyond the bound.

    Attributes:
        max_high_bytes: Bound on what goes after all others.
        low_bytes: Of blocks of low priority.
    """

    def __init__(self) -> None:
        self.max_high_bytes = 0
        self.low_bytes = 0
        self.high_bytes: Counter[Owner] = Counter()
        self._ranks: dict[int, Rank] = {}
        self._low: OrderedDict[int, None] = OrderedDict()
        self._high: dict[Owner, OrderedDict[int, None]] = {}

    @property
    def expendable_bytes(self) -> int:
        """Bytes that go before anything else: of low priority, and beyond the bound."""
        return self.low_bytes + max(0, self.high_bytes.total() - self.max_high_bytes)

    def __contains__(self, slot: int) -> bool:
        return slot in self._ranks

    def is_high(self, slot: int) -> bool:
        """Whether the block has high priority."""
        rank = self._ranks.get(slot)
        return rank is not None and rank.priority == HIGH

    def assign(self, slot: int, rank: Rank | None, num_bytes: int) -> None:
        """Let the block have this rank; it waits as a leaf no more."""
        self.weigh(slot, -num_bytes)
        self.leave(slot)
        self._ranks.pop(slot, None)
        if rank is not None:
            self._ranks[slot] = rank
            self.weigh(slot, num_bytes)

    def weigh(self, slot: int, change: int) -> None:
        """Count so many bytes more of the block."""
        rank = self._ranks.get(slot)
        if rank is None:
            return
        if rank.priority == LOW:
            self.low_bytes += change
        else:
            self.high_bytes[rank.owner] += change
            if not self.high_bytes[rank.owner]:
                del self.high_bytes[rank.owner]

    def wait(self, slot: int) -> None:
        """Let a ranked block that is a leaf wait; one that waits keeps its place."""
        rank = self._ranks[slot]
        room = self._low
        if rank.priority == HIGH:
            room = self._high.setdefault(rank.owner, OrderedDict())
        room.setdefault(slot, None)

    def leave(self, slot: int) -> None:
        """Let the block wait no more, if it does."""
        rank = self._ranks.get(slot)
        if rank is None:
            return
        if rank.priority == LOW:
            self._low.pop(slot, None)
        elif (room := self._high.get(rank.owner)) is not None:
            room.pop(slot, None)
            if not room:
                del self._high[rank.owner]

    def touch(self, slot: int) -> None:
        """Make a leaf that waits the most recently used."""
        rank = self._ranks.get(slot)
        room = None
        if rank is not None:
            room = self._low if rank.priority == LOW else self._high.get(rank.owner)
        if room is not None and slot in room:
            room.move_to_end(slot)

    def take_first(self) -> int:
        """Take the leaf that goes before all unranked ones; ``NONE`` without any."""
        if self._low:
            return self._low.popitem(last=False)[0]
        if self.high_bytes and self.high_bytes.total() > self.max_high_bytes:
            heaviest = self._by_weight(set(self.high_bytes))[0][0]
            return self._take({owner for owner in self._high if owner[0] == heaviest})
        return NONE

    def take_last(self) -> int:
        """Take the leaf that goes after all unranked ones; ``NONE`` without any."""
        return self._take(set(self._high))

    def _take(self, owners: set[Owner]) -> int:
        if not owners:
            return NONE
        slot = next(iter(self._high[self._by_weight(owners)[0]]))
        self.leave(slot)
        return slot

    def _by_weight(self, owners: set[Owner]) -> list[Owner]:
        """Return owners, heaviest tenant first, then heaviest account."""
        tenants: Counter[str] = Counter()
        for (tenant, _), num_bytes in self.high_bytes.items():
            tenants[tenant] += num_bytes
        weights = {o: (tenants[o[0]], o[0], self.high_bytes[o], o[1]) for o in owners}
        return sorted(owners, key=weights.__getitem__, reverse=True)

    def waiting(self) -> list[int]:
        """Return all ranked leaves, for checks."""
        return [*self._low, *(slot for room in self._high.values() for slot in room)]

    def check_integrity(self, held: Mapping[int, int]) -> None:
        """Raise ``AssertionError`` unless ranks and bytes are those of the blocks ``held``."""
        assert self._ranks.keys() <= held.keys(), "a block that is gone has a rank"
        high: Counter[Owner] = Counter()
        low_bytes = 0
        for slot, rank in self._ranks.items():
            low_bytes += held[slot] * (rank.priority == LOW)
            high[rank.owner] += held[slot] * (rank.priority == HIGH)
        assert (low_bytes, +high) == (self.low_bytes, self.high_bytes), "ranked bytes are wrong"
