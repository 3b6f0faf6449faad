"""Blocks that began coarse are made finer while their request decodes.

A plan may begin an answer on the coarse strata of its blocks alone (``prefill_node/read_plan.py``).
The other strata are fetched behind the first token, a few blocks at a time, and each few replace
what is held between two passes: the tokens after that attend to them. A block whose rest is
missing, late or damaged stays coarse, which the request allows, and is counted with its reason.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from kvstrata.engine.seat import ParkedError
from kvstrata.engine.sequence import FrameSet, RunningSequence
from kvstrata.methods.presets import Method
from kvstrata.prefill_node.read_plan import ReadPlan
from kvstrata.prefill_node.worker import STORE_FAILURES, Worker
from kvstrata.protos.report import ReportClock

BLOCKS_AT_ONCE = 8  # bounds how long others' tokens wait, and what is held twice
UNREFINED = "unrefined_"  # how the reasons begin for which blocks stayed coarse

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def refining(
    worker: Worker,
    sequence: RunningSequence,
    method: Method,
    plan: ReadPlan,
    blocks: Sequence[FrameSet],
    clock: ReportClock,
) -> AsyncIterator["Refinement | None"]:
    """Refine held blocks while the body generates, if their plan says so; None if it does not.

    Args:
        worker: The node's.
        sequence: Holds ``blocks``, from its first one on.
        method: As finely as the request reads.
        plan: How they were read.
        blocks: As they came.
        clock: Gets the reasons for which blocks stay coarse; its last read plan is this one.
    """
    if plan.choice != "refine" or not blocks:
        yield None
        return
    refinement = Refinement(worker, sequence, method, plan, blocks, clock)
    running = asyncio.create_task(refinement.run())
    try:
        yield refinement
    except ParkedError:  # it begins anew, which is counted
        refinement.num_seen = len(blocks)
        raise
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        refinement.end()


@dataclass
class Refinement:
    """The blocks of one request; see ``refining``.

    Attributes:
        num_seen: Blocks of which it is known whether they were refined.
        num_refined: Those that were.
    """

    worker: Worker
    sequence: RunningSequence
    method: Method
    plan: ReadPlan
    blocks: Sequence[FrameSet]
    clock: ReportClock
    num_seen: int = 0
    num_refined: int = 0

    def __post_init__(self) -> None:
        """Begin the time that is compared with the plan's."""
        self._read = self.clock.report.read_plans[-1]
        self._begin = time.perf_counter() - self._read.seconds

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are refined."""
        return self.num_refined == len(self.blocks)

    async def run(self) -> None:
        """Refine all blocks, or as many as can be. Never raises for any of them."""
        try:
            while self.num_seen < len(self.blocks):
                await self._refine_some()
        except ParkedError:
            return  # its owner is told, and begins anew
        except Exception:
            logger.exception("refining failed")
            self._give_up("defect")
        if self.is_complete:
            self._read.refined_s = time.perf_counter() - self._begin

    async def _refine_some(self) -> None:
        """Refine the next few blocks, up to one that cannot be refined, which is passed over."""
        sequence, added = self.sequence, self.plan.refining
        first = self.num_seen
        last = min(first + BLOCKS_AT_ONCE, len(self.blocks))
        rest, reason = await self.worker.fetch(
            sequence.scope,
            sequence.hashes[first:last],
            self.method,
            self.clock,
            strata=added,
            stage="refine",
        )
        whole = [{**b, **r} for b, r in zip(self.blocks[first:last], rest, strict=False)]
        if whole:
            loaded = await self.worker.steps.refine(sequence, self.method, first, whole, added)
            self.num_refined += loaded.num_blocks
            self.num_seen += loaded.num_blocks
            reason = loaded.reason or reason
        if self.num_seen == last:
            return
        if reason in (*STORE_FAILURES, "no_room"):
            self._give_up(reason)
        else:
            self.clock.recompute(UNREFINED + (reason or "absent"), 0)
            self.num_seen += 1

    def _give_up(self, reason: str) -> None:
        """Leave all other blocks coarse."""
        self.clock.recompute(UNREFINED + reason, 0)
        self.num_seen = len(self.blocks)

    def end(self) -> None:
        """Say what was refined; what the answer did not wait for is late."""
        self._read.refined_blocks = self.num_refined
        if self.num_seen < len(self.blocks):
            self.clock.recompute(UNREFINED + "late", 0)
