"""How the store says that it feels: to people, to probes, and in the log."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstrata.kvstore_service import store_health
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.kvstore_service.tier import TierUsage
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos.identity import BlockKey, ScopeDigest
from kvstrata.protos.service import open_channel

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Status = Callable[[str], Awaitable[int]]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the tiers often."""
    monkeypatch.setattr(store_health, "LOOK_S", 0.05)


@pytest.fixture
async def store(tmp_path: Path, own_redis: RedisServer) -> AsyncIterator[LocalStore]:
    config = StoreConfig(
        dram_bytes=64 << 20,
        redis_url=own_redis.url,
        redis_probe_s=0.05,
        redis_timeout_s=2,
        ssd_path=str(tmp_path / "ssd"),
    )
    async with LocalStore(config) as made:
        yield made


@pytest.fixture
async def status(store: LocalStore) -> AsyncIterator[Status]:
    async with open_channel(store.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)

        async def ask(service: str) -> int:
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            return int(reply.status)

        yield ask


async def until(status: Status, service: str, wanted: int) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if await status(service) == wanted:
                    return
            except grpc.RpcError:  # the name is not known before the first look
                pass
            await asyncio.sleep(0.02)


async def told(store: LocalStore) -> str:
    return (await store.running.stats.tell()).health


async def test_a_tier_that_is_down_degrades_the_whole_and_nothing_else(
    store: LocalStore, status: Status, own_redis: RedisServer, scope: ScopeDigest,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    await until(status, "kvstrata.whole", SERVING)
    assert await status("kvstrata.tier.redis") == SERVING
    own_redis.kill()
    async with StoreClient(store.address, timeout_s=30) as client:
        await client.put([sample_block(scope)])
    await until(status, "kvstrata.tier.redis", NOT_SERVING)
    await until(status, "kvstrata.whole", NOT_SERVING)
    assert (await told(store)).startswith("degraded: redis: ")
    for serving in ("", "kvstrata.v1.KVStore", "kvstrata.v1.Admin", "kvstrata.tier.ssd"):
        assert await status(serving) == SERVING
    own_redis.restart()
    await until(status, "kvstrata.whole", SERVING)
    assert await told(store) == "ok"
    changes = [
        (r.levelname, r.__dict__["health"].partition(":")[0])
        for r in caplog.records
        if r.message == "health changed"
    ]
    assert changes == [("WARNING", "degraded"), ("INFO", "ok")]


class GatedTier(DramTier):
    """A tier below that answers, and takes its time to write."""

    name = "slow"
    resident = False

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.gate = asyncio.Event()

    async def put(self, key: BlockKey, frames: Mapping[int, bytes]) -> list[BlockKey]:
        await self.gate.wait()
        return await super().put(key, frames)


async def test_a_full_backlog_is_told_although_the_tier_answers(scope: ScopeDigest) -> None:
    slow = GatedTier()
    blocks = BlockStore(DramTier(1 << 20), [slow], max_behind_bytes=4500)
    feels = store_health.StoreHealth(blocks, Workload())
    assert (await feels.look()).text == "ok"
    key, frames = sample_block(scope)
    await blocks.put(key, frames, durability="dram")
    size = len(frames[1])
    assert 0.9 * 4500 < size <= 4500
    found = await feels.look()
    assert found.text == f"degraded: slow: its backlog is full: {size} of 4500 bytes wait"
    slow.gate.set()
    assert await blocks.flush(30)
    assert (await feels.look()).text == "ok"
    await blocks.close()


async def test_a_full_disk_is_told_and_over_when_there_is_room(
    store: LocalStore, status: Status, scope: ScopeDigest
) -> None:
    await until(status, "kvstrata.whole", SERVING)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with StoreClient(store.address, timeout_s=30) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", full)
            (outcome,) = await client.put([sample_block(scope)])
            assert outcome.tiers == ("dram", "redis")
            assert await told(store) == "degraded: ssd: the disk is full"
            await until(status, "kvstrata.tier.ssd", NOT_SERVING)
        await until(status, "kvstrata.whole", SERVING)


async def test_draining_comes_before_all_else(store: LocalStore, status: Status) -> None:
    store.running.workload.is_draining = True
    assert await told(store) == "draining"
    await until(status, "kvstrata.whole", NOT_SERVING)


class DeafTier(DramTier):
    """A tier below whose look turns a cancellation into a time-out, as a client's may."""

    name = "deaf"
    resident = False

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self.num_cancelled = 0
        self.is_asked = asyncio.Event()

    async def usage(self) -> TierUsage:
        self.is_asked.set()
        if self.num_cancelled < 2:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.num_cancelled += 1
        return await super().usage()


async def test_a_look_that_hears_no_cancellation_does_not_hold_the_end_up() -> None:
    store = LocalStore()
    await store.__aenter__()
    deaf = DeafTier(1 << 20)
    store.running.store.tiers = (*store.running.store.tiers, deaf)
    await asyncio.wait_for(deaf.is_asked.wait(), 30)
    await asyncio.wait_for(store.__aexit__(None, None, None), 30)
    assert deaf.num_cancelled == 2
