"""Blocks over tiers: what is committed, where it is read, what may be served.

The store serves only what it verified: frames are checked before they are committed, and again
whenever they come from a tier that is not this process's memory.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.arrivals import Arrivals
from kvstrata.kvstore_service.commit_rule import (
    BASE,
    EXACT,
    BlockRejectedError,
    check_block,
)
from kvstrata.kvstore_service.commit_waits import CommitWaits
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.deletion import Deletion, DeletionFeed
from kvstrata.kvstore_service.departures import ADMIN, QUOTA, Departures
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.lower_reader import LowerReader, Piece, Read
from kvstrata.kvstore_service.pin_table import Clock, PinTable
from kvstrata.kvstore_service.retention_table import RetentionTable
from kvstrata.kvstore_service.run_lookup import FoundRun, RunLookup
from kvstrata.kvstore_service.tier import StratumSizes, Tier, TierUnavailableError
from kvstrata.kvstore_service.write_behind import WriteBehind
from kvstrata.protos.errors import CapacityError, InvalidRequestError
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.kvstore_pb2 import PutOutcome

Presence = list[tuple[str, StratumSizes]]
"""The tiers that hold a block, nearest first, with the strata each holds."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """What became of one block."""

    outcome: int
    reason: str = ""
    tiers: tuple[str, ...] = ()


def is_present(presence: Presence) -> bool:
    """Return whether the block can be read at all: BASE or EXACT is somewhere."""
    return any(BASE in sizes or EXACT in sizes for _, sizes in presence)


class BlockStore:
    """Composes the dram tier and the tiers below it. One event loop owns it.

    Args:
        dram: The nearest tier.
        lower: Further tiers, nearest first.
        clock: Monotonic seconds, for pins.
        max_behind_bytes: Bound, per tier, on blocks that it gets later.
        counters: Where everything is counted; its own without it.
        deletions: How other processes learn what was deleted here; nobody does without it.

    Attributes:
        retention: Who wishes to keep which blocks.
        on_changed: Called with blocks that were put or deleted.
    """

    def __init__(
        self,
        dram: DramTier,
        lower: Sequence[Tier] = (),
        clock: Clock = time.monotonic,
        max_behind_bytes: int = 256 << 20,
        counters: Counters | None = None,
        deletions: DeletionFeed | None = None,
    ) -> None:
        self.dram = dram
        self.tiers: tuple[Tier, ...] = (dram, *lower)
        self.counters = counters or Counters()
        self.max_behind_bytes = max_behind_bytes
        self.pins = PinTable(clock)
        self.retention = RetentionTable(self.counters, clock)
        self.retention.on_changed, dram.rank_of = dram.rerank, self.retention.rank
        self.arrivals = Arrivals()
        self.waits = CommitWaits(self.arrivals, self._are_present, is_shared=bool(lower))
        self.departures = Departures(self.counters)
        self.on_changed: Callable[[Sequence[BlockKey]], None] = _ignore
        self._runs = RunLookup(dram, lower, self.counters)
        self._lower = LowerReader(dram, tuple(lower), self.counters, self.departures)
        self._behind = {
            tier.name: WriteBehind(tier, self._write_behind, self.counters, max_behind_bytes)
            for tier in lower
        }
        self._deletion = Deletion(self.tiers, self._behind, self.counters, deletions)

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], durability: str = ""
    ) -> PutResult:
        """Commit the block in every tier that takes it; visible all at once in each.

        Committed if one tier took it; the reason then names those that did not. A tier that does
        not answer gets the block when it does again. Idempotent.

        Args:
            key: The block.
            frames: Its strata.
            durability: The last tier to wait for; those below get the block afterwards. The block
                is only "kept" where this tier does not hold it. Without it all tiers are waited
                for, and one of them is enough.

        Raises:
            InvalidRequestError: The store has no such tier.
        """
        now, later = self._split(durability)
        self.retention.expire()
        try:
            check_block(key, frames)
        except BlockRejectedError as error:
            self.counters.add(names.PUTS, outcome="rejected", reason=error.kind)
            self.departures.note([key], "", f"rejected: {error.kind}")
            return PutResult(PutOutcome.PUT_OUTCOME_REJECTED, error.message)
        for tier in now:
            if tier.name in self._behind:
                await self._behind[tier.name].forget([key])
        self.departures.forget([key])
        results = await asyncio.gather(*(self._put_in(tier, key, frames) for tier in now))
        self._lower.forget([key])
        self.on_changed([key])
        held = tuple(t.name for t, problem in zip(now, results, strict=True) if not problem)
        written = [tier for tier, result in zip(now, results, strict=True) if result == ""]
        problems = [problem for problem in results if problem]
        reason = "; ".join(problems)
        if not held:
            self.counters.add(names.PUTS, outcome="rejected", reason="no_tier")
            self.departures.note([key], "", "rejected: no_tier")
            return PutResult(PutOutcome.PUT_OUTCOME_REJECTED, f"no_tier: {reason}")
        for tier in later:
            self._behind[tier.name].submit(key, frames)
        self.arrivals.committed(key)
        outcome = "committed" if written else "exists"
        if durability and durability not in held:
            outcome = "kept"
        code = PutOutcome.Value(f"PUT_OUTCOME_{outcome.upper()}")
        self.counters.add(names.PUTS, outcome=outcome, reason="partial" if problems else "")
        return PutResult(code, reason, held)

    def check_durability(self, durability: str) -> None:
        """Raise ``InvalidRequestError`` if it names a tier that this store does not have."""
        known = [tier.name for tier in self.tiers]
        if durability and durability not in known:
            raise InvalidRequestError(
                f"this store has no tier {durability[:32]!r} to wait for",
                f"use one of {', '.join(known)}",
            )

    def _split(self, durability: str) -> tuple[Sequence[Tier], Sequence[Tier]]:
        """Return the tiers to wait for and those that get a block afterwards."""
        self.check_durability(durability)
        known = [tier.name for tier in self.tiers]
        count = known.index(durability) + 1 if durability else len(known)
        return self.tiers[:count], self.tiers[count:]

    async def _put_in(self, tier: Tier, key: BlockKey, frames: Mapping[int, bytes]) -> str | None:
        """Return "" when written, None when it was there already, else what went wrong."""
        try:
            return "" if await self._write(tier, key, frames) else None
        except TierUnavailableError as error:
            self.counters.add(names.TIER_ERRORS, tier=tier.name)
            if tier.name in self._behind:
                self._behind[tier.name].submit(key, frames)
            return f"{tier.name}: {error.message}"
        except CapacityError as error:
            return f"{tier.name}: {error.message}"

    async def _write(self, tier: Tier, key: BlockKey, frames: Mapping[int, bytes]) -> bool:
        """Put the block there unless it is there; return whether it was written."""
        (sizes,) = await tier.contains([key])
        if sizes is not None and frames.keys() <= sizes.keys():
            return False
        self.evicted(tier, await tier.put(key, frames))
        return True

    async def _write_behind(self, tier: Tier, key: BlockKey, frames: Mapping[int, bytes]) -> None:
        await self._write(tier, key, frames)

    def behind_bytes(self, tier_name: str) -> int:
        """Return the bytes of blocks that the tier is still to get."""
        behind = self._behind.get(tier_name)
        return behind.num_bytes if behind else 0

    def evicted(self, tier: Tier, victims: Sequence[BlockKey]) -> None:
        """Account for blocks that ``tier`` gave up to make room."""
        self._lower.evicted(tier, victims)

    async def locate(self, keys: Sequence[BlockKey]) -> tuple[list[Presence], bool]:
        """Return where each block is, and whether a tier did not answer. Reads only."""
        found: list[Presence] = [[] for _ in keys]
        degraded = False
        for tier in self.tiers:
            try:
                held = await tier.contains(keys)
            except TierUnavailableError:
                self.counters.add(names.TIER_ERRORS, tier=tier.name)
                degraded = True
                continue
            for presence, sizes in zip(found, held, strict=True):
                if sizes:
                    presence.append((tier.name, sizes))
        return found, degraded

    async def lookup(self, keys: Sequence[BlockKey], lease_s: float = 0.0) -> FoundRun:
        """Return the longest run of blocks, leased on demand; see ``RunLookup.find``."""
        self.counters.add(names.LOOKUPS)
        found = await self._runs.find(keys, lease_s)
        self.counters.add(names.LOOKUP_BLOCKS, len(found), result="hit")
        self.counters.add(names.LOOKUP_BLOCKS, len(keys) - len(found), result="miss")
        return found

    def get_resident(self, key: BlockKey, strata: Sequence[int]) -> Read | None:
        """Return what ``get`` would if that takes no wait, since dram has it all; else None."""
        read = self._lower.read_resident(key, strata)
        if read is not None:
            self.counters.add(names.HITS, len(read), tier=self.dram.name)
        return read

    async def get(self, key: BlockKey, strata: Sequence[int], wait_until: float = 0.0) -> Read:
        """Return each wanted stratum or why it is missing, promoting what came from below.

        Args:
            key: The block.
            strata: Wanted strata.
            wait_until: Loop time until which an uncommitted block is waited for.
        """
        read = await self.read(key, strata)
        loop = asyncio.get_running_loop()
        if wait_until > loop.time() and not self._is_readable(read):
            outcome = await self.waits.commit(key, wait_until)
            self.counters.add(names.WAITS, outcome=outcome)
            read = await self.read(key, strata)
            if outcome != "committed":
                read = _with_reason(read, outcome)
        self._count(read)
        return read

    async def get_run(self, keys: Sequence[BlockKey], strata: Sequence[int]) -> list[Read]:
        """Return what ``get`` would of each block, without waiting, all at once."""
        reads = await self._lower.read(keys, strata)
        for read in reads:
            self._count(read)
        return reads

    async def read(self, key: BlockKey, strata: Sequence[int]) -> Read:
        """Return what ``get`` returns, without waiting and without counting hits and misses."""
        return (await self._lower.read([key], strata))[0]

    def _is_readable(self, read: Read) -> bool:
        """Whether waiting is pointless: something was found, or the block is there without it."""
        return any(isinstance(found, Piece) for found in read.values()) or any(
            reason in ("corrupt", "stale_encoding", "undecryptable") for reason in read.values()
        )

    async def _are_present(self, keys: Sequence[BlockKey]) -> list[bool]:
        return [is_present(presence) for presence in (await self.locate(keys))[0]]

    def _count(self, read: Read) -> None:
        for found in read.values():
            if isinstance(found, Piece):
                self.counters.add(names.HITS, tier=found.tier)
            else:
                self.counters.add(names.MISSES, reason=found)

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt committed blocks from eviction for ``ttl_s``; return the others."""
        found, _ = await self.locate(keys)
        here = [key for key, presence in zip(keys, found, strict=True) if is_present(presence)]
        pinned: set[BlockKey] = set()

        async def pin(tier: Tier) -> None:
            pinned.update(set(here).difference(await tier.pin(here, ttl_s)))

        await self._in_all_tiers(pin(tier) for tier in self.tiers)
        for key, presence in zip(keys, found, strict=True):
            if key in pinned:  # in no tier: it went meanwhile, or is about to
                self.pins.add(key, ttl_s, max(sum(sizes.values()) for _, sizes in presence))
        return [key for key in keys if key not in pinned]

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins early. Idempotent."""
        for key in keys:
            self.pins.remove(key)
        await self._in_all_tiers(tier.unpin(keys) for tier in self.tiers)

    async def _in_all_tiers(self, calls: Iterable[Awaitable[None]]) -> None:
        """Await one call a tier; a tier that is down loses it."""
        for tier, call in zip(self.tiers, calls, strict=True):
            try:
                await call
            except (TierUnavailableError, CapacityError):
                self.counters.add(names.TIER_ERRORS, tier=tier.name)

    async def delete(
        self, keys: Sequence[BlockKey], tier_name: str = "", reason: str = "deleted"
    ) -> int:
        """Forget blocks in the named tier, or in all; return how many were anywhere.

        Dram comes last: a read in between would find the blocks below, and promote them again.

        Args:
            keys: The blocks.
            tier_name: The tier; all without it.
            reason: Why, for whoever asks later; see ``Departures``.
        """
        tiers = [tier for tier in self.tiers if tier_name in ("", tier.name)]
        found, _ = await self.locate(keys)
        wanted = {tier.name for tier in tiers}
        gone = [
            key
            for key, presence in zip(keys, found, strict=True)
            if any(name in wanted for name, _ in presence)
        ]
        if not tier_name:
            for key in keys:
                self.pins.remove(key)
        try:
            for tier in tiers:
                if tier is not self.dram:
                    await self._deletion.delete(tier, keys)
        finally:  # and nothing waits from here until dram has forgotten
            self._lower.forget(keys)
            if self.dram in tiers:
                await self._deletion.delete(self.dram, keys)
            self.on_changed(keys)
        if not tier_name and reason != QUOTA:
            await self._deletion.tell(keys)
        if reason in (ADMIN, QUOTA):
            self.departures.evicted(gone, tier_name, reason)
        else:
            self.departures.note(gone, tier_name, reason)
        return len(gone)

    async def forget_deleted(self, keys: Sequence[BlockKey]) -> None:
        """Forget what this process's memory holds of blocks that another one deleted."""
        for key in keys:
            self.pins.remove(key)
        self._lower.forget(keys)
        self.on_changed(keys)
        await self._deletion.follow(keys)
        self.departures.note(keys, "", "deleted")

    async def flush(self, timeout_s: float) -> bool:
        """Wait until every tier has got what it is to get; False when the time was over first."""
        behind = self._behind.values()
        return all(await asyncio.gather(*(queue.flush(timeout_s) for queue in behind)))

    async def close(self) -> None:
        """Close every tier. Idempotent."""
        await self._deletion.close()
        await asyncio.gather(*(queue.close() for queue in self._behind.values()))
        await self.waits.close()
        await self._lower.close()
        for tier in self.tiers:
            await tier.close()


def _ignore(keys: Sequence[BlockKey]) -> None:
    """Nobody listens."""


def _with_reason(read: Read, outcome: str) -> Read:
    return {
        stratum: outcome if found in ("absent", "evicted") else found
        for stratum, found in read.items()
    }
