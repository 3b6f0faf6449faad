"""The decode node: fetches a prompt's blocks, decodes, streams tokens, commits blocks that fill."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any

import torch

from kvstrata.engine.detokenizer import Detokenizer
from kvstrata.engine.sampling import sample
from kvstrata.engine.selecting_sequence import new_sequence
from kvstrata.methods.framing import SealedBlock, precision_name
from kvstrata.prefill_node.flight import Flight
from kvstrata.prefill_node.prefill import load_cached, num_prompt_blocks, provide_blocks
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import Worker, WorkerConfig, WorkerInfo
from kvstrata.protos import call_context, tracing
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.inference_pb2 import FinishReason, GenerateReply
from kvstrata.protos.report import ReportClock

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH
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
        self._sequence = new_sequence(
            worker.model,
            task.method,
            task.prompt_ids + task.generated_ids,
            salt=task.salt,
            num_prompt=len(task.prompt_ids),
        )
        self._generated = list(task.generated_ids)
        self._publishing: set[asyncio.Task[None]] = set()

    async def run(self) -> AsyncGenerator[GenerateReply]:
        """Yield one reply per new token, then the closing one."""
        task, worker = self._task, self._worker
        detokenizer = Detokenizer(worker.model.tokenizer, task.sampling.stop)
        for token_id in task.generated_ids:
            detokenizer.push(token_id)
        finish = self._finished(detokenizer)
        if finish is None:
            logits = await self._prepare()
            start, begin = time.time(), time.perf_counter()
            while finish is None:
                _ = task.remaining_s
                token_id = sample(logits, task.sampling, len(self._generated))
                self._generated.append(token_id)
                text = detokenizer.push(token_id)
                finish = self._finished(detokenizer)
                if finish is not None:
                    text += detokenizer.finish()
                yield GenerateReply(token_ids=[token_id], text=text)
                if finish is None:
                    logits = await self._extend([token_id])
            self._clock.add("decode", start, time.perf_counter() - begin)
        yield await self._close(finish)

    def cancel(self) -> None:
        """Stop publishing; blocks not yet committed are lost, which costs time, never truth."""
        for publishing in self._publishing:
            publishing.cancel()

    async def _prepare(self) -> torch.Tensor:
        """Bring the cache to the end of what is known and return the logits there."""
        sequence, worker, task, clock = self._sequence, self._worker, self._task, self._clock
        known = list(sequence.token_ids)
        prompt_blocks = num_prompt_blocks(len(task.prompt_ids))
        await load_cached(worker, sequence, num_prompt_blocks(len(known)), task, clock)
        flight = Flight(worker, sequence, task, clock)
        async with contextlib.AsyncExitStack() as unless_published:
            unless_published.push_async_callback(flight.aclose)
            sealed = await provide_blocks(worker, sequence, prompt_blocks, task, clock, flight)
            if sealed and sequence.committable:
                unless_published.pop_all()
                self._start_publishing(_publish_and_close(flight, sealed))
        if sealed:
            with clock.stage("decompress"):
                await worker.run(sequence.settle, sealed)
        with clock.stage("tail"):
            return await self._extend(known[sequence.cache.length :])

    async def _extend(self, token_ids: Sequence[int]) -> torch.Tensor:
        logits, sealed = await self._worker.run(self._sequence.extend, token_ids)
        self._publish(sealed)
        return logits

    def _publish(self, sealed: Sequence[SealedBlock]) -> None:
        if sealed and self._sequence.committable:
            self._start_publishing(self._worker.publish(sealed, self._clock))

    def _start_publishing(self, publication: Coroutine[Any, Any, None]) -> None:
        publishing = asyncio.create_task(publication)
        self._publishing.add(publishing)
        publishing.add_done_callback(self._published)

    def _published(self, publishing: asyncio.Task[None]) -> None:
        self._publishing.discard(publishing)
        if not publishing.cancelled() and publishing.exception() is not None:
            logger.error("publishing failed", exc_info=publishing.exception())
            self._clock.recompute("unpublished_defect", 0)

    def _finished(self, detokenizer: Detokenizer) -> FinishReason | None:
        if not self._generated:
            return None
        task, spec = self._task, self._worker.model.spec
        ends = self._generated[-1] in spec.eos_token_ids and not task.sampling.ignore_eos
        if ends or detokenizer.stopped is not None:
            return STOP
        length = len(task.prompt_ids) + len(self._generated)
        if len(self._generated) >= task.sampling.max_tokens or length >= spec.max_positions:
            return LENGTH
        return None

    async def _close(self, finish: FinishReason | None) -> GenerateReply:
        if self._publishing:
            _, late = await asyncio.wait(self._publishing, timeout=PUBLISH_GRACE_S)
            if late:
                self._clock.recompute("unpublished_store_timeout", 0)
        self._clock.unencodable(self._sequence.num_unencodable)
        report, method = self._clock.report, self._task.method
        report.prompt_tokens = len(self._task.prompt_ids)
        report.shareable_tokens = num_prompt_blocks(report.prompt_tokens) * BLOCK_TOKENS
        report.precision = precision_name(method.wanted)
        report.codec = f"{method.codec.name}/{method.codec.version}"
        report.kept_fraction = self._sequence.kept_fraction
        report.layer_bits[:] = self._sequence.layer_bits
        reply = GenerateReply(finish_reason=finish, cache=report)
        reply.usage.prompt_tokens = report.prompt_tokens
        reply.usage.completion_tokens = len(self._generated)
        return reply


async def _publish_and_close(flight: Flight, sealed: Sequence[SealedBlock]) -> None:
    async with contextlib.aclosing(flight):
        await flight.publish(sealed)
