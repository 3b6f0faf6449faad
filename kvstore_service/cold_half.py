"""What may be shed under pressure: the refinements of the colder half of the blocks."""

from collections.abc import Collection, Iterator

from kvstrata.kvstore_service.commit_rule import FINE, MID
from kvstrata.kvstore_service.slot_order import SlotLinks, SlotOrder
from kvstrata.kvstore_service.slots import Slots

SHED_ORDER = (FINE, MID)
_HOT, _COLD = 1, 2
_BITS = {FINE: 4, MID: 8}
_STRATA = sum(_BITS.values())


class ColdHalf:
    """Blocks in two halves by reads; of the colder, who holds FINE and MID, coldest first.

    A block is hot once it was read, until as many blocks as make up half of all were read after
    it. Writing makes no block hot, so a flood of new blocks costs none that is read its quality.
    Every method is O(1), amortised; 17 bytes a block.

    Args:
        slots: Who gives the blocks' slots, and columns beside them.
    """

    def __init__(self, slots: Slots) -> None:
        self._state = slots.column("B")
        links = SlotLinks(slots)
        self._hot = SlotOrder(links)
        self._holders = {MID: SlotOrder(links), FINE: SlotOrder(SlotLinks(slots))}
        self._num_cold = 0

    def put(self, slot: int, strata: Collection[int]) -> None:
        """Know the block and its strata, from those that may be shed; cold if it is new."""
        held = sum(bit for stratum, bit in _BITS.items() if stratum in strata)
        if self._state[slot] & _HOT:
            self._state[slot] = _HOT | held
            return
        self.remove(slot)
        self._cool(slot, held)

    def read(self, slot: int) -> None:
        """Make a known block the hottest."""
        state = self._state[slot]
        if not state or slot == self._hot.last:
            return
        self.remove(slot)
        self._state[slot] = _HOT | state & _STRATA
        self._hot.append(slot)
        while len(self._hot) > self._num_cold + 1:
            coldest = self._hot.first
            self._hot.remove(coldest)
            self._cool(coldest, self._state[coldest] & _STRATA)

    def shed(self, slot: int, stratum: int) -> None:
        """Know that the block lost ``stratum``."""
        state, bit = self._state[slot], _BITS[stratum]
        if state & _COLD and state & bit:
            self._holders[stratum].remove(slot)
        self._state[slot] = state & ~bit

    def remove(self, slot: int) -> None:
        """Forget the block. Idempotent."""
        state = self._state[slot]
        if state & _HOT:
            self._hot.remove(slot)
        elif state & _COLD:
            self._num_cold -= 1
            for stratum, bit in _BITS.items():
                if state & bit:
                    self._holders[stratum].remove(slot)
        self._state[slot] = 0

    def coldest(self, stratum: int) -> int:
        """Return the coldest block of the cold half that holds ``stratum``, ``NONE`` without."""
        return self._holders[stratum].first

    def holders(self, stratum: int) -> Iterator[int]:
        """Yield the cold blocks that hold ``stratum``, coldest first; change nothing meanwhile."""
        return iter(self._holders[stratum])

    def _cool(self, slot: int, held: int) -> None:
        self._state[slot] = _COLD | held
        self._num_cold += 1
        for stratum, bit in _BITS.items():
            if held & bit:
                self._holders[stratum].append(slot)
