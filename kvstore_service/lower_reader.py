"""Reading a block from the nearest tier that has it: verified, promoted, once at a time."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.ancestry import ancestry_by
from kvstrata.kvstore_service.commit_rule import (
    ALL_STRATA,
    BASE,
    EXACT,
    FINE,
    MID,
    UNDECRYPTABLE,
    BlockRejectedError,
    open_verified,
)
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.departures import CAPACITY, Departures
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.tier import Tier, TierUnavailableError
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.frame import open_head
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockKey


@dataclass(frozen=True, slots=True)
class Piece:
    """A verified frame.

    Attributes:
        frame: Its bytes.
        tier: The tier it came from.
        header: Its header, where that was read to verify it; not from dram.
    """

    frame: bytes
    tier: str
    header: FrameHeader | None = field(default=None, compare=False, repr=False)

    @property
    def encoding(self) -> bytes:
        """Which writing of the block it is of."""
        return (self.header or open_head(self.frame)[0]).encoding_id


Found = Piece | str
"""A frame, or the reason why there is none."""

Read = dict[int, Found]


class LowerReader:
    """Reads through dram to the tiers below. One event loop owns it.

    Concurrent reads of one stratum cause one read below; its outcome serves all of them, and a
    reader that gives up does not end it for the others.
    """

    def __init__(
        self,
        dram: DramTier,
        lower: tuple[Tier, ...],
        counters: Counters,
        departures: Departures,
    ) -> None:
        self._dram = dram
        self._lower = lower
        self._counters = counters
        self._departures = departures
        self._flights: dict[tuple[BlockKey, int], asyncio.Task[dict[BlockKey, Read]]] = {}
        dram.on_shed = self._shed

    def _shed(self, key: BlockKey, num_bytes: int) -> None:
        self._counters.add(names.SHED_BYTES, num_bytes, tier=self._dram.name)

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """Let no read that is under way promote what it finds: the blocks have changed."""
        for key in keys:
            self._dram.set_partial(key, False)
            for stratum in ALL_STRATA:
                self._flights.pop((key, stratum), None)

    def evicted(self, tier: Tier, victims: Sequence[BlockKey]) -> None:
        """Remember blocks that ``tier`` gave up to make room, so that their misses can say so."""
        self._departures.evicted(victims, tier.name, CAPACITY)

    def read_resident(self, key: BlockKey, strata: Sequence[int]) -> Read | None:
        """Return what ``read`` would if dram has it all and it is of one writing; else None."""
        if BASE not in strata and EXACT not in strata:
            return None
        held = self._dram.peek_all(key, strata)
        if held is None:
            return None
        tier = self._dram.name
        return {s: Piece(frame, tier) for s, frame in held.items()}

    async def read(self, keys: Sequence[BlockKey], strata: Sequence[int]) -> list[Read]:
        """Return of each block the wanted strata of one writing, or why one is missing."""
        reads: dict[BlockKey, Read] = {}
        below: dict[BlockKey, Sequence[int]] = {}
        for key in keys:
            held = self._dram.peek(key, strata)
            reads[key] = {s: Piece(frame, self._dram.name) for s, frame in held.items()}
            missing = [s for s in strata if s not in held]
            if missing and self._lower:
                below[key] = self._with_base(key, missing, held)
        if below:
            for key, found in (await self._read_below(below)).items():
                reads[key] |= found
        return [await self._complete(key, strata, reads[key]) for key in keys]

    async def _complete(self, key: BlockKey, strata: Sequence[int], found: Read) -> Read:
        """Return what was found of one writing, and why the rest is missing."""
        reason = "evicted" if self._departures.was_evicted(key) else "absent"
        read = {s: found.get(s, reason) for s in strata}
        self._refuse_stale(key, read, found.get(BASE))
        if BASE in strata and "stale_encoding" in read.values():
            return await self._read_one_writing(key, strata) or read
        return read

    async def _read_one_writing(self, key: BlockKey, strata: Sequence[int]) -> Read:
        """Return the strata from the first tier below that has them all, of one writing; else {}.

        Nearer tiers may hold part of another writing, which hides it: two workers put the block,
        their bytes differ, and each tier kept the one that it got first. Dram takes over what is
        found.
        """
        for tier in self._lower:
            read = (await self._fetch_from(tier, {key: strata}))[key]
            pieces = {s: piece for s, piece in read.items() if isinstance(piece, Piece)}
            if len(pieces) == len(strata) and len({p.encoding for p in pieces.values()}) == 1:
                if self._dram.peek(key, [BASE]):  # not deleted meanwhile
                    frames = {s: piece.frame for s, piece in pieces.items()}
                    with contextlib.suppress(CapacityError):
                        self.evicted(self._dram, await self._dram.put(key, frames))
                        self._dram.set_partial(key, True)
                return read
        return {}

    def _with_base(self, key: BlockKey, missing: list[int], held: dict[int, bytes]) -> list[int]:
        """Add BASE where it is needed to tell which writing the others must come from."""
        refines = MID in missing or FINE in missing
        if (
            refines
            and BASE not in missing
            and BASE not in held
            and not self._dram.peek(key, [BASE])
        ):
            return [BASE, *missing]
        return missing

    def _refuse_stale(self, key: BlockKey, read: Read, base: Found | None) -> None:
        """Turn refinements of another writing than BASE's into misses."""
        refinements = [s for s in (MID, FINE) if isinstance(read.get(s), Piece)]
        if not refinements or self._are_of_one_writing(read):
            return
        if base is None:
            resident = self._dram.peek(key, [BASE]).get(BASE)
            base = Piece(resident, self._dram.name) if resident else None
        wanted = base.encoding if isinstance(base, Piece) else None
        for stratum in refinements:
            piece = read[stratum]
            if isinstance(piece, Piece) and piece.encoding != wanted:
                read[stratum] = "stale_encoding" if wanted else "absent"

    def _are_of_one_writing(self, read: Read) -> bool:
        """Whether BASE and all else is from dram, which never holds two writings of a block."""
        return BASE in read and all(
            isinstance(found, Piece) and found.tier == self._dram.name for found in read.values()
        )

    async def _read_below(self, wanted: Mapping[BlockKey, Sequence[int]]) -> dict[BlockKey, Read]:
        new: dict[BlockKey, Sequence[int]] = {}
        for key, strata in wanted.items():
            mine = [s for s in strata if (key, s) not in self._flights]
            if len(mine) < len(strata):
                self._counters.add(names.SHARED_READS, len(strata) - len(mine))
            if mine:
                new[key] = mine
        if new:
            task = asyncio.create_task(self._fetch(new))
            for key, strata in new.items():
                for stratum in strata:
                    self._flights[key, stratum] = task
        flights = {
            (key, s): self._flights[key, s] for key, strata in wanted.items() for s in strata
        }
        landed = {flight: await asyncio.shield(flight) for flight in set(flights.values())}
        reads: dict[BlockKey, Read] = {key: {} for key in wanted}
        for (key, stratum), flight in flights.items():
            found = landed[flight][key].get(stratum)
            if found is not None:
                reads[key][stratum] = found
        return reads

    async def _fetch(self, wanted: Mapping[BlockKey, Sequence[int]]) -> dict[BlockKey, Read]:
        """Read from the tiers below in order; the outcome of one flight."""
        reads: dict[BlockKey, Read] = {key: {} for key in wanted}
        flight = asyncio.current_task()
        try:
            missing = dict(wanted)
            for tier in self._lower:
                for key, read in (await self._fetch_from(tier, missing)).items():
                    reads[key] |= read
                missing = {
                    key: left for key in missing if (left := _misses(reads[key], missing[key]))
                }
                if not missing:
                    break
            for key, strata in wanted.items():
                if all(self._flights.get((key, s)) is flight for s in strata):
                    await self._promote(key, reads[key])
            return reads
        finally:
            for key, strata in wanted.items():
                for stratum in strata:
                    if self._flights.get((key, stratum)) is flight:
                        del self._flights[key, stratum]

    async def _fetch_from(
        self, tier: Tier, wanted: Mapping[BlockKey, Sequence[int]]
    ) -> dict[BlockKey, Read]:
        """Return what one tier has, and reasons for what is there but cannot be used."""
        try:
            values = await tier.get_all(list(wanted.items()))
        except (TierUnavailableError, CapacityError):
            self._counters.add(names.TIER_ERRORS, tier=tier.name)
            return {
                key: dict.fromkeys(strata, "tier_unavailable") for key, strata in wanted.items()
            }
        pairs = zip(wanted, values, strict=True)
        return {key: await self._verified(tier, key, frames) for key, frames in pairs}

    async def _verified(self, tier: Tier, key: BlockKey, frames: Mapping[int, bytes]) -> Read:
        """Return the frames that are what they should be; damaged ones are deleted."""
        read: Read = {}
        for stratum, frame in frames.items():
            try:
                read[stratum] = Piece(frame, tier.name, open_verified(key, stratum, frame))
            except BlockRejectedError as error:
                if error.kind == UNDECRYPTABLE:
                    read[stratum] = UNDECRYPTABLE
                    continue
                read[stratum] = "corrupt"
                self._counters.add(names.CORRUPT, tier=tier.name)
                self._departures.note([key], tier.name, "corrupt")
                with contextlib.suppress(CapacityError, TierUnavailableError):
                    await tier.drop(key, stratum)  # of a read-only bucket: it stays
        return read

    async def _promote(self, key: BlockKey, read: Read) -> None:
        """Put what was found into dram, with what dram holds of the same writing."""
        pieces = {s: piece for s, piece in read.items() if isinstance(piece, Piece)}
        if not pieces:
            return
        first = next(iter(pieces.values()))
        frames = {s: p.frame for s, p in pieces.items() if p.encoding == first.encoding}
        held = self._dram.peek(key, ALL_STRATA)
        if held and _encoding_id(next(iter(held.values()))) != first.encoding:
            return
        standing = ancestry_by(key, first.header) if first.header else None
        try:
            victims = await self._dram.put(key, {**held, **frames}, standing)
        except CapacityError:
            return
        self._dram.set_partial(key, True)
        self.evicted(self._dram, victims)

    async def close(self) -> None:
        """Wait for reads that are under way."""
        await asyncio.gather(*set(self._flights.values()), return_exceptions=True)


def _misses(read: Read, strata: Sequence[int]) -> list[int]:
    return [s for s in strata if not isinstance(read.get(s), Piece)]


def _encoding_id(frame: bytes) -> bytes:
    return open_head(frame)[0].encoding_id
