"""Requests that want the same blocks at the same time: one computes them, the others attach."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from kvstrata.engine import Model
from kvstrata.engine.seat import Choose
from kvstrata.engine.sequence import RunningSequence
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.testing import LocalStore, sample_block
from kvstrata.methods.presets import Method
from kvstrata.prefill_node import PrefillNode, WorkerConfig
from kvstrata.prefill_node import flight as flight_module
from kvstrata.prefill_node.flight import Flight
from kvstrata.prefill_node.task import Task
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.identity import ScopeDigest
from kvstrata.protos.inference_pb2 import CacheReport
from kvstrata.protos.kvstore_pb2_grpc import KVStoreStub
from kvstrata.protos.report import ReportClock, merge_reports
from kvstrata.protos.service import CALL_METADATA, open_channel
from tests.prefill_node.nodes import (
    BALANCED,
    EXACT,
    Nodes,
    decoded,
    prefilled,
    prompt_of,
    reasons_of,
    running,
    stored_blocks,
    task_of,
)

SOON_S = 20.0


class Slow:
    """Lets a node's computing wait until it is told to go on, and counts its tokens."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.num_tokens = 0
        self.began = asyncio.Event()

    def make(self, node: Any) -> None:
        """Have ``node`` compute under this control."""
        steps = node._worker.steps
        compute = steps.compute

        async def slow(
            sequence: RunningSequence, until: int, choose: Choose | None = None
        ) -> AsyncIterator[None]:
            self.began.set()
            await self.go_on.wait()
            first = sequence.cache.length
            async for _ in compute(sequence, until, choose):
                yield
            self.num_tokens += until - first

        steps.compute = slow


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as made:
        yield made


@contextlib.asynccontextmanager
async def two_machines(
    config: WorkerConfig, store: LocalStore
) -> AsyncIterator[tuple[Nodes, Nodes]]:
    async with running(config, store.address) as one, running(config, store.address) as two:
        yield one, two


async def waiting(store: LocalStore) -> None:
    """Until somebody follows a block that another one makes."""
    counters = store.running.store.counters
    async with asyncio.timeout(SOON_S):
        while not counters.get("opened_blocks_total", state="pending"):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("method", [BALANCED, EXACT])
async def test_two_prefills_of_one_prompt_compute_it_once(
    config: WorkerConfig, model: Model, store: LocalStore, method: Method
) -> None:
    prompt = prompt_of(300)
    async with two_machines(config, store) as (one, two):
        slow = Slow()
        slow.make(one.prefill)
        slow.make(two.prefill)
        first = asyncio.create_task(prefilled(one.prefill, task_of(prompt, method)))
        await slow.began.wait()
        second = asyncio.create_task(prefilled(two.prefill, task_of(prompt, method)))
        await waiting(store)
        slow.go_on.set()
        reports = [await first, await second]
        alone = await decoded(one.decode, task_of(prompt, method, expected_blocks=4))
    assert slow.num_tokens == 256
    assert [r.committed_blocks for r in reports] == [4, 4]
    assert [r.coalesced_tokens for r in reports] == [0, 256]
    assert [reasons_of(r) for r in reports] == [{}, {}]
    assert [s.stage for s in reports[1].stages] == ["attach", "decompress", "tail"]
    counters = store.running.store.counters
    assert counters.get("puts_total", outcome="committed") == 4
    assert counters.get("opened_blocks_total", state="pending") == 4
    assert alone.reasons == {}


@pytest.mark.parametrize("method", [BALANCED, EXACT])
async def test_two_answers_to_one_prompt_compute_it_once_and_are_equal(
    config: WorkerConfig, store: LocalStore, method: Method
) -> None:
    prompt = prompt_of(200)
    async with two_machines(config, store) as (one, two):
        slow = Slow()
        slow.make(one.decode)
        slow.make(two.decode)
        first = asyncio.create_task(decoded(one.decode, task_of(prompt, method)))
        await slow.began.wait()
        second = asyncio.create_task(decoded(two.decode, task_of(prompt, method)))
        await waiting(store)
        slow.go_on.set()
        answers = [await first, await second]
    assert slow.num_tokens == 192
    assert answers[0].tokens == answers[1].tokens
    assert [a.cache.coalesced_tokens for a in answers] == [0, 192]
    assert [a.reasons for a in answers] == [{}, {}]


async def test_a_prompt_that_shares_its_beginning_computes_the_rest_only(
    config: WorkerConfig, model: Model, store: LocalStore
) -> None:
    shared = prompt_of(150)
    longer = (*shared[:128], *prompt_of(200, seed=9))
    async with two_machines(config, store) as (one, two):
        slow, quick = Slow(), Slow()
        slow.make(one.prefill)
        quick.make(two.prefill)
        quick.go_on.set()
        first = asyncio.create_task(prefilled(one.prefill, task_of(shared)))
        await slow.began.wait()
        second = asyncio.create_task(prefilled(two.prefill, task_of(longer)))
        await waiting(store)
        slow.go_on.set()
        reports = [await first, await second]
        assert (slow.num_tokens, quick.num_tokens) == (128, 192)
        assert await stored_blocks(store.address, model, longer) == 5
    assert [(r.committed_blocks, r.coalesced_tokens) for r in reports] == [(2, 0), (5, 128)]


@pytest.mark.parametrize("method", [BALANCED, EXACT])
async def test_the_death_of_the_one_that_computes_lets_one_of_the_others_compute(
    config: WorkerConfig, model: Model, store: LocalStore, method: Method
) -> None:
    prompt = prompt_of(300)
    async with (
        two_machines(config, store) as (one, two),
        running(config, store.address) as three,
    ):
        slow, others = Slow(), Slow()
        slow.make(one.prefill)
        others.make(two.prefill)
        others.make(three.prefill)
        first = asyncio.create_task(prefilled(one.prefill, task_of(prompt, method)))
        await slow.began.wait()
        rest = [
            asyncio.create_task(prefilled(node.prefill, task_of(prompt, method)))
            for node in (two, three)
        ]
        counters = store.running.store.counters
        async with asyncio.timeout(SOON_S):
            while counters.get("opened_blocks_total", state="pending") < 8:
                await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        async with asyncio.timeout(SOON_S):
            await others.began.wait()
            while counters.get("opened_blocks_total", state="pending") < 12:
                await asyncio.sleep(0.01)
        others.go_on.set()
        reports = await asyncio.gather(*rest)
        assert others.num_tokens == 256
        assert await stored_blocks(store.address, model, prompt, method) == 4
    assert [reasons_of(r) for r in reports] == [{"announced_writer_gone": 256}] * 2
    assert sorted(r.coalesced_tokens for r in reports) == [0, 256]
    assert [r.committed_blocks for r in reports] == [4, 4]


async def test_nobody_waits_longer_than_it_bears_silence(
    config: WorkerConfig, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight_module, "PATIENCE_S", 0.3)
    prompt = prompt_of(200)
    async with two_machines(config, store) as (one, two):
        stuck = Slow()
        stuck.make(one.prefill)
        first = asyncio.create_task(prefilled(one.prefill, task_of(prompt)))
        await stuck.began.wait()
        report = await prefilled(two.prefill, task_of(prompt))
        stuck.go_on.set()
        late = await first
    assert reasons_of(report) == {"announced_wait_expired": 192}
    assert len(report.recomputes) > 1  # it asked again before it computed
    assert report.committed_blocks == 3
    assert late.committed_blocks == 3
    assert store.running.store.counters.get("attached_blocks_total", outcome="wait_expired") > 0


async def test_a_block_that_does_not_come_leaves_a_lossy_cache_as_it_was(
    config: WorkerConfig, model: Model, store: LocalStore
) -> None:
    prompt = prompt_of(300)
    for method, kept in ((BALANCED, 0), (EXACT, 1)):
        async with two_machines(config, store) as (one, two):
            waiting_one = await sequence_flight(two.prefill, prompt, method)
            making = await sequence_flight(one.prefill, prompt, method)
            assert await making.claim(0, 4) == 0
            assert await waiting_one.claim(0, 4) == 4
            loading = asyncio.create_task(waiting_one.load(0, 4))
            sealed = await computed(making, 4)
            await making.publish(sealed[:1])
            await making.aclose()
            await loading
            assert waiting_one._sequence.num_blocks_held == kept
            assert reasons_of(waiting_one._clock.report) == {
                "announced_writer_gone": 64 * (4 - kept)
            }
            await waiting_one.aclose()


async def sequence_flight(node: PrefillNode, prompt: tuple[int, ...], method: Method) -> Flight:
    worker, task = node._worker, task_of(prompt, method)
    sequence = await worker.steps.open(method, prompt)
    return Flight(worker, sequence, task, ReportClock("prefill"))


async def computed(flight: Flight, num_blocks: int) -> list[Any]:
    sequence = flight._sequence
    for _ in sequence.compute(num_blocks * 64):
        pass
    return sequence.seal(0, num_blocks)


async def test_blocks_that_can_no_longer_be_written_are_put(
    config: WorkerConfig, model: Model, store: LocalStore
) -> None:
    prompt = prompt_of(300)
    async with running(config, store.address) as nodes:
        flight = await sequence_flight(nodes.prefill, prompt, EXACT)
        assert await flight.claim(0, 4) == 0
        sealed = await computed(flight, 4)
        assert flight._writer is not None
        await flight._writer.abandon()  # as when the store ended the stream
        await flight.publish(sealed)
        await flight.aclose()
        assert flight._clock.report.committed_blocks == 4
        assert reasons_of(flight._clock.report) == {}
        assert await stored_blocks(store.address, model, prompt, EXACT) == 4


async def test_blocks_for_which_there_is_no_room_in_flight_are_put(
    config: WorkerConfig, model: Model
) -> None:
    prompt = prompt_of(300)
    limits = StoreLimits(max_block_bytes=110_000, max_in_flight_bytes=110_000)
    async with (
        LocalStore(StoreConfig(limits=limits)) as store,
        running(config, store.address) as nodes,
        open_channel(store.address) as channel,
    ):
        stub: Any = KVStoreStub(channel)  # type: ignore[no-untyped-call]
        key, frames = sample_block(ScopeDigest(b"s" * 16), strata={1: 108_000})
        taking = stub.Put(metadata=CALL_METADATA)
        sizes: Any = [{"stratum": 1, "frame_bytes": len(frames[1])}]
        name = pb.BlockKey(scope=key.scope, block_hash=key.block_hash)
        await taking.write(pb.PutRequest(open=pb.PutOpen(key=name, strata=sizes)))
        counters = store.running.store.counters
        async with asyncio.timeout(SOON_S):
            while not store.running.workload.in_flight_puts:
                await asyncio.sleep(0.01)
        publishing = asyncio.create_task(prefilled(nodes.prefill, task_of(prompt, EXACT)))
        async with asyncio.timeout(SOON_S):
            while counters.get("puts_total", outcome="rejected", reason="throttled") < 4:
                await asyncio.sleep(0.01)
        taking.cancel()
        report = await publishing
        assert report.committed_blocks == 4
        assert reasons_of(report) == {}
        assert await stored_blocks(store.address, model, prompt, EXACT) == 4


async def test_what_was_claimed_by_a_request_that_ends_is_free_again(
    config: WorkerConfig, store: LocalStore
) -> None:
    prompt = prompt_of(200)
    async with running(config, store.address) as nodes:
        slow = Slow()
        slow.make(nodes.decode)
        answering = asyncio.create_task(decoded(nodes.decode, task_of(prompt)))
        await slow.began.wait()
        assert store.running.store.arrivals._live
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        slow.go_on.set()
        async with asyncio.timeout(SOON_S):
            while store.running.store.arrivals._writers:
                await asyncio.sleep(0.01)
        assert not store.running.store.arrivals._live


def test_a_report_of_coalesced_tokens_adds_up() -> None:
    one, two = CacheReport(coalesced_tokens=64), CacheReport(coalesced_tokens=128)
    merge_reports(one, two)
    assert one.coalesced_tokens == 192


async def test_a_task_that_must_not_ask_the_store_announces_nothing(
    config: WorkerConfig, store: LocalStore
) -> None:
    task: Task = replace(task_of(prompt_of(200)), ask_store=False)
    async with running(config, store.address) as nodes:
        await prefilled(nodes.prefill, task)
    assert store.running.store.counters.get("opened_blocks_total") == 0
