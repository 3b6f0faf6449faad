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
        another one, before: what is told is still there when it is leased.
        """
        near = self._dram.look(keys)
        if lease_s:  # nothing goes in between
            held = np.flatnonzero(near.strata).tolist()
            all_of_them = keys if len(held) == len(keys) else [keys[i] for i in held]
            await self._dram.lease(all_of_them, lease_s)
        below, degraded = await self._look_below(keys, near, lease_s)
        return _packed(near, below, degraded)

    async def _look_below(
        self, keys: Sequence[BlockKey], near: Held, lease_s: float
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
                held = await _leased(tier, wanted, lease_s)
            except (TierUnavailableError, CapacityError):
                self._counters.add(names.TIER_ERRORS, tier=tier.name)
                held, degraded = [None] * len(wanted), True
            below.append({i: sizes for i, sizes in zip(doubtful, held, strict=True) if sizes})
        return below, degraded


async def _leased(
    tier: Tier, keys: Sequence[BlockKey], lease_s: float
) -> Sequence[StratumSizes | None]:
    """Return what the tier holds of each block, and goes on to hold for ``lease_s``."""
    if not lease_s:
        return await tier.contains(keys)
    gone = set(await tier.lease(keys, lease_s))
    held = await tier.contains(keys)
    late = [key for key, sizes in zip(keys, held, strict=True) if sizes and key in gone]
    if not late:
        return held
    # Blocks of other processes, or whose accounting was lost: the tier knows them now.
    gone = set(await tier.lease(late, lease_s))
    return [None if key in gone else sizes for key, sizes in zip(keys, held, strict=True)]


def _packed(near: Held, below: Sequence[dict[int, StratumSizes]], degraded: bool) -> FoundRun:
    """Return the run: columns of dram, which has most, and sizes of what others hold."""
    strata = bytearray(near.strata.tobytes())
    tiers = bytearray(len(strata))
    num_bytes: list[int] = near.num_bytes.tolist()
    for number, held in enumerate(below, start=1):
        for i, sizes in held.items():
            if not strata[i]:
                tiers[i] = number
            new = strata_mask(sizes) & ~strata[i]
            num_bytes[i] += sum(sizes[stratum] for stratum in strata_of(new))
            strata[i] |= new
    run = next((i for i, mask in enumerate(strata) if not mask & _READABLE), len(strata))
    return FoundRun(bytes(strata[:run]), bytes(tiers[:run]), num_bytes[:run], degraded)
