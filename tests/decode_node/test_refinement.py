"""Answers that begin on coarse blocks and are refined: sooner than in full, and never wrong."""

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from kvstrata.decode_node import node as decode
from kvstrata.decode_node.node import Generation
from kvstrata.decode_node.refinement import refining
from kvstrata.engine import Model
from kvstrata.engine.sequence import Loaded
from kvstrata.engine.step_times import StepTimes
from kvstrata.kvstore_service.redis_tier import value_key
from kvstrata.kvstore_service.testing import LocalStore, RedisServer
from kvstrata.prefill_node import Task, Worker, WorkerConfig
from kvstrata.prefill_node.read_plan import StoredBlock, fetch_all
from kvstrata.prefill_node.read_rates import MIN_SEEN, settings_of
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, BlockKey
from tests.decode_node.test_decode_node import evict
from tests.prefill_node.nodes import (
    BALANCED,
    Answer,
    Nodes,
    answer_of,
    decoded,
    learn,
    names_of,
    prefilled,
    prompt_of,
    running,
    task_of,
)
from tests.prefill_node.test_reading import BASE, large, node_of, port_of, prompt

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from soak_proxy import Proxy

__all__ = ["large"]
PROMPT = prompt_of(200)  # three blocks and a rest
BLOCK_BYTES = 10_000
FULL_S, LIMIT_S = 60.0, 50.0  # BASE alone takes half of the time, and the rest of the prompt 8
PASS_S = 0.01


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def slowly(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that take a while, and are taken to last a second: time for what comes behind."""
    forward = model.forward_batch

    def wait(*args: Any) -> Any:
        time.sleep(PASS_S)
        return forward(*args)

    monkeypatch.setattr(model, "forward_batch", wait)
    monkeypatch.setattr(StepTimes, "pass_s", lambda *_: 1.0)


def hasty(max_tokens: int = 100) -> Task:
    """A request that wants its first token sooner than all strata are there."""
    task = task_of(PROMPT, expected_blocks=3, timeout_s=600.0, max_tokens=max_tokens)
    return replace(
        task,
        coarsest=BASE,
        stored=(StoredBlock(BLOCK_BYTES, "dram"),) * 3,
        first_token_unix_s=time.time() + LIMIT_S,
    )


@contextlib.asynccontextmanager
async def stored(
    config: WorkerConfig, proxy: Proxy, redis_url: str = ""
) -> AsyncIterator[tuple[Nodes, LocalStore, Answer]]:
    """Nodes with a prompt in the store, and an answer that read all of it at once.

    They have seen a link on which that takes a minute.
    """
    async with LocalStore(redis_url=redis_url) as store:
        proxy.target_port = port_of(store.address)
        async with running(config, proxy.address) as nodes:
            await prefilled(nodes.prefill, task_of(PROMPT))
            fine = await decoded(nodes.decode, task_of(PROMPT, expected_blocks=3, max_tokens=2))
            worker = nodes.decode._worker
            learn(worker, BALANCED, byte_s=FULL_S / (3 * BLOCK_BYTES), token_s=1.0)
            yield nodes, store, fine


def before_refining(worker: Worker, act: Callable[[], Awaitable[object]]) -> None:
    """Have something happen right before the first stratum is fetched behind the answer."""
    fetch, pending = worker.fetch, [act]

    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("stage") == "refine" and pending:
            await pending.pop()()
        return await fetch(*args, **kwargs)

    worker.fetch = wrapped  # type: ignore[method-assign]


def told(answer: Answer) -> tuple[str, int, str]:
    (plan,) = answer.cache.read_plans
    return plan.choice, plan.refined_blocks, answer.cache.precision


@pytest.mark.usefixtures("slowly")
async def test_an_answer_begins_coarse_and_goes_on_at_full_precision(config: WorkerConfig) -> None:
    async with Proxy() as proxy, stored(config, proxy) as (nodes, store, fine):
        puts = store.running.store.counters.get("puts_total")
        answer = await decoded(nodes.decode, hasty())
        assert told(answer) == ("refine", 3, "base+mid")
        assert answer.reasons == {}
        assert len(answer.tokens) == 100
        (plan,) = answer.cache.read_plans
        assert 0 < plan.predicted_s <= LIMIT_S < plan.predicted_refined_s
        assert plan.refined_s > plan.seconds > 0
        assert answer.cache.bytes_fetched == fine.cache.bytes_fetched
        assert store.running.store.counters.get("puts_total") == puts  # nothing of it is stored
        stages = [stage.stage for stage in answer.cache.stages]
        assert stages.index("decompress") < stages.index("refine")


@pytest.mark.usefixtures("slowly")
async def test_what_comes_too_late_leaves_blocks_coarse(config: WorkerConfig) -> None:
    async with Proxy() as proxy, stored(config, proxy) as (nodes, *_):

        async def hold() -> None:
            proxy.hold()

        before_refining(nodes.decode._worker, hold)
        answer = await decoded(nodes.decode, hasty(max_tokens=70))
        proxy.heal()
        assert told(answer) == ("refine", 0, "base")
        assert answer.reasons == {"unrefined_late": 0}
        assert len(answer.tokens) == 70


@pytest.mark.usefixtures("slowly")
@pytest.mark.parametrize("reason", ["store_timeout", "store_unavailable"])
async def test_a_store_that_fails_behind_the_first_token_is_not_waited_for(
    config: WorkerConfig, reason: str
) -> None:
    config = replace(config, store_timeout_s=0.3)
    async with Proxy() as proxy, stored(config, proxy) as (nodes, *_):

        async def fail() -> None:
            proxy.hold() if reason == "store_timeout" else proxy.refuse()

        before_refining(nodes.decode._worker, fail)
        answer = await decoded(nodes.decode, hasty(max_tokens=200))
        proxy.heal()
        assert told(answer) == ("refine", 0, "base")
        assert answer.reasons == {f"unrefined_{reason}": 0}
        assert len(answer.tokens) == 200


@pytest.mark.usefixtures("slowly")
async def test_a_damaged_stratum_leaves_its_block_coarse(
    config: WorkerConfig, model: Model, redis_server: RedisServer
) -> None:
    scope, hashes = names_of(model, PROMPT)
    name = value_key(BlockKey(scope, hashes[1]), Stratum.STRATUM_MID)
    async with Proxy() as proxy, stored(config, proxy, redis_server.url) as (nodes, store, _):
        await evict(store.address, "dram")
        with redis.Redis(port=redis_server.port) as connection:
            last = connection.strlen(name) - 1
            byte = connection.getrange(name, last, last)
            connection.setrange(name, last, bytes([byte[0] ^ 1]))
        answer = await decoded(nodes.decode, hasty())
        assert told(answer) == ("refine", 2, "base")
        assert answer.reasons == {"unrefined_corrupt": 0}
        assert len(answer.tokens) == 100


@pytest.mark.usefixtures("slowly")
async def test_a_request_that_is_parked_meanwhile_plans_anew(config: WorkerConfig) -> None:
    async with Proxy() as proxy, stored(config, proxy) as (nodes, *_):
        worker = nodes.decode._worker
        stepper = worker.steps._stepper

        async def park() -> None:
            await worker.steps.call(lambda: stepper._park(next(iter(stepper._seats.values()))))

        before_refining(worker, park)
        answer = await decoded(nodes.decode, hasty())
        assert answer.reasons == {"parked": 0}
        first, second = answer.cache.read_plans
        assert (first.choice, first.refined_blocks) == ("refine", 0)
        assert second.choice == "full"  # the link was faster than it had seemed
        assert answer.cache.precision == "base+mid"
        assert len(answer.tokens) == 100


async def test_over_a_slow_link_the_first_token_is_as_early_as_coarse_and_the_rest_follows(
    large: Path,
) -> None:
    num_blocks = 4
    async with (
        LocalStore() as store,
        Proxy(port_of(store.address)) as link,
        node_of(large, link.address, store.address) as node,
    ):
        task = await node.publish(task_of(prompt(num_blocks, 0), BALANCED, max_tokens=150))
        small = [await node.publish(task_of(prompt(2, 1 + i), BALANCED)) for i in range(MIN_SEEN)]
        link.byte_s = 0.8 * node.block_s() / task.stored[0].num_bytes
        for learnt in small:
            await node.read(learnt, fetch_all(2))
        worker = node.worker

        async def answered(asked: Task) -> tuple[float, Answer]:
            begin, replies, first = time.perf_counter(), [], 0.0
            async for reply in Generation(worker, asked).run():
                first = first or time.perf_counter() - begin
                replies.append(reply)
            return first, answer_of(replies)

        patient_s, patient = await answered(task)
        assert patient.cache.read_plans[0].choice == "full"
        share = worker.rates.precision(settings_of(BALANCED.codec), (BASE,), BALANCED.wanted)
        assert share is not None
        full_s = node.plan(task).predicted_s
        limit_s = full_s * (1 + share.share) / 2 + 5 * node.block_s() / BLOCK_TOKENS
        hurried_s, hurried = await answered(
            replace(task, coarsest=BASE, first_token_unix_s=time.time() + limit_s)
        )
        plan = hurried.cache.read_plans[0]
        assert (plan.choice, plan.refined_blocks) == ("refine", num_blocks), plan
        assert hurried.cache.precision == patient.cache.precision
        assert hurried_s < patient_s
        assert plan.refined_s > hurried_s


async def test_frames_of_blocks_that_are_not_refined_are_not_kept(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    def seen(*args: Any) -> Any:
        kept.append(len(args[4]))
        return refining(*args)

    monkeypatch.setattr(decode, "refining", seen)
    async with Proxy() as proxy, stored(config, proxy) as (_, _, fine):
        assert fine.cache.bytes_fetched > 0
    assert kept == [0]


@pytest.mark.usefixtures("slowly")
async def test_without_room_nothing_more_is_fetched(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> Loaded:
        return Loaded(0, "no_room")

    async with Proxy() as proxy, stored(config, proxy) as (nodes, *_):
        monkeypatch.setattr(nodes.decode._worker.steps, "refine", refuse)
        answer = await decoded(nodes.decode, hasty())
        assert told(answer) == ("refine", 0, "base")
        assert answer.reasons == {"unrefined_no_room": 0}
        assert [stage.stage for stage in answer.cache.stages].count("refine") == 1
        assert len(answer.tokens) == 100
