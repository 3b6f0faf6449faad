"""From token ids to blocks in the cache and in the store: fetch what is there, compute the rest."""

import contextlib
import time
from collections.abc import Iterator, Sequence

from kvstrata.engine.seat import Choose
from kvstrata.engine.sequence import RunningSequence
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.presets import Method
from kvstrata.prefill_node.flight import Flight
from kvstrata.prefill_node.read_plan import ReadPlan
from kvstrata.prefill_node.read_rates import settings_of
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import Worker
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.report import ReportClock

PLANNED = "planned"  # the reason for which stored blocks are computed because that takes less time
PLANNED_AGAIN = "planned_again"  # likewise, of a request that had them before and was parked
MAX_WAITS = 4  # for blocks that others make and give up; after that they are made here as well


def num_prompt_blocks(num_tokens: int, method: Method) -> int:
    """Return how many full blocks of a prompt are prefilled and shared.

    Where they are all of it, the last token is run once more on top of them, for its logits
    (``engine/last_token.py``). Stages choose by the queries of what follows the blocks: under
    them the last token is in none.
    """
    return max(0, num_tokens - bool(method.pipeline.stages)) // BLOCK_TOKENS


@contextlib.contextmanager
def carrying_out(plan: ReadPlan, clock: ReportClock, reason: str = PLANNED) -> Iterator[None]:
    """Record what a plan foresaw, and how long the body took that carries it out."""
    begin = time.perf_counter()
    yield
    if plan.num_recomputed:
        clock.recompute(reason, plan.num_recomputed * BLOCK_TOKENS)
    if plan.num_stored:
        seconds = time.perf_counter() - begin
        read = clock.read(plan.choice, plan.num_stored, plan.num_fetched, plan.predicted_s, seconds)
        read.predicted_refined_s = plan.refined_s


async def load_cached(
    worker: Worker,
    sequence: RunningSequence,
    num_blocks: int,
    task: Task,
    clock: ReportClock,
    plan: ReadPlan,
) -> list[dict[Stratum, Frame]]:
    """Fetch and decode as many of the first ``num_blocks`` blocks as the plan says and there are.

    A block that was expected there and is missing, late or bad is counted with its reason. Under a
    lossy method the whole prefix is then computed anew: blocks computed on top of decoded ones
    would differ a little from those that were lost, and a fault must not change the answer.

    Returns the blocks that the cache holds now, as they came.
    """
    if plan.num_recomputed:
        num_blocks = min(num_blocks, plan.num_fetched)
    if not num_blocks or not task.ask_store:
        return []
    method = sequence.method
    fetched, reason = await worker.fetch(
        sequence.scope, sequence.hashes[:num_blocks], method, clock
    )
    if fetched:
        with clock.stage("decompress"):
            loaded = await worker.steps.load(sequence, fetched)
        if loaded.num_blocks:
            settings = settings_of(method.codec)
            worker.rates.unpacked(settings, method.wanted, loaded.num_blocks, loaded.seconds)
        reason = loaded.reason or reason
    missing = min(task.expected_blocks, num_blocks) - sequence.num_blocks_held
    if missing > 0:
        if not sequence.method.codec.lossless:
            await worker.steps.truncate(sequence, 0)
        lost = min(task.expected_blocks, num_blocks) - sequence.num_blocks_held
        clock.recompute(reason or "absent", lost * BLOCK_TOKENS)
    return fetched[: sequence.num_blocks_held]


async def provide_blocks(
    worker: Worker,
    sequence: RunningSequence,
    num_blocks: int,
    task: Task,
    clock: ReportClock,
    flight: Flight,
    plan: ReadPlan,
    choose: Choose | None = None,
) -> list[SealedBlock]:
    """Bring the cache to ``num_blocks``: load what others make now, compute the rest.

    Where stored blocks are computed all the same, so is all that follows them, in one piece, as if
    nothing had been stored.

    Returns the computed blocks, sealed; a lossless method's that are stored need not be.

    Raises:
        DeadlineError: The task's deadline passed.
    """
    if plan.num_recomputed and sequence.num_blocks_held < min(plan.num_stored, num_blocks):
        if plan.num_stored < num_blocks:
            await flight.claim(plan.num_stored, num_blocks)
        is_whole = sequence.num_blocks_held == plan.num_fetched and sequence.method.codec.lossless
        sealed_from = min(plan.num_stored, num_blocks) if is_whole else 0
        return await compute_blocks(
            worker, sequence, num_blocks, task, clock, flight, choose, sealed_from
        )
    for _ in range(MAX_WAITS):
        first = sequence.num_blocks_held
        theirs = await flight.claim(first, num_blocks) if first < num_blocks else 0
        if not theirs:
            break
        await flight.load(first, theirs)
    return await compute_blocks(worker, sequence, num_blocks, task, clock, flight, choose)


async def compute_blocks(
    worker: Worker,
    sequence: RunningSequence,
    num_blocks: int,
    task: Task,
    clock: ReportClock,
    flight: Flight,
    choose: Choose | None = None,
    sealed_from: int = 0,
) -> list[SealedBlock]:
    """Compute the blocks up to ``num_blocks`` that the cache lacks, and return them sealed.

    Under a lossless method the rest of the prompt is computed with them, and ``choose`` given its
    logits before anything is sealed. Under a lossy one the first token is chosen on top of what
    was sealed, as for a hit: not here.

    Of those before ``sealed_from`` nobody needs the sealed form.

    Raises:
        DeadlineError: The task's deadline passed between two chunks.
    """
    first, rates = sequence.num_blocks_held, worker.rates
    if first >= num_blocks:
        return []
    num_queued, begin = worker.steps.num_queued, time.perf_counter()
    with clock.stage("prefill"):
        is_early = sequence.method.codec.lossless and not sequence.method.pipeline.stages
        early = choose if is_early else None
        async for _ in worker.steps.compute(sequence, num_blocks * BLOCK_TOKENS, early):
            _ = task.remaining_s
            await flight.progress()
    num_tokens = sequence.cache.length - first * BLOCK_TOKENS
    rates.computed(num_queued + num_tokens, time.perf_counter() - begin)
    first = max(first, sealed_from)
    if first >= num_blocks:
        return []
    begin = time.perf_counter()
    with clock.stage("compress"):
        sealed = await worker.steps.seal(sequence, first, num_blocks)
    settings = settings_of(sequence.method.codec)
    rates.sealed(settings, num_blocks - first, time.perf_counter() - begin)
    return sealed


def unstored(sealed: Sequence[SealedBlock], plan: ReadPlan) -> list[SealedBlock]:
    """Return the blocks that are not in the store already, by all that the plan knows."""
    known = range(plan.num_fetched, plan.num_stored)
    return [b for b in sealed if b.identity.first_position // BLOCK_TOKENS not in known]
