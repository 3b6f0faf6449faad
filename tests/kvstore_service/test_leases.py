"""A read lease: what a Lookup told stays until it was fetched, or the reader is told at once."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstrata.kvstore_service.client import LookupResult, StoreClient
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.lease_table import LeaseTable
from kvstrata.kvstore_service.server import start_store
from kvstrata.kvstore_service.testing import LocalStore, ManualClock, RedisServer, sample_block
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest

BASE, MID = 1, 2
STRATA = {BASE: 4000, MID: 2000}
Block = tuple[BlockKey, dict[int, bytes]]
BLOCK_BYTES = sum(map(len, sample_block(ScopeDigest(b"s" * 16), strata=STRATA)[1].values()))


def prompt(scope: ScopeDigest, first: int, count: int) -> list[Block]:
    """Return consecutive blocks of one prompt."""
    blocks: list[Block] = []
    parent: bytes | None = None
    for number in range(first, first + count):
        blocks.append(sample_block(scope, number, strata=STRATA, parent=parent))
        parent = blocks[-1][0].block_hash
    return blocks


def hashes(blocks: list[Block]) -> list[BlockHash]:
    return [key.block_hash for key, _ in blocks]


async def fetch(client: StoreClient, scope: ScopeDigest, wanted: list[BlockHash]) -> list[str]:
    """Return why each stratum was missed, "" where it was served and verified."""
    found = []
    async for piece in client.get(scope, wanted, [BASE, MID]):
        if piece.frame is not None:
            piece.frame.verify()
        found.append(piece.miss)
    return found


async def flood(client: StoreClient, scope: ScopeDigest, first: int, count: int) -> None:
    await client.put([sample_block(scope, first + n, strata=STRATA) for n in range(count)])


async def test_leased_blocks_survive_a_flood_whole_and_go_when_the_lease_is_over(
    scope: ScopeDigest,
) -> None:
    clock = ManualClock()
    running = await start_store(StoreConfig(dram_bytes=12 * BLOCK_BYTES), clock)
    try:
        async with StoreClient(running.address, timeout_s=60) as client:
            mine = prompt(scope, 0, 6)
            await client.put(mine)
            told = await client.lookup(scope, hashes(mine), lease_s=10)
            assert len(told.blocks) == 6
            await flood(client, scope, 1000, 60)
            assert await fetch(client, scope, hashes(mine)) == [""] * 12
            clock.advance(10.1)
            await flood(client, scope, 2000, 60)
            missed = set(await fetch(client, scope, hashes(mine)))
            assert missed <= {"", "absent", "evicted"}
            assert "evicted" in missed
            assert running.store.dram._leases.usage() == 0
    finally:
        await running.stop(0.5)


async def test_the_server_cuts_a_lease_that_is_too_long(scope: ScopeDigest) -> None:
    clock = ManualClock()
    limits = StoreLimits(max_lease_ms=2000)
    running = await start_store(StoreConfig(limits=limits), clock)
    try:
        async with StoreClient(running.address, timeout_s=60) as client:
            await client.put(prompt(scope, 0, 2))
            await client.lookup(scope, hashes(prompt(scope, 0, 2)), lease_s=3600)
            assert running.store.dram._leases.usage() == 2
            clock.advance(2.1)
            assert running.store.dram._leases.usage() == 0
    finally:
        await running.stop(0.5)


async def test_a_shorter_lease_does_not_shorten_a_longer_one(scope: ScopeDigest) -> None:
    clock = ManualClock()
    leases = LeaseTable(clock)
    key = sample_block(scope)[0]
    leases.add([key], 10)
    leases.add([key], 1)
    clock.advance(5)
    assert leases.holds(key)
    clock.advance(5)
    assert not leases.holds(key)


async def test_expired_leases_take_no_memory(scope: ScopeDigest) -> None:
    clock = ManualClock()
    leases = LeaseTable(clock)
    for number in range(0, 100_000, 1000):
        fresh = [BlockHash((number + n).to_bytes(16, "big")) for n in range(1000)]
        leases.add([BlockKey(scope, block_hash) for block_hash in fresh], 1)
        clock.advance(2)
        assert len(leases._until) <= 5000
    assert leases.usage() == 0


@pytest.fixture
async def stores(redis: RedisServer) -> AsyncIterator[tuple[LocalStore, LocalStore]]:
    """Two processes on one Redis of 20 blocks, the first without room in memory of its own."""
    common = {"redis_url": redis.url, "redis_bytes": 20 * BLOCK_BYTES, "redis_timeout_s": 10.0}
    async with (
        LocalStore(StoreConfig(dram_bytes=1000, **common)) as reading,  # type: ignore[arg-type]
        LocalStore(StoreConfig(**common)) as writing,  # type: ignore[arg-type]
    ):
        yield reading, writing


async def test_a_lease_holds_against_another_process_that_floods_redis(
    stores: tuple[LocalStore, LocalStore], scope: ScopeDigest
) -> None:
    reading, writing = stores
    mine = prompt(scope, 0, 6)
    async with (
        StoreClient(reading.address, timeout_s=60) as reader,
        StoreClient(writing.address, timeout_s=60) as writer,
    ):
        await writer.put(mine)
        assert len((await reader.lookup(scope, hashes(mine), lease_s=30)).blocks) == 6
        await flood(writer, scope, 1000, 80)
        assert await fetch(reader, scope, hashes(mine)) == [""] * 12
        short = prompt(scope, 500, 3)
        await writer.put(short)
        await reader.lookup(scope, hashes(short), lease_s=0.2)
        async with asyncio.timeout(60):
            first = 2000
            while len((await reader.lookup(scope, hashes(short))).blocks) == 3:
                await flood(writer, scope, first, 20)
                first += 20
        await writing.running.store.tiers[1].check_integrity()


async def test_every_reader_gets_what_it_was_told_while_another_process_evicts(
    stores: tuple[LocalStore, LocalStore], scope: ScopeDigest
) -> None:
    reading, writing = stores
    prompts = [prompt(scope, 100 * n, 4) for n in range(4)]
    promised = missed = 0

    async def read(client: StoreClient, number: int) -> None:
        nonlocal promised, missed
        wanted = hashes(prompts[number % len(prompts)])
        for _ in range(6):
            told: LookupResult = await client.lookup(scope, wanted, lease_s=30)
            for block in told.blocks:
                assert set(block.strata) == {BASE, MID}
            got = await fetch(client, scope, wanted[: len(told.blocks)])
            promised += 2 * len(told.blocks)
            missed += sum(bool(reason) for reason in got)

    async def write(client: StoreClient) -> None:
        for round_number in range(6):
            await client.put(prompts[round_number % len(prompts)])
            await flood(client, scope, 5000 + 10 * round_number, 10)

    async with (
        StoreClient(reading.address, timeout_s=60) as reader,
        StoreClient(writing.address, timeout_s=60) as writer,
    ):
        await asyncio.gather(write(writer), *(read(reader, n) for n in range(8)))
    assert promised > 0
    assert missed == 0
    assert writing.running.store.counters.get("evictions_total", tier="redis") > 0


async def test_what_redis_loses_by_itself_is_told_at_once(
    stores: tuple[LocalStore, LocalStore], redis: RedisServer, scope: ScopeDigest
) -> None:
    from redis.asyncio import Redis

    reading, writing = stores
    mine = prompt(scope, 0, 3)
    async with (
        StoreClient(reading.address, timeout_s=60) as reader,
        StoreClient(writing.address, timeout_s=60) as writer,
    ):
        await writer.put(mine)
        assert len((await reader.lookup(scope, hashes(mine), lease_s=30)).blocks) == 3
        async with Redis.from_url(redis.url) as direct:
            await direct.flushall()
        assert await fetch(reader, scope, hashes(mine)) == ["absent"] * 6
