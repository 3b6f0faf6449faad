"""How a prompt's stored blocks are read: which of them are fetched, how finely, and which computed.

A pure function of rates and sizes. Fetching and computing follow each other: what is computed needs
the blocks before it. So a plan is a number of blocks to fetch, from the first one on, and the
strata of them; its time is a sum. Every plan is tried: there are as many as blocks, times strata.

Precision is never given up for time unless the request allows it, and then no more than its limit
asks for. What was given up for the first token is fetched behind it where it comes early enough to
serve the tokens after that: the blocks begin coarse and are refined while the answer is decoded.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from kvstrata.protos.frame_pb2 import Stratum

Choice = Literal["full", "refine", "fewer_strata", "part", "recompute"]
WORTH_S = 0.1  # what a plan must save to be worth reading less of the store than there is


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block that the store has: bytes of all its strata, and the nearest tier."""

    num_bytes: int
    tier: str


@dataclass(frozen=True, slots=True)
class TierRate:
    """What reading from a tier takes, in seconds: once, and for each byte."""

    latency_s: float
    byte_s: float


@dataclass(frozen=True, slots=True)
class Precision:
    """A way to read blocks.

    Attributes:
        strata: What is fetched of each.
        share: Their bytes, as a share of those of all strata.
        unpack_s: Seconds to bring a block into the cache.
    """

    strata: tuple[Stratum, ...]
    share: float
    unpack_s: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a plan is made from.

    Attributes:
        blocks: The stored ones, from the first on.
        num_blocks: Blocks that are needed; those after ``blocks`` are computed in any case.
        precisions: As finely as allowed first, the coarsest that is allowed last.
        cuts: How many of ``blocks`` may be fetched; all of them is one.
        tiers: What reading takes.
        block_s: Seconds to compute a block.
        seal_s: Seconds to encode one.
        seals_all: Whether computed blocks must be encoded although they are stored: a lossy method
            attends to what a reader gets.
        queue_s: Seconds that computing waits for what was there before.
        limit_s: When the blocks must be there; infinity for no limit.
        worth_s: Seconds that a plan must save against fetching all.
        answer_s: Seconds from the first token to the last; what comes after that refines nothing.
    """

    blocks: tuple[StoredBlock, ...]
    num_blocks: int
    precisions: tuple[Precision, ...]
    cuts: tuple[int, ...]
    tiers: Mapping[str, TierRate] = field(default_factory=dict)
    block_s: float = 0.0
    seal_s: float = 0.0
    seals_all: bool = False
    queue_s: float = 0.0
    limit_s: float = math.inf
    worth_s: float = WORTH_S
    answer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What to do.

    Attributes:
        choice: In a word: "full" fetches all at full precision, "refine" begins with less of them
            and fetches the rest while tokens come, "fewer_strata" stays with less of them, "part"
            fetches the first ones and computes the others, "recompute" fetches none.
        num_fetched: Blocks to fetch.
        num_stored: Blocks that are stored; those not fetched are computed, and not stored again.
        strata: What to fetch of each; empty for all that the method reads.
        predicted_s: How long that takes; 0 where too little was measured to tell.
        refining: What to fetch of each behind the first token.
        refined_s: How long it takes until that is there as well, from the start.
    """

    choice: Choice
    num_fetched: int
    num_stored: int
    strata: tuple[Stratum, ...] = ()
    predicted_s: float = 0.0
    refining: tuple[Stratum, ...] = ()
    refined_s: float = 0.0

    @property
    def num_recomputed(self) -> int:
        """Stored blocks that are computed all the same."""
        return self.num_stored - self.num_fetched


def fetch_all(num_stored: int) -> ReadPlan:
    """Return the plan of a node that has measured nothing yet."""
    return ReadPlan("full", num_stored, num_stored)


def plan_read(reading: Reading) -> ReadPlan:
    """Return the best plan.

    Among those that keep the limit the finest, among these the fastest; where none keeps it, the
    fastest of all. All blocks are fetched at full precision unless another plan saves ``worth_s``
    or that one breaks the limit.
    """
    plans = list(_plans(reading))
    default = next(plan for plan in plans if plan.choice == "full")
    finest = [plan for plan in plans if plan.strata == default.strata or not plan.num_fetched]
    best = min(finest, key=_by_time)
    if default.predicted_s <= reading.limit_s:
        return best if default.predicted_s - best.predicted_s > reading.worth_s else default
    if best.predicted_s <= reading.limit_s:
        return best
    for precision in reading.precisions[1:]:
        coarser = min((p for p in plans if p.strata == precision.strata), key=_by_time)
        if coarser.predicted_s <= reading.limit_s:
            return _refined(reading, coarser)
    return _refined(reading, min(plans, key=_by_time))


def _refined(reading: Reading, plan: ReadPlan) -> ReadPlan:
    """Return a plan that reads less of all blocks with the rest behind it, if that helps."""
    if plan.choice != "fewer_strata":
        return plan
    full = reading.precisions[0]
    coarse = next(p for p in reading.precisions if p.strata == plan.strata)
    rest = Precision(
        tuple(s for s in full.strata if s not in coarse.strata),
        max(0.0, full.share - coarse.share),
        full.unpack_s,
    )
    rest_s = _fetching_s(reading, rest)[plan.num_fetched]
    if rest_s > reading.answer_s:
        return plan
    refined_s = plan.predicted_s + rest_s
    return replace(plan, choice="refine", refining=rest.strata, refined_s=refined_s)


def predicted_s(reading: Reading, precision: Precision, num_fetched: int) -> float:
    """Return how long it takes until all blocks are there."""
    return _fetching_s(reading, precision)[num_fetched] + _computing_s(reading, num_fetched)


def _fetching_s(reading: Reading, precision: Precision) -> list[float]:
    """Return how long it takes to fetch and unpack the first 0, 1, ... blocks."""
    seconds, tier = [0.0], ""
    for block in reading.blocks:
        rate = reading.tiers[block.tier]
        own = precision.unpack_s + rate.byte_s * precision.share * block.num_bytes
        seconds.append(seconds[-1] + own + (rate.latency_s if block.tier != tier else 0.0))
        tier = block.tier
    return seconds


def _computing_s(reading: Reading, num_fetched: int) -> float:
    """Return how long it takes to compute the others, and to encode those that must be."""
    num_computed = reading.num_blocks - num_fetched
    if not num_computed:
        return 0.0
    num_sealed = num_computed if reading.seals_all else reading.num_blocks - len(reading.blocks)
    return reading.queue_s + num_computed * reading.block_s + num_sealed * reading.seal_s


def _plans(reading: Reading) -> Iterator[ReadPlan]:
    """Yield every plan; what fetches nothing is of no precision, and comes once."""
    num_stored = len(reading.blocks)
    for number, precision in enumerate(reading.precisions):
        fetching = _fetching_s(reading, precision)
        for cut in reading.cuts:
            choice: Choice = "fewer_strata"
            if cut < num_stored:
                choice = "part" if cut else "recompute"
            elif not number:
                choice = "full"
            if cut or not number:
                seconds = fetching[cut] + _computing_s(reading, cut)
                yield ReadPlan(choice, cut, num_stored, precision.strata, seconds)


def _by_time(plan: ReadPlan) -> tuple[float, int]:
    return plan.predicted_s, -plan.num_fetched  # at equal times rather fetched than computed
