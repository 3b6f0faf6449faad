"""Nodes whose KV memory ends: requests are parked, and go on as if they had not been."""

import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from kvstrata.engine import Model
from kvstrata.engine.row_buffer import RowBuffer
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.methods.presets import Method
from kvstrata.methods.skipdecode import SkipDecode
from kvstrata.prefill_node import Task, Worker, WorkerConfig
from tests.prefill_node.nodes import (
    BALANCED,
    EXACT,
    Answer,
    decoded,
    learn,
    prefilled,
    prompt_of,
    reasons_of,
    running,
    task_of,
)

METHODS = {"exact": EXACT, "balanced": BALANCED, "skip": Method(EXACT.codec, skip=SkipDecode(3, 2))}
TASKS = {
    kind: [task_of(prompt_of(70, seed=i), method, max_tokens=100) for i in range(3)]
    for kind, method in METHODS.items()
}
NUM_ROWS = 420  # three fit at first, and not when they have grown


def with_pool(config: WorkerConfig, model: Model, num_rows: int) -> WorkerConfig:
    """Return the config of a node with room for so many uncompressed tokens."""
    return dataclasses.replace(config, pool_bytes=RowBuffer.bytes_for(model.spec, num_rows))


def fresh(task: Task) -> Task:
    return dataclasses.replace(task, deadline_unix_s=task_of([1]).deadline_unix_s)


async def together(
    tasks: list[Task],
    config: WorkerConfig,
    prepare: Callable[[Worker], None] = lambda _: None,
) -> tuple[list[Answer], Worker]:
    """Return the answers of one node to tasks that come at once, and its worker, now closed."""
    async with LocalStore() as store, running(config, store.address) as nodes:
        prepare(nodes.decode._worker)
        answers = await asyncio.gather(*(decoded(nodes.decode, fresh(task)) for task in tasks))
        return list(answers), nodes.decode._worker


async def wanted(config: WorkerConfig, tasks: list[Task]) -> list[list[int]]:
    """Return the tokens of each task alone, on a node with room and without a store."""
    async with running(config) as nodes:
        return [(await decoded(nodes.decode, fresh(task))).tokens for task in tasks]


def assert_parked(worker: Worker, answers: list[Answer]) -> None:
    """Check that parking really happened, was told, and that nothing is left of it."""
    pool = worker.steps.pool
    num_parked = worker.steps.counts.get("parked")
    told = [r for a in answers for r in a.cache.recomputes if r.reason == "parked"]
    assert len(told) == num_parked > 0
    assert pool.arena.used_bytes == 0
    pool.check_integrity()


@pytest.mark.parametrize("kind", METHODS)
async def test_decoding_parks_and_goes_on(config: WorkerConfig, model: Model, kind: str) -> None:
    tasks = TASKS[kind]
    answers, worker = await together(tasks, with_pool(config, model, NUM_ROWS))
    assert [answer.tokens for answer in answers] == await wanted(config, tasks)
    assert_parked(worker, answers)
    reads = [plan.choice for answer in answers for plan in answer.cache.read_plans]
    assert reads
    assert set(reads) == {"full"}  # nothing was measured yet that speaks for anything else


async def test_a_parked_request_is_computed_anew_where_that_is_faster(
    config: WorkerConfig, model: Model
) -> None:
    tasks = TASKS["balanced"]

    def slow_link(worker: Worker) -> None:
        learn(worker, BALANCED, byte_s=1.0, token_s=1e-4)

    answers, worker = await together(tasks, with_pool(config, model, NUM_ROWS), slow_link)
    assert_parked(worker, answers)
    assert [answer.tokens for answer in answers] == await wanted(config, tasks)
    reads = [plan for answer in answers for plan in answer.cache.read_plans]
    assert reads
    assert {plan.choice for plan in reads} == {"recompute"}
    assert all(plan.fetched_blocks == 0 < plan.stored_blocks for plan in reads)
    assert sum(answer.cache.bytes_fetched for answer in answers) == 0
    told = [r for a in answers for r in a.cache.recomputes if r.reason == "planned_again"]
    assert [r.tokens for r in told] == [64 * plan.stored_blocks for plan in reads]


async def test_a_prefill_node_that_parks_publishes_all(config: WorkerConfig, model: Model) -> None:
    task = task_of(prompt_of(300), EXACT)
    async with LocalStore() as store, running(config, store.address) as nodes:
        steps = nodes.prefill._worker.steps
        stepper = steps._stepper

        def park() -> bool:
            for seat in list(stepper._seats.values()):
                stepper._park(seat)
            return stepper.counts.get("parked") > 0

        working = asyncio.create_task(prefilled(nodes.prefill, task))
        async with asyncio.timeout(60):
            while not await steps.call(park):
                await asyncio.sleep(0)
            report = await working
        assert steps.pool.arena.used_bytes == 0
        steps.pool.check_integrity()
        warm = await decoded(nodes.decode, dataclasses.replace(task, expected_blocks=4))
    assert reasons_of(report)["parked"] == 0
    assert report.committed_blocks == 4
    assert warm.cache.bytes_fetched > 0
    assert warm.tokens == (await wanted(config, [task]))[0]
