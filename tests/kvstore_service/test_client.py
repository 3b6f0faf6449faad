"""The client against a real store on the loopback."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping

import pytest
from redis.asyncio import Redis

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.data_codec import GetPart
from kvstrata.kvstore_service.found import FetchedStratum, GetAssembly
from kvstrata.kvstore_service.frame_assembly import FrameAssembly
from kvstrata.kvstore_service.redis_tier import value_key
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, free_port, sample_block
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import (
    CorruptFrameError,
    DeadlineError,
    DrainingError,
    InvalidRequestError,
    LimitError,
    UnavailableError,
)
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest

BASE, MID, FINE, EXACT = 1, 2, 3, 4
Block = tuple[BlockKey, dict[int, bytes]]


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as made:
        yield made


@pytest.fixture
async def client(store: LocalStore) -> AsyncIterator[StoreClient]:
    async with StoreClient(store.address) as made:
        yield made


def chain(scope: ScopeDigest, count: int, size: int = 4000) -> list[Block]:
    blocks: list[Block] = []
    for number in range(count):
        parent = blocks[-1][0].block_hash if blocks else None
        blocks.append(sample_block(scope, number, strata={BASE: size, MID: size}, parent=parent))
    return blocks


async def fetch(
    client: StoreClient, scope: ScopeDigest, blocks: list[Block], strata: list[int], **options: int
) -> list[FetchedStratum]:
    hashes = [key.block_hash for key, _ in blocks]
    return [got async for got in client.get(scope, hashes, strata, **options)]  # type: ignore[arg-type]


async def test_put_lookup_get_in_order_with_the_same_bytes(
    client: StoreClient, scope: ScopeDigest
) -> None:
    blocks = chain(scope, 9)
    outcomes = await client.put(blocks)
    assert [(o.key, o.outcome, o.tiers) for o in outcomes] == [
        (key, "committed", ("dram",)) for key, _ in blocks
    ]
    hashes = [key.block_hash for key, _ in blocks]
    found = await client.lookup(scope, [*hashes, BlockHash(b"?" * 16)])
    assert len(found.blocks) == 9
    assert found.blocks[0].strata == (BASE, MID)
    assert found.blocks[0].num_bytes == sum(map(len, blocks[0][1].values()))
    got = await fetch(client, scope, blocks, [MID, BASE])
    assert [(g.index, g.stratum) for g in got] == [(i, s) for i in range(9) for s in (MID, BASE)]
    for g in got:
        assert g.frame is not None
        assert bytes(g.frame.payload) == blocks[g.index][1][g.stratum]
        g.frame.verify()


async def test_large_frames_travel_in_pieces(client: StoreClient, scope: ScopeDigest) -> None:
    block = sample_block(scope, strata={BASE: 5_000_000, MID: 1000}, num_layers=8)
    assert [o.outcome for o in await client.put([block])] == ["committed"]
    got = await fetch(client, scope, [block], [BASE, MID])
    assert [g.num_bytes for g in got] == [len(f) for f in block[1].values()]
    assert got[0].frame is not None
    got[0].frame.verify()


@pytest.mark.parametrize("layers", [(0, 1), (2, 5), (7, 8), (0, 8), (7, 99)])
async def test_a_range_of_layers_brings_the_head_and_those_layers_only(
    client: StoreClient, scope: ScopeDigest, layers: tuple[int, int]
) -> None:
    block = sample_block(scope, strata={BASE: 4_000_000}, num_layers=8)
    await client.put([block])
    hashes = [block[0].block_hash]
    (got,) = [g async for g in client.get(scope, hashes, [BASE], layers=layers)]
    assert got.frame is not None
    held = range(layers[0], min(layers[1], 8))
    assert list(got.frame.segments()) == list(held)
    assert got.num_bytes < 500_000 * len(held) + 2000


async def test_layers_beyond_the_last_bring_the_head_alone(
    client: StoreClient, scope: ScopeDigest
) -> None:
    block = sample_block(scope)
    await client.put([block])
    (got,) = [g async for g in client.get(scope, [block[0].block_hash], [BASE], layers=(9, 12))]
    assert got.frame is not None
    assert got.frame.segments() == {}


async def test_misses_carry_their_reason(client: StoreClient, scope: ScopeDigest) -> None:
    blocks = chain(scope, 2)
    await client.put(blocks[:1])
    got = await fetch(client, scope, blocks, [BASE, EXACT])
    assert [(g.miss, g.frame is None) for g in got] == [
        *(("", False), ("absent", True), ("absent", True), ("absent", True))
    ]


async def test_a_rejected_block_does_not_stop_the_others(
    client: StoreClient, scope: ScopeDigest
) -> None:
    blocks = chain(scope, 3)
    torn = bytearray(blocks[1][1][BASE])
    torn[-1] ^= 1
    blocks[1][1][BASE] = bytes(torn)
    outcomes = await client.put(blocks)
    assert [o.outcome for o in outcomes] == ["committed", "rejected", "committed"]
    assert outcomes[1].reason.startswith("corrupt")


async def test_an_asynchronous_source_of_blocks_is_taken_too(
    client: StoreClient, scope: ScopeDigest
) -> None:
    async def source() -> AsyncIterator[tuple[BlockKey, Mapping[int, bytes]]]:
        for block in chain(scope, 3):
            await asyncio.sleep(0)
            yield block

    assert [o.outcome for o in await client.put(source())] == ["committed"] * 3
    assert await client.put([]) == []


async def test_an_error_of_the_source_is_raised_as_it_is(
    client: StoreClient, scope: ScopeDigest
) -> None:
    def source() -> object:
        yield chain(scope, 1)[0]
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        await client.put(source())  # type: ignore[arg-type]
    assert len((await client.lookup(scope, [chain(scope, 1)[0][0].block_hash])).blocks) <= 1


async def test_pin_unpin_delete(client: StoreClient, scope: ScopeDigest) -> None:
    blocks = chain(scope, 2)
    await client.put(blocks[:1])
    keys = [key for key, _ in blocks]
    assert await client.pin(keys, 60) == keys[1:]
    await client.unpin(keys)
    assert await client.delete(keys) == 1
    assert await client.delete(keys) == 0


async def test_a_waiting_get_is_served_by_a_later_put(
    store: LocalStore, client: StoreClient, scope: ScopeDigest
) -> None:
    blocks = chain(scope, 3)
    waiting = asyncio.create_task(fetch(client, scope, blocks, [BASE], wait_ms=5000))
    await asyncio.sleep(0.05)
    async with StoreClient(store.address) as writer:
        await writer.put(blocks)
    assert [g.miss for g in await waiting] == ["", "", ""]


HALF_A_BLOCK = """
import asyncio, sys
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos.identity import ScopeDigest

async def source():
    scope = ScopeDigest(bytes.fromhex(sys.argv[2]))
    yield sample_block(scope, 0)
    key, frames = sample_block(scope, 1, strata={1: 1_000_000})
    class Half(dict):
        def values(self):
            yield self[1][:500_000]
    yield key, Half(frames)
    print("half", flush=True)
    await asyncio.sleep(60)

async def main():
    await StoreClient(sys.argv[1], 60).put(source())

asyncio.run(main())
"""


async def test_a_client_killed_inside_a_block_leaves_nothing_and_wakes_waiters(
    store: LocalStore, client: StoreClient, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, 0), sample_block(scope, 1, strata={BASE: 1_000_000})]
    writer = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", HALF_A_BLOCK, store.address, scope.hex()),
        stdout=asyncio.subprocess.PIPE,
    )
    assert writer.stdout is not None
    assert await writer.stdout.readline() == b"half\n"
    while not store.running.workload.in_flight_puts:
        await asyncio.sleep(0.01)
    waiting = asyncio.create_task(fetch(client, scope, blocks[1:], [BASE], wait_ms=8000))
    await asyncio.sleep(0.1)
    writer.kill()
    await writer.wait()
    assert [g.miss for g in await waiting] == ["writer_gone"]
    found = await client.lookup(scope, [key.block_hash for key, _ in blocks])
    assert len(found.blocks) == 1
    assert store.running.workload.in_flight_puts == 0
    await store.running.store.dram.check_integrity()


async def test_limits_are_named_and_the_service_goes_on(scope: ScopeDigest) -> None:
    limits = StoreLimits(max_block_bytes=100_000, max_hashes=4, max_in_flight_bytes=100_000)
    async with (
        LocalStore(StoreConfig(dram_bytes=1 << 20, limits=limits)) as store,
        StoreClient(store.address) as client,
    ):
        with pytest.raises(LimitError, match="exceeds the limit of 100000") as caught:
            await client.put([sample_block(scope, strata={BASE: 200_000})])
        assert caught.value.remedy
        with pytest.raises(LimitError):
            await client.lookup(scope, [BlockHash(b"h" * 16)] * 5)
        with pytest.raises(InvalidRequestError):
            await client.lookup(ScopeDigest(b"short"), [BlockHash(b"h" * 16)])
        with pytest.raises(InvalidRequestError):
            await fetch(client, scope, [], [])
        with pytest.raises(InvalidRequestError):
            await client.pin([], 0)
        # Each of these fills the whole budget: they take turns.
        blocks = [sample_block(scope, n, strata={BASE: 60_000}) for n in range(6)]
        puts = (client.put([block]) for block in blocks)
        assert all(o[0].outcome == "committed" for o in await asyncio.gather(*puts))


async def test_an_idle_writer_is_ended(scope: ScopeDigest) -> None:
    limits = StoreLimits(put_idle_s=0.1)
    async with (
        LocalStore(StoreConfig(limits=limits)) as store,
        StoreClient(store.address) as client,
    ):
        key, frames = sample_block(scope)

        class Hesitant(dict[int, bytes]):
            def values(self) -> object:  # type: ignore[override]
                yield self[BASE][:10]

        with pytest.raises((DeadlineError, InvalidRequestError)):
            await client.put([(key, Hesitant(frames))])
        assert (await client.lookup(scope, [key.block_hash])).blocks == ()


async def test_errors_of_the_way_come_out_of_the_tree(scope: ScopeDigest) -> None:
    async with StoreClient(f"127.0.0.1:{free_port()}", timeout_s=1) as client:
        with pytest.raises((UnavailableError, DeadlineError)):
            await client.lookup(scope, [])
        with pytest.raises((UnavailableError, DeadlineError)):
            await client.put([sample_block(scope)])
        with pytest.raises((UnavailableError, DeadlineError)):
            await fetch(client, scope, [sample_block(scope)], [BASE])


async def test_a_draining_store_refuses_new_work_and_ends_waits(
    store: LocalStore, client: StoreClient, scope: ScopeDigest
) -> None:
    block = sample_block(scope)
    waiting = asyncio.create_task(fetch(client, scope, [block], [BASE], wait_ms=5000))
    await asyncio.sleep(0.05)
    workload = store.running.workload
    workload.is_draining = True
    store.running.store.arrivals.drain()
    assert [g.miss for g in await waiting] == ["draining"]
    with pytest.raises(DrainingError):
        await client.put([block])
    assert await workload.drain(1)


async def test_reading_stops_when_the_reader_does(
    store: LocalStore, client: StoreClient, scope: ScopeDigest
) -> None:
    blocks = chain(scope, 20, 200_000)
    await client.put(blocks)
    hashes = [key.block_hash for key, _ in blocks]
    async with contextlib.aclosing(client.get(scope, hashes, [BASE])) as stream:
        async for _ in stream:
            break
    for _ in range(100):
        if not store.running.workload.in_flight:
            break
        await asyncio.sleep(0.01)
    assert store.running.workload.in_flight == 0


async def test_a_corrupt_byte_in_redis_is_a_counted_miss_and_heals(
    redis: RedisServer, scope: ScopeDigest
) -> None:
    blocks = chain(scope, 1)
    key = blocks[0][0]
    async with LocalStore(redis_url=redis.url) as first, StoreClient(first.address) as client:
        assert (await client.put(blocks))[0].tiers == ("dram", "redis")
    direct = Redis.from_url(redis.url)
    await direct.setrange(value_key(key, BASE), 3000, b"\xff\x00\xff")
    async with LocalStore(redis_url=redis.url) as second, StoreClient(second.address) as client:
        (got,) = await fetch(client, scope, blocks, [BASE])
        assert got.miss == "corrupt"
        counters = second.running.store.counters
        assert counters.get("corrupt_total", tier="redis") == 1
        assert not await direct.exists(value_key(key, BASE))
        assert (await client.put(blocks))[0].outcome == "committed"
        (got,) = await fetch(client, scope, blocks, [BASE])
        assert got.miss == ""
        await second.running.store.tiers[1].check_integrity()
    await direct.aclose()


async def test_without_redis_dram_serves_lookup_says_degraded_and_it_recovers(
    own_redis: RedisServer, scope: ScopeDigest
) -> None:
    blocks = chain(scope, 2)
    hashes = [key.block_hash for key, _ in blocks]
    async with LocalStore(redis_url=own_redis.url) as store, StoreClient(store.address) as client:
        await client.put(blocks[:1])
        own_redis.kill()
        found = await client.lookup(scope, hashes)
        assert (len(found.blocks), found.degraded) == (1, True)
        got = await fetch(client, scope, blocks, [BASE])
        assert [g.miss for g in got] == ["", "tier_unavailable"]
        (outcome,) = await client.put(blocks[1:])
        assert (outcome.outcome, outcome.tiers) == ("committed", ("dram",))
        assert outcome.reason.startswith("redis:")
        assert store.running.store.counters.get("tier_errors_total", tier="redis") >= 3
        own_redis.restart()
        for _ in range(200):
            (outcome,) = await client.put(blocks[1:])
            if "redis" in outcome.tiers:
                break
            await asyncio.sleep(0.02)
        assert outcome.tiers == ("dram", "redis")
        assert not (await client.lookup(scope, hashes)).degraded


async def test_two_stores_share_blocks_over_redis(redis: RedisServer, scope: ScopeDigest) -> None:
    blocks = chain(scope, 4)
    async with (
        LocalStore(redis_url=redis.url) as first,
        LocalStore(redis_url=redis.url) as second,
        StoreClient(first.address) as writer,
        StoreClient(second.address) as reader,
    ):
        waiting = asyncio.create_task(fetch(reader, scope, blocks, [BASE, MID], wait_ms=5000))
        await asyncio.sleep(0.05)
        await writer.put(blocks)
        assert {(g.miss, g.tier) for g in await waiting} == {("", "redis")}
        got = await fetch(reader, scope, blocks, [BASE, MID])
        assert {g.tier for g in got} == {"dram"}


def test_an_assembly_takes_no_more_than_was_announced() -> None:
    with pytest.raises(CorruptFrameError):
        FrameAssembly(1 << 40, 1 << 20)
    with pytest.raises(CorruptFrameError):
        FrameAssembly(0, 1 << 20)
    assembly = FrameAssembly(100, 1 << 20)
    assembly.add(0, bytes(60))
    for offset, size in ((60, 41), (10, 5)):
        with pytest.raises(CorruptFrameError):
            assembly.add(offset, bytes(size))


def test_a_block_that_was_not_asked_for_is_refused(scope: ScopeDigest) -> None:
    assembly = GetAssembly(scope, [BlockHash(b"h" * 16)], 1 << 20)
    stray = pb.Piece(index=1, frame_bytes=9, length=9, last=True)
    with pytest.raises(CorruptFrameError, match="block 1 of 1"):
        list(assembly.add(GetPart([stray], [bytes(9)])))


async def test_a_client_tries_again_soon_however_long_the_store_was_away() -> None:
    """gRPC's own pauses grow to two minutes: nine attempts would take more than one."""
    attempts = 0
    enough = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 9:
            enough.set()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, StoreClient(f"127.0.0.1:{port}", timeout_s=60) as client:

        async def ask() -> None:
            while not enough.is_set():
                with contextlib.suppress(UnavailableError):
                    await client.lookup(ScopeDigest(b"s" * 16), [])
                await asyncio.sleep(0.05)

        async with asyncio.timeout(40):
            await asyncio.gather(ask(), enough.wait())
