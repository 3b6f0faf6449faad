"""The first tier: blocks in this process's memory."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvstrata.kvstore_service.ancestry import Ancestry, ancestry
from kvstrata.kvstore_service.block_run import BlockRun
from kvstrata.kvstore_service.block_table import BlockTable
from kvstrata.kvstore_service.cold_half import SHED_ORDER, ColdHalf
from kvstrata.kvstore_service.commit_rule import BASE
from kvstrata.kvstore_service.eviction import EvictionPolicy, Exempt
from kvstrata.kvstore_service.eviction_gittins import GittinsPolicy
from kvstrata.kvstore_service.held_frames import Held, HeldFrames
from kvstrata.kvstore_service.pin_table import Clock, PinTable
from kvstrata.kvstore_service.ranked_leaves import Rank, RankedLeaves
from kvstrata.kvstore_service.slot_leases import SlotLeases
from kvstrata.kvstore_service.slots import NONE, Slots
from kvstrata.kvstore_service.tier import OneByOne, StratumSizes, TierUsage
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey

HIGH_SHARE = 0.5
"""Of the capacity, that blocks of high priority may take before they are like any other."""


class DramTier(OneByOne):
    """A bounded number of bytes; keeps ``Tier``'s contract.

    Under pressure FINE goes first, then MID, of the colder half of the blocks (``ColdHalf``); then
    whole blocks, as the policy says, children before parents. Pinned and leased blocks are exempt
    from both. Blocks of low priority go before anything is shed, those of high priority last and
    unshed, as long as they take no more than half of the tier.
    Bytes that are not a frame with a readable header are a block without a parent, and their strata
    are never shed: nothing says what they mean.

    One event loop owns it; no method awaits, so each is atomic. Frames are kept as they come, one
    allocation each, so there is no arena that could fragment. What is known of a block lies in
    columns (``slots.py``) at the slot that ``BlockTable`` gives it.

    Args:
        capacity_bytes: The bound on the frames' bytes; the index and the policy come on top, about
            146 bytes a block, and Python's 33 bytes a frame.
        clock: Monotonic seconds, for pins and leases.
        policy: Makes what decides which blocks go.

    Attributes:
        rank_of: What decides which blocks have high or low priority.
        on_shed: Called with each block that lost a refinement under pressure, and its bytes.
    """

    name = "dram"
    resident = True
    shared = False

    def __init__(
        self,
        capacity_bytes: int,
        clock: Clock = time.monotonic,
        policy: Callable[[Slots, Sequence[int]], EvictionPolicy] = GittinsPolicy,
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._table = BlockTable()
        self._policy = policy(self._table, self._table.fingerprints)
        self._policy.ranked.max_high_bytes = int(HIGH_SHARE * capacity_bytes)
        self._held = HeldFrames(self._table)
        self._cold = ColdHalf(self._table)
        self._used = self._table.column("Q")
        self._num_uses = 0
        self._leases = SlotLeases(self._table, clock)
        self._pins = PinTable(clock)
        self._evictions = 0
        self.on_shed: Callable[[BlockKey, int], None] = _ignore
        self.rank_of: Callable[[BlockKey], Rank | None] = _unranked

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return the strata that are here; see ``Tier.get``."""
        return self.peek(key, strata)

    def peek(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` returns, without an await."""
        slot = self._table.find(key)
        return self._read(slot, strata) if self._held.holds(slot) else {}

    def peek_all(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes] | None:
        """Return ``strata`` if all of them are here; else None, and that is no use."""
        slot = self._table.find(key)
        if slot == NONE or not self._held.holds_all(slot, strata):
            return None
        return self._read(slot, strata)

    def _read(self, slot: int, strata: Sequence[int]) -> dict[int, bytes]:
        self._num_uses += 1
        self._used[slot] = self._num_uses
        self._policy.touch(slot)
        self._cold.read(slot)
        return self._held.frames(slot, strata)

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` would, unnoticed; see ``Tier.examine``."""
        slot = self._table.find(key)
        return self._held.frames(slot, strata) if self._held.holds(slot) else {}

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """Replace the block; see ``Tier.put``."""
        num_bytes = sum(map(len, frames.values()))
        if num_bytes > self._capacity_bytes:
            raise self._no_room(key, num_bytes)
        standing = standing or ancestry(key, frames)
        slot = self._slot_of(key)
        old_bytes = self._held.size(slot)
        parent = standing.parent if standing and not self._held.holds(slot) else None
        parent_slot = NONE if parent is None else self._slot_of(parent)
        self._policy.insert(slot, parent_slot, num_bytes)
        if (rank := self.rank_of(key)) is not None:
            self._policy.rank(slot, rank)
        victims = self._make_room(
            self._held.num_bytes - old_bytes + num_bytes - self._capacity_bytes,
            lambda other: other == slot or self._is_exempt(other),
        )
        if victims is None:
            if self._held.holds(slot):
                self._policy.resize(slot, old_bytes)
            else:
                self._policy.remove(slot)
                self._free([slot])
            raise self._no_room(key, num_bytes)
        self._held.put(slot, frames)
        self._num_uses += 1
        self._used[slot] = self._num_uses
        self._cold.put(slot, frames if standing is not None and BASE in frames else ())
        return victims

    def _no_room(self, key: BlockKey, num_bytes: int) -> CapacityError:
        return CapacityError(
            f"tier dram of {self._capacity_bytes} bytes has no room for {num_bytes} bytes",
            "raise the store's --dram, or unpin blocks",
            tier=self.name,
            block_key=key.encode(),
        )

    def _slot_of(self, key: BlockKey) -> int:
        """Return the slot of a block, held or not, given it now if it has none."""
        slot = self._table.find(key)
        return self._table.add(key) if slot == NONE else slot

    def _free(self, gone: Sequence[int]) -> None:
        """Give back the slots that nobody needs after these blocks are gone."""
        for slot in self._policy.leftovers(gone):
            self._table.remove(slot)

    def _is_exempt(self, slot: int) -> bool:
        if self._leases.holds(slot):
            return True
        return len(self._pins) > 0 and self._pins.holds(self._table.key(slot))

    def _make_room(self, excess: int, is_exempt: Exempt) -> list[BlockKey] | None:
        """Shed and evict ``excess`` bytes; return the evicted. None if impossible: none is gone."""
        if excess <= 0:
            return []
        ranked = self._policy.ranked
        shed = self._shed(
            excess - ranked.expendable_bytes, lambda slot: is_exempt(slot) or ranked.is_high(slot)
        )
        victims = self._policy.evict(excess - sum(len(f) for _, _, f in shed), is_exempt)
        if victims is None:
            for slot, stratum, frame in shed:
                self._held.add(slot, stratum, frame)
                self._policy.resize(slot, self._held.size(slot))
                self._cold.put(slot, self._held.strata(slot))
            return None
        for slot, _, frame in shed:
            self._held.set_partial(slot, True)
            self.on_shed(self._table.key(slot), len(frame))
        keys = [self._table.key(slot) for slot in victims]
        for slot in victims:
            self._drop_block(slot)
        self._free(victims)
        self._evictions += len(victims)
        return keys

    def _shed(self, excess: int, is_exempt: Exempt) -> list[tuple[int, int, bytes]]:
        """Take refinements out of cold blocks until ``excess`` bytes are free or none is left."""
        taken: list[tuple[int, int, bytes]] = []
        spared: list[int] = []
        for stratum in SHED_ORDER:
            while excess > 0 and (slot := self._cold.coldest(stratum)) != NONE:
                if is_exempt(slot):
                    spared.append(slot)
                    self._cold.remove(slot)
                    continue
                self._cold.shed(slot, stratum)
                frame = self._held.pop(slot, stratum)
                self._policy.resize(slot, self._held.size(slot))
                taken.append((slot, stratum, frame))
                excess -= len(frame)
        for slot in spared:
            self._cold.put(slot, self._held.strata(slot))
            self._cold.read(slot)
        return taken

    def _drop_block(self, slot: int) -> None:
        self._held.drop(slot)
        self._cold.remove(slot)
        self._leases.forget(slot)

    @property
    def ranked(self) -> RankedLeaves:
        """The blocks that have high or low priority."""
        return self._policy.ranked

    def rerank(self, keys: Iterable[BlockKey]) -> None:
        """Ask ``rank_of`` again about blocks."""
        for key in keys:
            slot = self._table.find(key)
            if self._held.holds(slot):
                self._policy.rank(slot, self.rank_of(key))

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """Return strata and sizes; see ``Tier.contains``."""
        slots = map(self._table.find, keys)
        return [self._held.sizes(slot) if self._held.holds(slot) else None for slot in slots]

    def look(self, keys: Sequence[BlockKey]) -> Held:
        """Return what is here of each block, in one pass over columns for a ``BlockRun``."""
        return self._held.look(self._find_all(keys))

    def _find_all(self, keys: Sequence[BlockKey]) -> npt.NDArray[np.int32]:
        if isinstance(keys, BlockRun):
            return self._table.find_run(keys.scope, keys.hashes)
        return np.array([self._table.find(key) for key in keys], np.int32)

    def set_partial(self, key: BlockKey, is_partial: bool) -> None:
        """Know whether a tier below may hold more strata; a put knows that none does."""
        slot = self._table.find(key)
        if self._held.holds(slot):
            self._held.set_partial(slot, is_partial)

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Forget blocks; see ``Tier.delete``."""
        gone = []
        for key in keys:
            self._pins.remove(key)
            slot = self._table.find(key)
            if self._held.holds(slot):
                self._policy.remove(slot)
                self._drop_block(slot)
                self._free([slot])
                gone.append(slot)
        return len(gone)

    async def drop(self, key: BlockKey, stratum: int) -> None:
        """Forget one stratum; see ``Tier.drop``."""
        slot = self._table.find(key)
        if not self._held.holds(slot) or not self._held.holds_all(slot, [stratum]):
            return
        if len(self._held.strata(slot)) == 1:
            self._policy.remove(slot)
            self._drop_block(slot)
            self._free([slot])
            return
        self._held.pop(slot, stratum)
        self._policy.resize(slot, self._held.size(slot))
        for lost in SHED_ORDER:
            if stratum in (lost, BASE):
                self._cold.shed(slot, lost)

    async def keys(self, limit: int) -> list[BlockKey]:
        """Return keys, most recently used first; see ``Tier.keys``."""
        if not self._table.capacity:
            return []
        slots = self._held.slots()
        used = np.frombuffer(self._used, np.uint64)[slots]
        if len(slots) > limit:
            recent = np.argpartition(used, -limit)[-limit:]
            slots, used = slots[recent], used[recent]
        return [self._table.key(int(slot)) for slot in slots[np.argsort(used)[::-1]]]

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks from eviction; see ``Tier.pin``."""
        missing = []
        for key in keys:
            if self._held.holds(self._table.find(key)):
                self._pins.add(key, ttl_s)
            else:
                missing.append(key)
        return missing

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins; see ``Tier.unpin``."""
        for key in keys:
            self._pins.remove(key)

    async def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks to the end of the lease; see ``Tier.lease``."""
        if not self._table.capacity:
            return list(keys)
        slots = self._find_all(keys)
        is_here = self._held.look(slots).strata > 0
        self._leases.add(slots[is_here], ttl_s)
        return [keys[int(i)] for i in np.flatnonzero(~is_here)]

    async def usage(self) -> TierUsage:
        """Return what is held; see ``Tier.usage``."""
        held = self._held
        return TierUsage(held.num_blocks, held.num_bytes, self._capacity_bytes, self._evictions)

    async def check_integrity(self) -> None:
        """Compare the accounting with the blocks; see ``Tier.check_integrity``."""
        self._held.check_integrity()
        held = self._held.num_bytes
        assert held <= self._capacity_bytes, f"dram holds {held} of {self._capacity_bytes} bytes"
        assert len(self._policy) == self._held.num_blocks, "the policy knows other blocks than dram"
        self._policy.check_integrity()
        self._table.check_integrity()

    async def close(self) -> None:
        """Forget everything."""
        await DramTier.delete(self, await self.keys(self._held.num_blocks))


def _ignore(key: BlockKey, num_bytes: int) -> None:
    """Nobody listens."""


def _unranked(key: BlockKey) -> None:
    """Every block is like any other."""
