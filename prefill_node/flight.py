"""Making each block once: what this node is about to compute is announced, so that others wait.

A flight is one Write stream to the store. Claiming blocks opens them there; whoever wants them too
is told that they are on their way and attaches to them. The claim ends with the block, or with the
stream, so a node that dies frees its waiters at once. Blocks that another node makes are waited for
while it gets on; when it gives up, or falls silent, this node claims them itself.

Nobody waits in a circle: a node waits only for blocks before those it holds.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import cast

from kvstrata.engine.sequence import RunningSequence
from kvstrata.kvstore_service.client import AttachedBlock, BlockWriter, PutOutcome
from kvstrata.methods.framing import SealedBlock
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import Worker
from kvstrata.protos.errors import KVStrataError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, BlockKey
from kvstrata.protos.report import ReportClock, farthest_tier

CLAIM_S = 2.0  # a store that takes longer to answer a claim is not asked again
PATIENCE_S = 15.0  # how long a node that makes blocks may show no progress
GRACE_S = 30.0  # beyond the task's deadline, to publish what was computed
_PROGRESS_S = 1.0
ANNOUNCED = "announced_"  # how the reasons begin for which such blocks were made after all
_FRAME_OVERHEAD_BYTES = 64 << 10  # header and table; alignment

logger = logging.getLogger(__name__)


class Flight:
    """The blocks of one prompt that one node makes, or waits for.

    A store that cannot be reached makes it void: nothing is claimed then, and nothing waited for.

    Args:
        worker: The node's model and store.
        sequence: The prompt's.
        task: For its deadline, and whether to ask the store at all.
        clock: Gets what was coalesced, and what was waited for in vain.
    """

    def __init__(
        self, worker: Worker, sequence: RunningSequence, task: Task, clock: ReportClock
    ) -> None:
        self._worker = worker
        self._sequence = sequence
        self._task = task
        self._clock = clock
        self._stack = contextlib.AsyncExitStack()
        self._writer: BlockWriter | None = None
        self._is_void = not (task.ask_store and sequence.committable)
        self._claimed: dict[BlockKey, str] = {}
        self._progressed_at = 0.0

    async def claim(self, first: int, last: int) -> int:
        """Announce blocks [first, last); return how many, from the first on, others have or make.

        The rest is this node's to make, all of it: what others make after a gap is made twice.
        """
        if self._is_void:
            return 0
        keys = [self._sequence.identity(index).key for index in range(first, last)]
        unclaimed = [i for i, key in enumerate(keys, first) if not self._is_claimed(key)]
        try:
            async with asyncio.timeout(CLAIM_S):
                outcomes = await self._open(unclaimed)
        except (KVStrataError, TimeoutError) as error:
            self._give_up(error)
            return 0
        self._claimed |= {outcome.key: outcome.outcome for outcome in outcomes}
        theirs = ("pending", "exists")
        return next((i for i, k in enumerate(keys) if self._claimed[k] not in theirs), len(keys))

    async def _open(self, indices: Sequence[int]) -> list[PutOutcome]:
        if self._writer is None:
            writing = self._worker.store.write(timeout_s=self._task.remaining_s + GRACE_S)
            self._writer = await self._stack.enter_async_context(writing)
        sequence = self._sequence
        spec = sequence.model.spec
        most = 3 * spec.kv_bytes_per_token_bf16 * BLOCK_TOKENS + _FRAME_OVERHEAD_BYTES
        drafts = [sequence.draft(index) for index in indices]
        sizes: dict[int, int] = dict.fromkeys(sequence.method.codec.strata, most)
        return await self._writer.open(drafts, sizes)

    async def load(self, first: int, count: int) -> None:
        """Load blocks that others have or make into the cache, as many as come.

        If not all come, a lossy cache is as it was before: blocks computed on top of decoded ones
        would differ a little, and a fault must not change the answer.

        Raises:
            DeadlineError: The task's deadline passed.
        """
        sequence = self._sequence
        ends: list[AttachedBlock | None] = [None] * count
        with self._clock.stage("attach"):
            try:
                async with contextlib.aclosing(
                    self._worker.store.attach(
                        sequence.scope,
                        sequence.hashes[first : first + count],
                        sequence.method.wanted,
                        silence_s=PATIENCE_S,
                        pending_only=True,
                        timeout_s=self._task.remaining_s,
                    )
                ) as found:
                    async for piece in found:
                        await self.progress()  # others may wait for what comes after these
                        if isinstance(piece, AttachedBlock):
                            ends[piece.index] = piece
                reason = ""
            except KVStrataError as error:
                reason = "store_unavailable"
                logger.warning("attach failed", extra={"error": str(error)})
        frames = _run_of(ends, sequence.method.wanted)
        if len(frames) < count:
            end = ends[len(frames)]
            reason = (end and (end.reason or "stratum_absent")) or reason or "absent"
        with self._clock.stage("decompress"):
            loaded = await self._worker.steps.load(sequence, frames)
        self._count(ends[: loaded.num_blocks])
        if loaded.num_blocks == count:
            return
        if not sequence.method.codec.lossless:
            await self._worker.steps.truncate(sequence, first * BLOCK_TOKENS)
        lost = first + count - sequence.num_blocks_held
        self._clock.recompute(ANNOUNCED + (loaded.reason or reason), lost * BLOCK_TOKENS)

    def _count(self, ends: Sequence[AttachedBlock | None]) -> None:
        report = self._clock.report
        tiers = {report.tier}
        for end in ends:
            assert end is not None
            report.bytes_fetched += end.num_bytes
            report.coalesced_tokens += BLOCK_TOKENS
            report.committed_blocks += 1
            tiers.add(end.tier if end.tier != "live" else "dram")
        report.tier = farthest_tier(tiers)

    async def progress(self) -> None:
        """Let those who wait for this node's blocks know that it gets on."""
        now = asyncio.get_running_loop().time()
        if self._writer is None or self._is_void or now - self._progressed_at < _PROGRESS_S:
            return
        self._progressed_at = now
        try:
            await self._writer.progress()
        except KVStrataError as error:
            self._give_up(error)

    async def publish(self, blocks: Sequence[SealedBlock]) -> None:
        """Publish computed blocks. A failure is counted, not raised: recompute is safe."""
        mine = {b.identity.key for b in blocks if self._is_claimed(b.identity.key)}
        left = [block for block in blocks if block.identity.key not in mine]
        if mine and self._writer is not None:
            chosen = [block for block in blocks if block.identity.key in mine]
            left = await self._finish(self._writer, chosen) + left
        await self._worker.publish(left, self._clock, self._task.retention)

    def _is_claimed(self, key: BlockKey) -> bool:
        return not self._is_void and self._claimed.get(key) == "open"

    async def _finish(
        self, writer: BlockWriter, blocks: Sequence[SealedBlock]
    ) -> list[SealedBlock]:
        """Publish claimed blocks; return those to be put again, for which there was no room."""
        with self._clock.stage("ship"):
            try:
                async with asyncio.timeout(self._worker.ship_s(blocks)):
                    outcomes = await writer.finish(
                        {b.identity.key: {int(s): f for s, f in b.frames.items()} for b in blocks}
                    )
            except (KVStrataError, TimeoutError) as error:
                self._give_up(error)
                return list(blocks)
        full = "throttled: in_flight"
        told = [(b, o) for b, o in zip(blocks, outcomes, strict=True) if full not in o.reason]
        self._worker.count_published(told, self._clock)
        return [b for b, o in zip(blocks, outcomes, strict=True) if full in o.reason]

    def _give_up(self, error: BaseException) -> None:
        if not self._is_void:
            logger.warning("blocks are no longer announced", extra={"error": str(error)})
        self._is_void = True

    async def aclose(self) -> None:
        """End what is still announced; whoever waits for it is told. Idempotent."""
        await self._stack.aclose()


def _run_of(
    ends: Sequence[AttachedBlock | None], wanted: Sequence[Stratum]
) -> list[dict[Stratum, Frame]]:
    """Return the frames of the blocks that came whole, from the first on."""
    run: list[dict[Stratum, Frame]] = []
    for end in ends:
        if end is None or not set(wanted) <= end.frames.keys():
            break
        run.append({cast(Stratum, stratum): frame for stratum, frame in end.frames.items()})
    return run
