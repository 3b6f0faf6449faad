"""What a Put waits for, by the tier that it names, and what it is told when that tier fails."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.protos.errors import InvalidRequestError
from kvstrata.protos.identity import ScopeDigest

BASE = 1
REDIS_TIMEOUT_S = 2.0


@pytest.fixture
async def store(own_redis: RedisServer) -> AsyncIterator[LocalStore]:
    config = StoreConfig(
        redis_url=own_redis.url, redis_timeout_s=REDIS_TIMEOUT_S, redis_probe_s=0.05
    )
    async with LocalStore(config) as made:
        yield made


@pytest.fixture
async def client(store: LocalStore) -> AsyncIterator[StoreClient]:
    async with StoreClient(store.address, timeout_s=60) as made:
        yield made


async def tier_of(store: LocalStore, number: int, scope: ScopeDigest, name: str) -> bool:
    """Whether the tier of that name holds the block of that number now."""
    tiers = {tier.name: tier for tier in store.running.store.tiers}
    return (await tiers[name].contains([sample_block(scope, number)[0]])) != [None]


async def test_a_put_at_dram_does_not_wait_for_redis_which_gets_the_block_afterwards(
    store: LocalStore, client: StoreClient, own_redis: RedisServer, scope: ScopeDigest
) -> None:
    own_redis.pause()
    try:
        begin = time.monotonic()
        (kept,) = await client.put([sample_block(scope)], durability="dram")
        waited_s = time.monotonic() - begin
    finally:
        own_redis.resume()
    assert (kept.outcome, kept.tiers, kept.reason) == ("committed", ("dram",), "")
    assert waited_s < REDIS_TIMEOUT_S
    assert await store.running.store.flush(30)
    assert await tier_of(store, 0, scope, "redis")
    assert (await client.put([sample_block(scope)], durability="redis"))[0].outcome == "exists"


async def test_a_put_at_redis_is_in_redis_when_it_is_acknowledged(
    store: LocalStore, client: StoreClient, scope: ScopeDigest
) -> None:
    (done,) = await client.put([sample_block(scope)], durability="redis")
    assert (done.outcome, done.tiers) == ("committed", ("dram", "redis"))
    assert await tier_of(store, 0, scope, "redis")


async def test_a_put_at_a_tier_that_is_down_is_kept_with_the_reason_and_arrives_later(
    store: LocalStore, client: StoreClient, own_redis: RedisServer, scope: ScopeDigest
) -> None:
    own_redis.kill()
    (kept,) = await client.put([sample_block(scope)], durability="redis")
    assert (kept.outcome, kept.tiers) == ("kept", ("dram",))
    assert kept.reason.startswith("redis: redis does not answer")
    assert store.running.store.counters.get("puts_total", outcome="kept", reason="partial") == 1
    found = await client.lookup(scope, [kept.key.block_hash])
    assert [block.tier for block in found.blocks] == ["dram"]
    own_redis.restart()
    assert await store.running.store.flush(30)
    async with asyncio.timeout(30):
        while not await tier_of(store, 0, scope, "redis"):
            await asyncio.sleep(0.05)


async def test_a_put_at_a_tier_without_room_is_kept_with_the_reason(scope: ScopeDigest) -> None:
    with RedisServer(options=["--maxmemory", "6mb", "--maxmemory-policy", "noeviction"]) as full:
        config = StoreConfig(redis_url=full.url, redis_timeout_s=20)
        async with (
            LocalStore(config) as store,
            StoreClient(store.address, timeout_s=60) as client,
        ):
            big = [sample_block(scope, n, strata={BASE: 400_000}) for n in range(24)]
            outcomes = await client.put(big, durability="redis")
    kept = [o for o in outcomes if o.outcome == "kept"]
    assert {o.outcome for o in outcomes} == {"committed", "kept"}
    assert {(o.tiers, o.reason) for o in kept} == {(("dram",), "redis: redis is out of memory")}


async def test_a_put_at_ssd_survives_the_process(tmp_path: Path, scope: ScopeDigest) -> None:
    config = StoreConfig(ssd_path=str(tmp_path / "ssd"))
    async with LocalStore(config) as store, StoreClient(store.address, timeout_s=60) as client:
        (done,) = await client.put([sample_block(scope)], durability="ssd")
        assert (done.outcome, done.tiers) == ("committed", ("dram", "ssd"))
    async with LocalStore(config) as store, StoreClient(store.address, timeout_s=60) as client:
        found = await client.lookup(scope, [done.key.block_hash])
        assert [block.tier for block in found.blocks] == ["ssd"]


@pytest.mark.parametrize("name", ["object", "tape", "DRAM", "x" * 1000])
async def test_a_tier_that_the_store_does_not_have_is_refused_before_a_byte_is_kept(
    store: LocalStore, client: StoreClient, scope: ScopeDigest, name: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"no tier '{name[:32]}'") as caught:
        await client.put([sample_block(scope)], durability=name)
    assert caught.value.remedy == "use one of dram, redis"
    assert not await tier_of(store, 0, scope, "dram")
    assert store.running.workload.in_flight_puts == 0
