"""The first tier: blocks in this process's memory."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice

from kvstrata.kvstore_service.pin_table import Clock, PinTable
from kvstrata.kvstore_service.tier import StratumSizes, TierUsage
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey


class DramTier:
    """A bounded number of bytes, least recently used block out first; keeps ``Tier``'s contract.

    One event loop owns it; no method awaits, so each is atomic.

    Args:
        capacity_bytes: The bound on the frames' bytes; Python's own overhead comes on top.
        clock: Monotonic seconds, for pins.
    """

    name = "dram"
    resident = True

    def __init__(self, capacity_bytes: int, clock: Clock | None = None) -> None:
        self._capacity_bytes = capacity_bytes
        self._blocks: OrderedDict[BlockKey, dict[int, bytes]] = OrderedDict()
        self._num_bytes = 0
        self._evictions = 0
        self._pins = PinTable(clock) if clock else PinTable()

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return the strata that are here; see ``Tier.get``."""
        return self.peek(key, strata)

    def peek(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` returns, without an await."""
        block = self._blocks.get(key)
        if block is None:
            return {}
        self._blocks.move_to_end(key)
        return {stratum: block[stratum] for stratum in strata if stratum in block}

    async def put(self, key: BlockKey, frames: Mapping[int, bytes]) -> list[BlockKey]:
        """Replace the block; see ``Tier.put``."""
        num_bytes = _size(frames)
        victims = self._victims(key, num_bytes)
        for victim in victims:
            self._forget(victim)
        self._evictions += len(victims)
        self._forget(key)
        self._blocks[key] = dict(frames)
        self._num_bytes += num_bytes
        return victims

    def _victims(self, key: BlockKey, num_bytes: int) -> list[BlockKey]:
        excess = self._num_bytes - _size(self._blocks.get(key, {})) + num_bytes
        excess -= self._capacity_bytes
        victims: list[BlockKey] = []
        for candidate, frames in self._blocks.items():
            if excess <= 0:
                break
            if candidate != key and not self._pins.holds(candidate):
                victims.append(candidate)
                excess -= _size(frames)
        if excess > 0:
            raise CapacityError(
                f"tier dram of {self._capacity_bytes} bytes has no room for {num_bytes} bytes",
                "raise the store's --dram, or unpin blocks",
                tier=self.name,
                block_key=key.encode(),
            )
        return victims

    def _forget(self, key: BlockKey) -> bool:
        frames = self._blocks.pop(key, None)
        if frames is None:
            return False
        self._num_bytes -= _size(frames)
        return True

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """Return strata and sizes; see ``Tier.contains``."""
        return [self._sizes(key) for key in keys]

    def _sizes(self, key: BlockKey) -> StratumSizes | None:
        frames = self._blocks.get(key)
        if frames is None:
            return None
        return {stratum: len(frame) for stratum, frame in frames.items()}

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Forget blocks; see ``Tier.delete``."""
        for key in keys:
            self._pins.remove(key)
        return sum(self._forget(key) for key in keys)

    async def drop(self, key: BlockKey, stratum: int) -> None:
        """Forget one stratum; see ``Tier.drop``."""
        frames = self._blocks.get(key, {})
        self._num_bytes -= len(frames.pop(stratum, b""))
        if not frames:
            self._blocks.pop(key, None)

    async def keys(self, limit: int) -> list[BlockKey]:
        """Return keys, most recently used first; see ``Tier.keys``."""
        return list(islice(reversed(self._blocks), limit))

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> None:
        """Exempt blocks from eviction; see ``Tier.pin``."""
        for key in keys:
            if key in self._blocks:
                self._pins.add(key, ttl_s)

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins; see ``Tier.unpin``."""
        for key in keys:
            self._pins.remove(key)

    async def usage(self) -> TierUsage:
        """Return what is held; see ``Tier.usage``."""
        return TierUsage(len(self._blocks), self._num_bytes, self._capacity_bytes, self._evictions)

    async def check_integrity(self) -> None:
        """Compare the accounting with the blocks; see ``Tier.check_integrity``."""
        held = sum(_size(frames) for frames in self._blocks.values())
        assert held == self._num_bytes, f"dram accounts {self._num_bytes} bytes, holds {held}"
        assert held <= self._capacity_bytes, f"dram holds {held} of {self._capacity_bytes} bytes"
        assert all(self._blocks.values()), "dram holds a block without strata"

    async def close(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._num_bytes = 0


def _size(frames: Mapping[int, bytes]) -> int:
    return sum(map(len, frames.values()))
