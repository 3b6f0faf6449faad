"""From token ids to blocks in the cache and in the store: fetch what is there, compute the rest."""

from kvstrata.engine.sequence import RunningSequence
from kvstrata.methods.framing import SealedBlock
from kvstrata.prefill_node.flight import Flight
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import Worker
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.report import ReportClock

MAX_WAITS = 4  # for blocks that others make and give up; after that they are made here as well


def num_prompt_blocks(num_tokens: int) -> int:
    """Return how many full blocks of a prompt are prefilled and shared.

    The last token is never among them: its logits are needed, so it is run by the decode node.
    """
    return max(0, num_tokens - 1) // BLOCK_TOKENS


async def load_cached(
    worker: Worker, sequence: RunningSequence, num_blocks: int, task: Task, clock: ReportClock
) -> None:
    """Fetch and decode as many of the first ``num_blocks`` blocks as the store serves.

    A block that was expected there and is missing, late or bad is counted with its reason. Under a
    lossy method the whole prefix is then computed anew: blocks computed on top of decoded ones
    would differ a little from those that were lost, and a fault must not change the answer.
    """
    if not num_blocks or not task.ask_store:
        return
    fetched, reason = await worker.fetch(
        sequence.scope, sequence.hashes[:num_blocks], sequence.method.wanted, clock
    )
    if fetched:
        with clock.stage("decompress"):
            loaded = await worker.steps.load(sequence, fetched)
        reason = loaded.reason or reason
    missing = min(task.expected_blocks, num_blocks) - sequence.num_blocks_held
    if missing > 0:
        if not sequence.method.codec.lossless:
            await worker.steps.truncate(sequence, 0)
        lost = min(task.expected_blocks, num_blocks) - sequence.num_blocks_held
        clock.recompute(reason or "absent", lost * BLOCK_TOKENS)


async def provide_blocks(
    worker: Worker,
    sequence: RunningSequence,
    num_blocks: int,
    task: Task,
    clock: ReportClock,
    flight: Flight,
) -> list[SealedBlock]:
    """Bring the cache to ``num_blocks``: load what others make now, compute the rest.

    Returns the computed blocks, sealed.

    Raises:
        DeadlineError: The task's deadline passed.
    """
    for _ in range(MAX_WAITS):
        first = sequence.num_blocks_held
        theirs = await flight.claim(first, num_blocks) if first < num_blocks else 0
        if not theirs:
            break
        await flight.load(first, theirs)
    return await compute_blocks(worker, sequence, num_blocks, task, clock, flight)


async def compute_blocks(
    worker: Worker,
    sequence: RunningSequence,
    num_blocks: int,
    task: Task,
    clock: ReportClock,
    flight: Flight,
) -> list[SealedBlock]:
    """Compute the blocks up to ``num_blocks`` that the cache lacks, and return them sealed.

    Raises:
        DeadlineError: The task's deadline passed between two chunks.
    """
    first = sequence.num_blocks_held
    if first >= num_blocks:
        return []
    with clock.stage("prefill"):
        async for _ in worker.steps.compute(sequence, num_blocks * BLOCK_TOKENS):
            _ = task.remaining_s
            await flight.progress()
    with clock.stage("compress"):
        return await worker.steps.seal(sequence, first, num_blocks)
