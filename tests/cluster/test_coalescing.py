"""Concurrent requests for one prefix, through the gateway: its KV is computed once."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstrata.engine import Model
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.prefill_node import WorkerConfig
from tests.cluster.local_workers import Cluster, request_of, serving
from tests.prefill_node.nodes import prompt_of
from tests.prefill_node.test_single_flight import SOON_S, Slow

LONG = prompt_of(420)  # six blocks: goes by a prefill node


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as made:
        yield made


@pytest.fixture
async def cluster(config: WorkerConfig, model: Model, store: LocalStore) -> AsyncIterator[Cluster]:
    async with serving(config, model, store.address) as made:
        yield made


@pytest.mark.parametrize("preset", ["balanced", "exact"])
async def test_identical_prompts_at_the_same_time_are_computed_once(
    cluster: Cluster, store: LocalStore, preset: str
) -> None:
    slow = Slow()
    slow.make(cluster.workers._nodes.prefill)
    slow.make(cluster.workers._nodes.decode)
    requests = [asyncio.create_task(cluster.generate(request_of(LONG, preset=preset)))]
    await slow.began.wait()
    requests += [
        asyncio.create_task(cluster.generate(request_of(LONG, preset=preset))) for _ in range(3)
    ]
    counters = store.running.store.counters
    async with asyncio.timeout(SOON_S):
        while counters.get("opened_blocks_total", state="pending") < 18:
            await asyncio.sleep(0.01)
    slow.go_on.set()
    answers = await asyncio.gather(*requests)
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert slow.num_tokens == 6 * 64
    assert [answer.reasons for answer in answers] == [{}] * 4
    assert [answer.cache.coalesced_tokens for answer in answers] == [0, 384, 384, 384]
    assert len(cluster.workers.prefills) == 1  # the others went straight to a decode node
    assert counters.get("puts_total", outcome="committed") == 6
    told = await cluster.counters()
    assert told["coalesced_requests_total",] == 3
    assert told["coalesced_tokens_total",] == 3 * 384
    assert told["prompt_tokens_total",] == 4 * 420
    assert told["cached_tokens_total",] == 0
    assert told["computed_tokens_total",] == 4 * 420 - 3 * 384


async def test_when_the_one_that_computes_dies_the_others_answer_all_the_same(
    cluster: Cluster, store: LocalStore
) -> None:
    alone = await cluster.generate(request_of(LONG, preset="exact"))
    await store.running.store.delete(await store.running.store.dram.keys(100))
    slow, others = Slow(), Slow()
    slow.make(cluster.workers._nodes.prefill)
    others.make(cluster.workers._nodes.decode)
    first = asyncio.create_task(cluster.generate(request_of(LONG, preset="exact")))
    await slow.began.wait()
    rest = [
        asyncio.create_task(cluster.generate(request_of(LONG, preset="exact"))) for _ in range(2)
    ]
    counters = store.running.store.counters
    async with asyncio.timeout(SOON_S):
        while counters.get("opened_blocks_total", state="pending") < 12:
            await asyncio.sleep(0.01)
    first.cancel()
    others.go_on.set()
    answers = await asyncio.gather(*rest)
    assert [answer.tokens for answer in answers] == [alone.tokens] * 2
    assert [answer.reasons for answer in answers] == [{"announced_writer_gone": 384}] * 2
    assert others.num_tokens == 384
    told = await cluster.counters()
    assert told["recomputes_total", "announced_writer_gone"] == 2
    slow.go_on.set()
