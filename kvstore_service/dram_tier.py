"""The first tier: blocks in this process's memory."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from google.protobuf.message import DecodeError

from kvstrata.kvstore_service.ancestry import Ancestry
from kvstrata.kvstore_service.cold_half import SHED_ORDER, ColdHalf
from kvstrata.kvstore_service.commit_rule import BASE
from kvstrata.kvstore_service.eviction import EvictionPolicy, Exempt
from kvstrata.kvstore_service.eviction_gittins import GittinsPolicy
from kvstrata.kvstore_service.lease_table import LeaseTable
from kvstrata.kvstore_service.pin_table import Clock, PinTable
from kvstrata.kvstore_service.tier import StratumSizes, TierUsage
from kvstrata.protos.errors import CapacityError, CorruptFrameError
from kvstrata.protos.frame import PRELUDE_BYTES, head_size
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import HASH_BYTES, BlockHash, BlockKey


class DramTier:
    """A bounded number of bytes; keeps ``Tier``'s contract.

    Under pressure FINE goes first, then MID, of the colder half of the blocks (``ColdHalf``); then
    whole blocks, as the policy says, children before parents. Pinned and leased blocks are exempt
    from both.
    Bytes that are not a frame with a readable header are a block without a parent, and their strata
    are never shed: nothing says what they mean.

    One event loop owns it; no method awaits, so each is atomic. Frames are kept as they come, one
    allocation each, so there is no arena that could fragment.

    Args:
        capacity_bytes: The bound on the frames' bytes; Python's own overhead and the policy's come
            on top, about 2 KiB a block.
        clock: Monotonic seconds, for pins.
        policy: Decides which blocks go; its own, and new. ``GittinsPolicy`` without it.

    Attributes:
        on_shed: Called with each block that lost a refinement under pressure, and its bytes.
    """

    name = "dram"
    resident = True
    shared = False

    def __init__(
        self,
        capacity_bytes: int,
        clock: Clock | None = None,
        policy: EvictionPolicy[BlockKey] | None = None,
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._policy = GittinsPolicy[BlockKey]() if policy is None else policy
        self._blocks: OrderedDict[BlockKey, dict[int, bytes]] = OrderedDict()
        self._cold = ColdHalf()
        self._num_bytes = 0
        self._evictions = 0
        self._pins = PinTable(clock) if clock else PinTable()
        self._leases = LeaseTable(clock) if clock else LeaseTable()
        self.on_shed: Callable[[BlockKey, int], None] = _ignore

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return the strata that are here; see ``Tier.get``."""
        return self.peek(key, strata)

    def peek(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` returns, without an await."""
        block = self._blocks.get(key)
        if block is None:
            return {}
        self._blocks.move_to_end(key)
        self._policy.touch(key)
        self._cold.read(key)
        return {stratum: block[stratum] for stratum in strata if stratum in block}

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` would, unnoticed; see ``Tier.examine``."""
        block = self._blocks.get(key, {})
        return {stratum: block[stratum] for stratum in strata if stratum in block}

    def holds(self, key: BlockKey, strata: Sequence[int]) -> bool:
        """Return whether all of ``strata`` are here; no use of the block."""
        block = self._blocks.get(key)
        return block is not None and all(stratum in block for stratum in strata)

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """Replace the block; see ``Tier.put``."""
        num_bytes, old_bytes = _size(frames), _size(self._blocks.get(key, {}))
        header = _read_header(frames)
        victims: list[BlockKey] | None = None
        if num_bytes <= self._capacity_bytes:
            self._policy.insert(key, _parent(key, header), num_bytes)
            victims = self._make_room(
                self._num_bytes - old_bytes + num_bytes - self._capacity_bytes,
                lambda other: other == key or self._is_exempt(other),
            )
            if victims is None and key in self._blocks:
                self._policy.resize(key, old_bytes)
            elif victims is None:
                self._policy.remove(key)
        if victims is None:
            raise CapacityError(
                f"tier dram of {self._capacity_bytes} bytes has no room for {num_bytes} bytes",
                "raise the store's --dram, or unpin blocks",
                tier=self.name,
                block_key=key.encode(),
            )
        self._blocks[key] = dict(frames)
        self._blocks.move_to_end(key)
        self._num_bytes += num_bytes - old_bytes
        self._cold.put(key, frames if header is not None and BASE in frames else ())
        return victims

    def _is_exempt(self, key: BlockKey) -> bool:
        return self._pins.holds(key) or self._leases.holds(key)

    def _make_room(self, excess: int, is_exempt: Exempt[BlockKey]) -> list[BlockKey] | None:
        """Shed and evict ``excess`` bytes; return the evicted. None if impossible: none is gone."""
        shed = self._shed(excess, is_exempt)
        victims = self._policy.evict(excess - sum(len(f) for _, _, f in shed), is_exempt)
        if victims is None:
            for key, stratum, frame in shed:
                self._blocks[key][stratum] = frame
                self._resized(key, len(frame))
                self._cold.put(key, self._blocks[key])
            return None
        for key, _, frame in shed:
            self.on_shed(key, len(frame))
        for victim in victims:
            self._drop_block(victim)
        self._evictions += len(victims)
        return victims

    def _shed(self, excess: int, is_exempt: Exempt[BlockKey]) -> list[tuple[BlockKey, int, bytes]]:
        """Take refinements out of cold blocks until ``excess`` bytes are free or none is left."""
        taken: list[tuple[BlockKey, int, bytes]] = []
        spared: list[BlockKey] = []
        for stratum in SHED_ORDER:
            while excess > 0 and (key := next(self._cold.holders(stratum), None)) is not None:
                if is_exempt(key):
                    spared.append(key)
                    self._cold.remove(key)
                    continue
                frame = self._blocks[key].pop(stratum)
                self._cold.shed(key, stratum)
                self._resized(key, -len(frame))
                taken.append((key, stratum, frame))
                excess -= len(frame)
        for key in spared:
            self._cold.put(key, self._blocks[key])
            self._cold.read(key)
        return taken

    def _resized(self, key: BlockKey, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._policy.resize(key, _size(self._blocks[key]))

    def _drop_block(self, key: BlockKey) -> bool:
        frames = self._blocks.pop(key, None)
        if frames is None:
            return False
        self._num_bytes -= _size(frames)
        self._cold.remove(key)
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
        self._leases.forget(keys)
        for key in keys:
            self._pins.remove(key)
            self._policy.remove(key)
        return sum(self._drop_block(key) for key in keys)

    async def drop(self, key: BlockKey, stratum: int) -> None:
        """Forget one stratum; see ``Tier.drop``."""
        frames = self._blocks.get(key)
        if frames is None or stratum not in frames:
            return
        if len(frames) == 1:
            self._policy.remove(key)
            self._drop_block(key)
            return
        self._resized(key, -len(frames.pop(stratum)))
        for lost in SHED_ORDER:
            if stratum in (lost, BASE):
                self._cold.shed(key, lost)

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

    async def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks to the end of the lease; see ``Tier.lease``."""
        here = [key for key in keys if key in self._blocks]
        self._leases.add(here, ttl_s)
        return [] if len(here) == len(keys) else [k for k in keys if k not in self._blocks]

    async def usage(self) -> TierUsage:
        """Return what is held; see ``Tier.usage``."""
        return TierUsage(len(self._blocks), self._num_bytes, self._capacity_bytes, self._evictions)

    async def check_integrity(self) -> None:
        """Compare the accounting with the blocks; see ``Tier.check_integrity``."""
        held = sum(_size(frames) for frames in self._blocks.values())
        assert held == self._num_bytes, f"dram accounts {self._num_bytes} bytes, holds {held}"
        assert held <= self._capacity_bytes, f"dram holds {held} of {self._capacity_bytes} bytes"
        assert all(self._blocks.values()), "dram holds a block without strata"
        assert len(self._policy) == len(self._blocks), "the policy knows other blocks than dram"
        self._policy.check_integrity()

    async def close(self) -> None:
        """Forget everything."""
        for key in self._blocks:
            self._policy.remove(key)
            self._cold.remove(key)
        self._blocks.clear()
        self._num_bytes = 0


def _ignore(key: BlockKey, num_bytes: int) -> None:
    """Nobody listens."""


def _size(frames: Mapping[int, bytes]) -> int:
    return sum(map(len, frames.values()))


def _read_header(frames: Mapping[int, bytes]) -> FrameHeader | None:
    """Return what a frame says about its block; None for other bytes. Verified when they came."""
    frame = next(iter(frames.values()), b"")
    try:
        return FrameHeader.FromString(frame[PRELUDE_BYTES : head_size(frame)])
    except (CorruptFrameError, DecodeError):
        return None


def _parent(key: BlockKey, header: FrameHeader | None) -> BlockKey | None:
    """Return the block before; None for a first block, whose parent is its scope."""
    if header is None or len(header.parent_hash) != HASH_BYTES or header.parent_hash == key.scope:
        return None
    return BlockKey(key.scope, BlockHash(header.parent_hash))
