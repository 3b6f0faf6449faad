"""Looking up a prompt: the longest run of blocks that some tier holds, told in packed form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.commit_rule import BASE, EXACT
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.held_frames import Held, strata_mask, strata_of
from kvstrata.kvstore_service.tier import StratumSizes, Tier, TierUnavailableError
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey

_READABLE = strata_mask([BASE, EXACT])


@dataclass(frozen=True, slots=True)
class FoundRun:
    """The blocks that were found, from the first on; as long as the run.

    Attributes:
        strata: A byte a block: ``held_frames.strata_mask`` over all tiers.
        tiers: A byte a block: which tier is the nearest that holds it, as a number from 0.
        num_bytes: Bytes a block, all its strata.
        degraded: A tier did not answer, so the run may be longer.
    """

    strata: bytes
    tiers: bytes
    num_bytes: list[int]
    degraded: bool

    def __len__(self) -> int:
        return len(self.strata)


class RunLookup:
    """Asks the tiers.

    Args:
        dram: The nearest tier.
        lower: Those below, nearest first.
        counters: Where tiers that do not answer are counted.
    """

    def __init__(self, dram: DramTier, lower: Sequence[Tier], counters: Counters) -> None:
        self._dram = dram
        self._lower = lower
        self._counters = counters

    async def find(self, keys: Sequence[BlockKey], lease_s: float = 0.0) -> FoundRun:
        """Return the longest run of blocks that can be read.

        One round trip below: only blocks that dram does not hold whole are asked for. A lease takes
        another one; what went meanwhile is not told.
        """
        near = self._dram.look(keys)
        below, degraded = await self._look_below(keys, near)
        found = _FoundBlocks(near, below)
        if lease_s:
            run = keys[: len(found.packed(degraded))]
            for number, tier in enumerate((self._dram, *self._lower)):
                at = found.held_by(number, len(run))
                wanted = run if len(at) == len(run) else [run[i] for i in at]
                try:
                    gone = set(await tier.lease(wanted, lease_s) if wanted else [])
                except (TierUnavailableError, CapacityError):
                    self._counters.add(names.TIER_ERRORS, tier=tier.name)
                    gone, degraded = set(wanted), True
                if gone:
                    found.lose(number, [i for i in at if run[i] in gone])
            return found.packed(degraded, len(run))
        return found.packed(degraded)

    async def _look_below(
        self, keys: Sequence[BlockKey], near: Held
    ) -> tuple[list[dict[int, StratumSizes]], bool]:
        """Return what each lower tier holds of the blocks that may be there, by index in ``keys``.

        And whether a tier did not answer.
        """
        below: list[dict[int, StratumSizes]] = []
        degraded = False
        doubtful = np.flatnonzero((near.strata == 0) | near.is_partial).tolist()
        wanted = [keys[i] for i in doubtful] if self._lower else []
        for tier in self._lower if wanted else ():
            try:
                held = await tier.contains(wanted)
            except TierUnavailableError:
                self._counters.add(names.TIER_ERRORS, tier=tier.name)
                held, degraded = [None] * len(wanted), True
            below.append({i: sizes for i, sizes in zip(doubtful, held, strict=True) if sizes})
        return below, degraded


class _FoundBlocks:
    """What the tiers hold of each block: columns for dram, which has most, sizes for others."""

    def __init__(self, near: Held, below: list[dict[int, StratumSizes]]) -> None:
        self._near = near
        self._below = below

    def held_by(self, number: int, length: int) -> list[int]:
        """Return which of the first ``length`` blocks the tier of that number holds."""
        if number == 0:
            return np.flatnonzero(self._near.strata[:length]).tolist()
        held = self._below[number - 1] if self._below else {}
        return [i for i in held if i < length]

    def lose(self, number: int, blocks: Sequence[int]) -> None:
        """Know that the tier does not hold these any more."""
        if number == 0:
            self._near.strata[blocks] = 0
            self._near.num_bytes[blocks] = 0
        else:
            for block in blocks:
                del self._below[number - 1][block]

    def packed(self, degraded: bool, length: int | None = None) -> FoundRun:
        """Return the run of the blocks, or of the first ``length``."""
        strata = bytearray(self._near.strata[:length].tobytes())
        tiers = bytearray(len(strata))
        num_bytes: list[int] = self._near.num_bytes[:length].tolist()
        for number, held in enumerate(self._below, start=1):
            for i, sizes in held.items():
                if i >= len(strata):
                    continue
                if not strata[i]:
                    tiers[i] = number
                new = strata_mask(sizes) & ~strata[i]
                num_bytes[i] += sum(sizes[stratum] for stratum in strata_of(new))
                strata[i] |= new
        run = next((i for i, mask in enumerate(strata) if not mask & _READABLE), len(strata))
        return FoundRun(bytes(strata[:run]), bytes(tiers[:run]), num_bytes[:run], degraded)
