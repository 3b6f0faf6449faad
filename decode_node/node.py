"""The decode node: fetches a prompt's blocks, decodes, streams tokens, commits blocks that fill."""

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any

import torch

from kvstrata.decode_node.refinement import refining
from kvstrata.engine.seat import ParkedError
from kvstrata.engine.sequence import FrameSet, RunningSequence
from kvstrata.methods.framing import SealedBlock, precision_name
from kvstrata.prefill_node.answer import Answer
from kvstrata.prefill_node.flight import Flight
from kvstrata.prefill_node.prefill import (
    PLANNED,
    PLANNED_AGAIN,
    carrying_out,
    load_cached,
    num_prompt_blocks,
    provide_blocks,
    unstored,
)
from kvstrata.prefill_node.read_plan import ReadPlan, StoredBlock
from kvstrata.prefill_node.reading import plan_of, planned
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import Worker, WorkerConfig, WorkerInfo
from kvstrata.protos import call_context, tracing
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.inference_pb2 import GenerateReply
from kvstrata.protos.report import ReportClock

PUBLISH_GRACE_S = 5.0  # how long the last reply waits for blocks on their way to the store

logger = logging.getLogger(__name__)


class DecodeNode:
    """One decode worker. Ray Serve runs it as a deployment; tests run it directly."""

    def __init__(self, config: WorkerConfig) -> None:
        self._worker = Worker(config)

    async def info(self) -> WorkerInfo:
        """Return what this node serves."""
        return self._worker.info()

    async def generate(self, task: Task) -> AsyncGenerator[bytes]:
        """Stream the continuation as serialised ``GenerateReply``: one per token, then the last.

        The last has finish reason, usage and this node's cache report. Tokens in
        ``task.generated_ids`` are replayed silently. Closing the iterator ends the work.

        Raises:
            DeadlineError: The task's deadline passed.
        """
        call_context.request_id.set(task.request_id)
        with tracing.start(
            "decode", "server", task.traceparent, request_id=task.request_id
        ) as span:
            generation = Generation(self._worker, task, span.traceparent)
            try:
                async with contextlib.aclosing(generation.run()) as replies:
                    async for reply in replies:
                        yield reply.SerializeToString()
            finally:
                generation.cancel()


class Generation:
    """One request's decode phase on this node."""

    def __init__(self, worker: Worker, task: Task, traceparent: str = "") -> None:
        self._worker = worker
        self._task = task
        self._clock = ReportClock("decode", traceparent)
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._order = worker.steps.next_order()
        self._answer = Answer(worker.model, task)
        self._clock.report.kept_fraction = 1.0
        self._clock.report.layer_bits[:] = [0.0] * worker.model.spec.num_layers
        self._publishing: set[asyncio.Task[None]] = set()
        self._stored = list(task.stored)  # of its blocks; sizes of those after are unknown
        self._method = task.method  # as the last plan reads it
        self._was_parked = False

    async def run(self) -> AsyncGenerator[GenerateReply]:
        """Yield one reply per new token, then the closing one."""
        if self._answer.finish is None:
            async with contextlib.aclosing(self._answer.replies(self._work())) as replies:
                async for reply in replies:
                    yield reply
        yield await self._close()

    def cancel(self) -> None:
        """Stop publishing; blocks not yet committed are lost, which costs time, never truth."""
        for publishing in self._publishing:
            publishing.cancel()

    async def _work(self) -> None:
        """Generate to the end, however often the sequence loses its memory on the way."""
        while self._answer.finish is None:
            _ = self._task.remaining_s
            try:
                await self._generate()
            except ParkedError:
                self._was_parked = True
                self._clock.recompute("parked", 0)
                await self._wait_until_published()

    async def _generate(self) -> None:
        """Bring a sequence to the end of what is known, and go on from there."""
        clock, steps, answer = self._clock, self._worker.steps, self._answer
        known = [*self._task.prompt_ids, *answer.token_ids]
        plan = plan_of(self._worker, self._task, known, self._stored)
        task = planned(self._task, plan)
        self._method = task.method
        async with self._worker.open(
            task, known, plan.num_fetched * BLOCK_TOKENS, self._order
        ) as sequence:
            with carrying_out(plan, clock, PLANNED_AGAIN if self._was_parked else PLANNED):
                blocks = await self._prepare(sequence, plan)
            start, begin = time.time(), time.perf_counter()
            first = [0.0]

            def choose(logits: torch.Tensor) -> int | None:
                first[0] = first[0] or time.perf_counter()
                return answer.choose(logits)

            def sealed(blocks: list[SealedBlock]) -> None:
                new = unstored(blocks, plan) if sequence.committable else []
                if new:
                    self._loop.call_soon_threadsafe(self._publish, new, context=self._context)

            try:
                if answer.finish is None:
                    method = self._task.method
                    async with refining(
                        self._worker, sequence, method, plan, blocks, clock
                    ) as refinement:
                        await steps.generate(sequence, choose, sealed)
                    if refinement is not None and refinement.is_complete:
                        self._method = method
            finally:
                tail_s = (first[0] or time.perf_counter()) - begin
                clock.add("tail", start, tail_s)
                clock.add("decode", start + tail_s, time.perf_counter() - begin - tail_s)
                clock.unencodable(sequence.num_unencodable)
                clock.report.layer_executions += sequence.layer_executions
                clock.report.kept_fraction = sequence.kept_fraction
                clock.report.layer_bits[:] = sequence.layer_bits

    async def _prepare(self, sequence: RunningSequence, plan: ReadPlan) -> Sequence[FrameSet]:
        """Load what the store has of the known tokens, and provide the rest of the prompt.

        Returns the blocks that were loaded and are to be refined; of others nothing is kept.
        """
        worker, task, clock = self._worker, self._task, self._clock
        prompt_blocks = num_prompt_blocks(len(task.prompt_ids), task.method)
        num_blocks = num_prompt_blocks(len(sequence.token_ids), task.method)
        loaded = await load_cached(worker, sequence, num_blocks, task, clock, plan)
        if unknown := max(0, plan.num_fetched - len(self._stored)):  # the prefill node made them
            mean = clock.report.bytes_fetched // max(1, plan.num_fetched)
            self._stored += [StoredBlock(mean, clock.report.tier)] * unknown
        flight = Flight(worker, sequence, task, clock)
        async with contextlib.AsyncExitStack() as unless_published:
            unless_published.push_async_callback(flight.aclose)
            sealed = await provide_blocks(
                worker,
                sequence,
                prompt_blocks,
                task,
                clock,
                flight,
                plan,
                None if self._answer.token_ids else self._answer.choose,
            )
            new = unstored(sealed, plan)
            if new and sequence.committable:
                unless_published.pop_all()
                self._note_stored(new)
                self._start_publishing(_publish_and_close(flight, new))
        if sealed and self._answer.finish is None:
            with clock.stage("decompress"):
                await worker.steps.settle(sequence, sealed)
        return loaded if plan.choice == "refine" else []

    def _publish(self, sealed: Sequence[SealedBlock]) -> None:
        self._note_stored(sealed)
        self._start_publishing(self._worker.publish(sealed, self._clock, self._task.retention))

    def _note_stored(self, sealed: Sequence[SealedBlock]) -> None:
        """Expect blocks in the store, should this request have to read them again."""
        for block in sealed:
            if block.identity.first_position == len(self._stored) * BLOCK_TOKENS:
                self._stored.append(StoredBlock(block.num_bytes, "dram"))

    def _start_publishing(self, publication: Coroutine[Any, Any, None]) -> None:
        publishing = asyncio.create_task(publication)
        self._publishing.add(publishing)
        publishing.add_done_callback(self._published)

    def _published(self, publishing: asyncio.Task[None]) -> None:
        self._publishing.discard(publishing)
        if not publishing.cancelled() and publishing.exception() is not None:
            logger.error("publishing failed", exc_info=publishing.exception())
            self._clock.recompute("unpublished_defect", 0)

    async def _wait_until_published(self) -> None:
        if self._publishing:
            _, late = await asyncio.wait(self._publishing, timeout=PUBLISH_GRACE_S)
            if late:
                self._clock.recompute("unpublished_store_timeout", 0)

    async def _close(self) -> GenerateReply:
        await self._wait_until_published()
        report, method = self._clock.report, self._method
        report.prompt_tokens = len(self._task.prompt_ids)
        report.shareable_tokens = num_prompt_blocks(report.prompt_tokens, method) * BLOCK_TOKENS
        report.precision = precision_name(method.wanted)
        report.codec = f"{method.codec.name}/{method.codec.version}"
        report.nodes.append(self._worker.use("decode"))
        reply = GenerateReply(finish_reason=self._answer.finish, cache=report)
        reply.usage.prompt_tokens = report.prompt_tokens
        reply.usage.completion_tokens = len(self._answer.token_ids)
        return reply


async def _publish_and_close(flight: Flight, sealed: Sequence[SealedBlock]) -> None:
    async with contextlib.aclosing(flight):
        await flight.publish(sealed)
