"""The prefill node: computes the KV of a prompt's full blocks, publishes them, draws a token."""

import contextlib
import logging
from collections.abc import AsyncGenerator

import torch

from kvstrata.engine.seat import ParkedError
from kvstrata.prefill_node.answer import Answer
from kvstrata.prefill_node.flight import Flight
from kvstrata.prefill_node.prefill import (
    carrying_out,
    load_cached,
    num_prompt_blocks,
    provide_blocks,
    unstored,
)
from kvstrata.prefill_node.reading import plan_of
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import Worker, WorkerConfig, WorkerInfo
from kvstrata.protos import call_context, tracing
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.inference_pb2 import GenerateReply
from kvstrata.protos.report import ReportClock

logger = logging.getLogger(__name__)


class PrefillNode:
    """One prefill worker. Ray Serve runs it as a deployment; tests run it directly."""

    def __init__(self, config: WorkerConfig) -> None:
        self._worker = Worker(config)

    async def info(self) -> WorkerInfo:
        """Return what this node serves."""
        return self._worker.info()

    async def prefill(self, task: Task) -> AsyncGenerator[bytes]:
        """Make sure that every full block of the prompt is in the store.

        Blocks on top of a prefix that was read below its stored precision are computed by nobody
        here: they could not be stored, so the decode node computes them for itself. Nor is a token
        chosen then, or under stages, which choose by what the decode node holds.

        Yields:
            Serialised ``GenerateReply``: the first token, unless there is one in
            ``task.generated_ids``, and in the end one with this node's ``CacheReport``. Blocks that
            could not be published are in it as recomputes, not raised.

        Raises:
            DeadlineError: The task's deadline passed.
        """
        call_context.request_id.set(task.request_id)
        clock, answer = ReportClock("prefill"), Answer(self._worker.model, task)
        work = self._prefill(task, clock, answer)
        async with contextlib.aclosing(answer.replies(work)) as replies:
            async for reply in replies:
                yield reply.SerializeToString()
        clock.report.nodes.append(self._worker.use("prefill"))
        logger.info("prefilled", extra={"committed": clock.report.committed_blocks})
        yield GenerateReply(cache=clock.report).SerializeToString()

    async def _prefill(self, task: Task, clock: ReportClock, answer: Answer) -> None:
        order = self._worker.steps.next_order()
        with tracing.current("prefill", "server", task.traceparent, request_id=task.request_id):
            while task.method.reads_all:
                try:
                    await self._provide(task, clock, answer, order)
                    break
                except ParkedError:
                    clock.recompute("parked", 0)

    async def _provide(self, task: Task, clock: ReportClock, answer: Answer, order: int) -> None:
        worker = self._worker
        num_blocks = num_prompt_blocks(len(task.prompt_ids), task.method)
        expected = min(task.expected_blocks, num_blocks)
        plan = plan_of(worker, task, task.prompt_ids, task.stored, must_publish=True)
        cached = plan.num_fetched if plan.num_recomputed else expected

        def choose_first(logits: torch.Tensor) -> None:
            answer.choose(logits)

        async with worker.open(task, task.prompt_ids, cached * BLOCK_TOKENS, order) as sequence:
            async with contextlib.aclosing(Flight(worker, sequence, task, clock)) as flight:
                with carrying_out(plan, clock):
                    await load_cached(worker, sequence, expected, task, clock, plan)
                    sealed = await provide_blocks(
                        worker,
                        sequence,
                        num_blocks,
                        task,
                        clock,
                        flight,
                        plan,
                        None if answer.token_ids else choose_first,
                    )
                if not answer.token_ids and not task.method.pipeline.stages:
                    with clock.stage("tail"):
                        await worker.steps.settle(sequence, sealed)
                        await worker.steps.generate(sequence, choose_first, lambda _: None)
                await flight.publish(unstored(sealed, plan))
            clock.unencodable(sequence.num_unencodable)
            clock.report.layer_bits[:] = sequence.layer_bits
