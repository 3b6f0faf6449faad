"""Read plans of a real node over a real store whose links are slow: the chosen way is fastest."""

import contextlib
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
import torch
import transformers

from kvstrata.engine import Model
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.row_buffer import RowBuffer
from kvstrata.engine.step_loop import StepLoop
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.testing import LocalStore, ManualClock, RedisServer
from kvstrata.methods.presets import Method
from kvstrata.prefill_node import Task, Worker, WorkerConfig
from kvstrata.prefill_node.flight import Flight
from kvstrata.prefill_node.prefill import (
    carrying_out,
    load_cached,
    num_prompt_blocks,
    provide_blocks,
    unstored,
)
from kvstrata.prefill_node.read_plan import ReadPlan, StoredBlock, fetch_all
from kvstrata.prefill_node.read_rates import MAX_AGE_S, MIN_SEEN, ReadRates
from kvstrata.prefill_node.reading import plan_of, planned
from kvstrata.protos import admin_pb2, kvstore_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.report import ReportClock
from tests.engine.conftest import build_tokenizer
from tests.engine.families import build_reference
from tests.engine.test_paged_cache import methods, wide
from tests.prefill_node.nodes import (
    BALANCED,
    EXACT,
    VOCAB_SIZE,
    learn,
    names_of,
    prompt_of,
    task_of,
)

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from soak_proxy import Proxy

__all__ = ["methods", "wide"]
BASE = Stratum.STRATUM_BASE
NUM_BLOCKS = 4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A saved model whose blocks take a tenth of a second or so to compute."""
    folder = tmp_path_factory.mktemp("large-llama")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    build_reference(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


@dataclass
class Node:
    """A worker behind a link, and the store that it asks, seen directly."""

    worker: Worker
    store: StoreClient
    clock: ManualClock

    async def known(self, task: Task) -> Task:
        """Return the task as a gateway would send it."""
        names = names_of(self.worker.model, task.prompt_ids, task.method)
        found = await self.store.lookup(*names)
        stored = tuple(StoredBlock(block.num_bytes, block.tier) for block in found.blocks)
        return replace(task, stored=stored, expected_blocks=len(stored))

    def plan(self, task: Task) -> ReadPlan:
        return plan_of(self.worker, task, task.prompt_ids, task.stored)

    async def read(self, task: Task, plan: ReadPlan) -> float:
        """Do what a plan says; return the seconds that it took."""
        clock, worker, task = ReportClock("test"), self.worker, planned(task, plan)
        num_blocks, order = (
            num_prompt_blocks(len(task.prompt_ids), task.method),
            worker.steps.next_order(),
        )
        cached = plan.num_fetched * BLOCK_TOKENS
        async with worker.open(task, task.prompt_ids, cached, order) as sequence:
            async with contextlib.aclosing(Flight(worker, sequence, task, clock)) as flight:
                with carrying_out(plan, clock):
                    await load_cached(worker, sequence, num_blocks, task, clock, plan)
                    sealed = await provide_blocks(
                        worker, sequence, num_blocks, task, clock, flight, plan
                    )
                assert unstored(sealed, plan) == []
            assert sequence.num_blocks_held == num_blocks
        assert (clock.report.bytes_fetched > 0) == (plan.num_fetched > 0)
        return clock.report.read_plans[0].seconds

    async def publish(self, task: Task) -> Task:
        """Compute a prompt's blocks and bring them to the store; return it as ``known``."""
        clock, worker = ReportClock("test"), self.worker
        num_blocks, order = (
            num_prompt_blocks(len(task.prompt_ids), task.method),
            worker.steps.next_order(),
        )
        async with (
            worker.open(task, task.prompt_ids, 0, order) as sequence,
            contextlib.aclosing(Flight(worker, sequence, task, clock)) as flight,
        ):
            sealed = await provide_blocks(
                worker, sequence, num_blocks, task, clock, flight, fetch_all(0)
            )
            await flight.publish(sealed)
        assert clock.report.committed_blocks == num_blocks
        return await self.known(task)

    async def evict(self, task: Task, first: int) -> Task:
        """Leave blocks from ``first`` on in Redis alone; return the task as ``known``."""
        scope, hashes = names_of(self.worker.model, task.prompt_ids, task.method)
        keys = [kvstore_pb2.BlockKey(scope=scope, block_hash=h) for h in hashes[first:]]
        async with grpc.aio.insecure_channel(self.store.address) as channel:
            stub: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
            await stub.Evict(admin_pb2.EvictRequest(keys=keys, tier="dram"))
        return await self.known(task)

    async def times(self, task: Task, plans: Mapping[str, ReadPlan]) -> dict[str, float]:
        return {name: await self.read(task, plan) for name, plan in plans.items()}

    def block_s(self) -> float:
        """Return what computing a block takes here."""
        assert self.worker.rates.token_s is not None
        return self.worker.rates.token_s * BLOCK_TOKENS


@contextlib.asynccontextmanager
async def node_of(folder: Path, address: str, store_address: str) -> AsyncIterator[Node]:
    worker = Worker(WorkerConfig(address, str(folder), num_threads=1, store_timeout_s=30.0))
    clock = ManualClock()
    worker.rates = ReadRates(clock)
    try:
        async with StoreClient(store_address) as store:
            yield Node(worker, store, clock)
    finally:
        await worker.close()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def prompt(num_blocks: int, seed: int) -> tuple[int, ...]:
    return prompt_of(num_blocks * BLOCK_TOKENS + 5, seed=seed)


def choices(num_blocks: int, strata: tuple[Stratum, ...] = ()) -> dict[str, ReadPlan]:
    """Return a plan of each choice; some of the blocks are the first half."""
    plans = {
        "full": fetch_all(num_blocks),
        "part": ReadPlan("part", num_blocks // 2, num_blocks),
        "recompute": ReadPlan("recompute", 0, num_blocks),
    }
    if strata:
        plans["fewer_strata"] = ReadPlan("fewer_strata", num_blocks, num_blocks, strata)
    return plans


def assert_fastest(choice: str, times: dict[str, float]) -> None:
    assert choice == min(times, key=lambda name: times[name]), times


@pytest.mark.parametrize(("num_rows", "choice"), [(200, "full"), (400, "recompute")])
async def test_computing_is_no_plan_where_only_the_blocks_fit(
    wide: dict[str, Model], methods: dict[tuple[str, str], Method], num_rows: int, choice: str
) -> None:
    """Compressed blocks take less memory than the rows that they are computed from."""
    model, method = wide["wide"], methods["wide", "frame"]
    pool = KVPool(model, RowBuffer.bytes_for(model.spec, num_rows))
    worker = SimpleNamespace(rates=ReadRates(), steps=StepLoop(model, pool))
    learn(worker, method, byte_s=1.0, token_s=1e-4)
    stored = tuple(StoredBlock(1000, "dram") for _ in range(3))
    task = replace(task_of(prompt_of(250), method), stored=stored, expected_blocks=3)
    try:
        plan = plan_of(cast(Worker, worker), task, task.prompt_ids, stored)
        sequence = await worker.steps.open(
            method, task.prompt_ids, num_cached=plan.num_fetched * BLOCK_TOKENS
        )
        await worker.steps.close(sequence)
    finally:
        worker.steps.stop()
    assert plan.choice == choice


async def test_over_a_slow_link_each_choice_is_the_fastest_where_it_is_made(large: Path) -> None:
    async with (
        LocalStore() as store,
        Proxy(port_of(store.address)) as link,
        node_of(large, link.address, store.address) as node,
    ):
        task = await node.publish(task_of(prompt(NUM_BLOCKS, 0), EXACT))
        small = [await node.publish(task_of(prompt(2, 1 + i), EXACT)) for i in range(MIN_SEEN)]
        assert node.plan(task) == fetch_all(NUM_BLOCKS)  # nothing was fetched so far
        for learnt in small:
            await node.read(learnt, fetch_all(2))
        fast = node.plan(task)
        assert fast.choice == "full"
        assert fast.predicted_s > 0
        assert_fastest("full", await node.times(task, choices(NUM_BLOCKS)))

        link.byte_s = 4 * node.block_s() / task.stored[0].num_bytes
        node.clock.advance(MAX_AGE_S + 1)
        assert node.plan(task) == fetch_all(NUM_BLOCKS)  # what the link did is forgotten
        for learnt in small:
            await node.read(learnt, fetch_all(2))
        assert node.plan(task).choice == "recompute"
        times = await node.times(task, choices(NUM_BLOCKS))
        assert_fastest("recompute", times)
        assert times["full"] > 2 * times["recompute"]


async def test_a_limit_takes_fewer_strata_where_these_are_the_fastest(large: Path) -> None:
    async with (
        LocalStore() as store,
        Proxy(port_of(store.address)) as link,
        node_of(large, link.address, store.address) as node,
    ):
        task = await node.publish(task_of(prompt(NUM_BLOCKS, 0), BALANCED))
        small = [await node.publish(task_of(prompt(2, 1 + i), BALANCED)) for i in range(MIN_SEEN)]
        link.byte_s = 0.8 * node.block_s() / task.stored[0].num_bytes
        for learnt in small:
            await node.read(learnt, fetch_all(2))
        assert node.plan(task).choice == "full"
        hasty = replace(task, first_token_unix_s=task.deadline_unix_s - 60.0)
        assert node.plan(hasty).choice in ("full", "recompute")  # it may not read less
        hasty = replace(hasty, coarsest=BASE)
        plan = node.plan(hasty)
        assert (plan.choice, plan.strata) == ("fewer_strata", (BASE,))
        assert planned(hasty, plan).method.wanted == (BASE,)
        times = await node.times(task, choices(NUM_BLOCKS, plan.strata))
        assert_fastest("fewer_strata", times)


async def test_what_lies_in_a_slow_tier_is_computed_and_the_rest_fetched(large: Path) -> None:
    with RedisServer() as redis:
        async with Proxy(redis.port) as link:
            config = StoreConfig(
                redis_url=f"redis://{link.address}", redis_timeout_s=30.0, redis_probe_s=1.0
            )
            async with (
                LocalStore(config) as store,
                node_of(large, store.address, store.address) as node,
            ):
                task = await node.publish(task_of(prompt(NUM_BLOCKS, 0), EXACT))
                small = [
                    await node.publish(task_of(prompt(3, 1 + i), EXACT)) for i in range(MIN_SEEN)
                ]
                link.byte_s = 4 * node.block_s() / task.stored[0].num_bytes
                for learnt in small:
                    learnt = await node.evict(learnt, 1)
                    await node.read(learnt, fetch_all(3))
                    await node.read(learnt, fetch_all(3))  # from dram by now
                task = await node.evict(task, NUM_BLOCKS // 2)
                assert [block.tier for block in task.stored] == ["dram"] * 2 + ["redis"] * 2
                plan = node.plan(task)
                assert (plan.choice, plan.num_fetched) == ("part", NUM_BLOCKS // 2)
                times = {}
                for name, other in choices(NUM_BLOCKS).items():
                    times[name] = await node.read(await node.evict(task, NUM_BLOCKS // 2), other)
                assert_fastest("part", times)
