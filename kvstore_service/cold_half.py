"""What may be shed under pressure: the refinements of the colder half of the blocks."""

from collections import OrderedDict
from collections.abc import Collection, Iterator

from kvstrata.kvstore_service.commit_rule import FINE, MID
from kvstrata.protos.identity import BlockKey

SHED_ORDER = (FINE, MID)


class ColdHalf:
    """Blocks in two halves by reads; of the colder, who holds FINE and MID, coldest first.

    A block is hot once it was read, until as many blocks as make up half of all were read after
    it. Writing makes no block hot, so a flood of new blocks costs none that is read its quality.
    Every method is O(1), amortised.
    """

    def __init__(self) -> None:
        self._hot: OrderedDict[BlockKey, tuple[int, ...]] = OrderedDict()
        self._cold: dict[BlockKey, tuple[int, ...]] = {}
        self._holders: dict[int, OrderedDict[BlockKey, None]] = {
            stratum: OrderedDict() for stratum in SHED_ORDER
        }

    def put(self, key: BlockKey, strata: Collection[int]) -> None:
        """Know the block and its strata, from those that may be shed; cold if it is new."""
        held = tuple(stratum for stratum in SHED_ORDER if stratum in strata)
        if key in self._hot:
            self._hot[key] = held
            return
        self.remove(key)
        self._cool(key, held)

    def read(self, key: BlockKey) -> None:
        """Make a known block the hottest."""
        strata = self._strata(key)
        if strata is None:
            return
        self.remove(key)
        self._hot[key] = strata
        while len(self._hot) > len(self._cold) + 1:
            self._cool(*self._hot.popitem(last=False))

    def shed(self, key: BlockKey, stratum: int) -> None:
        """Know that the block lost ``stratum``."""
        self._holders[stratum].pop(key, None)
        for half in (self._hot, self._cold):
            if key in half:
                half[key] = tuple(s for s in half[key] if s != stratum)

    def remove(self, key: BlockKey) -> None:
        """Forget the block. Idempotent."""
        self._hot.pop(key, None)
        for stratum in self._cold.pop(key, ()):
            self._holders[stratum].pop(key, None)

    def holders(self, stratum: int) -> Iterator[BlockKey]:
        """Yield the cold blocks that hold ``stratum``, coldest first; change nothing meanwhile."""
        return iter(self._holders[stratum])

    def _cool(self, key: BlockKey, strata: tuple[int, ...]) -> None:
        self._cold[key] = strata
        for stratum in strata:
            self._holders[stratum][key] = None

    def _strata(self, key: BlockKey) -> tuple[int, ...] | None:
        return self._hot.get(key, self._cold.get(key))
