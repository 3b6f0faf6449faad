"""What Redis, an operator or another process may do to the shared tier, and how it goes on."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from kvstrata.kvstore_service import redis_scripts as scripts
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_tier import RedisTier, value_key
from kvstrata.kvstore_service.redis_url import mask_url
from kvstrata.kvstore_service.testing import RedisServer
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import CapacityError, ConfigurationError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest


def key(number: int) -> BlockKey:
    return BlockKey(ScopeDigest(b"s" * 16), BlockHash(number.to_bytes(16, "big")))


def make_tier(
    url: str, capacity_bytes: int = 1000, ttl_s: float = 60, timeout_s: float = 10
) -> RedisTier:
    connection = RedisConnection(url, timeout_s=timeout_s, probe_s=0.05)
    return RedisTier(
        connection, capacity_bytes=capacity_bytes, ttl_s=ttl_s, max_stratum_bytes=1 << 20
    )


@pytest.fixture
async def tier(redis: RedisServer) -> AsyncIterator[RedisTier]:
    made = make_tier(redis.url)
    yield made
    await made.close()


@pytest.fixture
async def other(redis: RedisServer) -> AsyncIterator[RedisTier]:
    """The same tier in another process."""
    made = make_tier(redis.url)
    yield made
    await made.close()


@pytest.fixture
async def direct(redis: RedisServer) -> AsyncIterator[Any]:
    client = Redis.from_url(redis.url)
    yield client
    await client.aclose()


async def test_every_value_is_one_tagged_key_with_a_time_to_live(
    tier: RedisTier, direct: Any
) -> None:
    await tier.put(key(1), {1: b"base", 2: b"mid"})
    name = f"kvs:{{{key(1).encode()}}}:base"
    assert value_key(key(1), 1) == name
    assert await direct.get(name) == b"base"
    values = [n async for n in direct.scan_iter("kvs:{*.*}:*")]
    assert len(values) == 2
    assert all([0 < await direct.pttl(n) <= 60_000 for n in values])


async def test_a_read_renews_the_time_to_live_of_all_strata(tier: RedisTier, direct: Any) -> None:
    await tier.put(key(1), {1: b"base", 2: b"mid"})
    await direct.pexpire(value_key(key(1), 2), 1000)
    await tier.get(key(1), [1])
    assert await direct.pttl(value_key(key(1), 2)) > 50_000


async def test_a_value_that_redis_lost_is_a_miss_and_leaves_the_accounting(
    tier: RedisTier, direct: Any
) -> None:
    await tier.put(key(1), {1: bytes(100), 2: bytes(50)})
    await direct.delete(value_key(key(1), 2))
    assert await tier.get(key(1), [1, 2]) == {1: bytes(100)}
    await tier.check_integrity()
    await direct.delete(value_key(key(1), 1))
    assert await tier.contains([key(1)]) == [None]
    await tier.check_integrity()


async def test_lost_accounting_is_rebuilt_from_the_values(tier: RedisTier, direct: Any) -> None:
    await tier.put(key(1), {1: bytes(100)})
    await direct.delete(*scripts.INDEX_KEYS)
    assert await tier.contains([key(1)]) == [{1: 100}]
    await tier.check_integrity()


async def test_a_lost_order_of_use_still_allows_eviction(tier: RedisTier, direct: Any) -> None:
    await tier.put(key(1), {1: bytes(900)})
    await direct.delete(scripts.ORDER_KEY)
    assert await tier.put(key(2), {1: bytes(900)}) == [key(1)]
    await tier.check_integrity()


async def test_expired_blocks_leave_the_accounting(redis: RedisServer) -> None:
    tier = make_tier(redis.url, ttl_s=0.05)
    await tier.put(key(1), {1: bytes(100)})
    await asyncio.sleep(0.1)
    usage = await tier.usage()
    assert (usage.blocks, usage.num_bytes) == (0, 0)
    await tier.close()


def count_uses(tier: RedisTier) -> list[None]:
    """Return a list that grows by each command or pipeline that the tier sends from now on."""
    uses: list[None] = []
    use = tier.connection.use

    def counted() -> Any:
        uses.append(None)
        return use()

    tier.connection.use = counted  # type: ignore[method-assign]
    return uses


async def test_reads_that_come_together_share_round_trips(tier: RedisTier, direct: Any) -> None:
    for n in range(9):
        await tier.put(key(n), {1: b"%d" % n, 2: b"mid"})
        await direct.pexpire(value_key(key(n), 1), 1000)
    await tier.get(key(8), [1])  # scripts are known
    uses = count_uses(tier)
    found = await asyncio.gather(*(tier.get(key(n), [1, 3, 2]) for n in range(9)))
    assert found == [{1: b"%d" % n, 2: b"mid"} for n in range(9)]
    assert len(uses) <= 3
    assert all([await direct.pttl(value_key(key(n), 1)) > 50_000 for n in range(9)])


async def test_scripts_that_redis_lost_are_sent_again_by_reads_and_writes(
    tier: RedisTier, direct: Any
) -> None:
    await tier.put(key(1), {1: b"one"})
    await tier.put(key(2), {1: b"two"})
    await direct.pexpire(value_key(key(1), 1), 1000)
    await direct.script_flush()
    assert await tier.get(key(1), [1]) == {1: b"one"}
    assert await direct.pttl(value_key(key(1), 1)) > 50_000
    assert await tier.keys(9) == [key(1), key(2)]
    await direct.script_flush()
    await tier.put(key(1), {1: b"longer"})
    await tier.check_integrity()


async def test_a_reader_that_gives_up_takes_nothing_from_others(tier: RedisTier) -> None:
    for n in range(3):
        await tier.put(key(n), {1: b"%d" % n})
    reads = [asyncio.create_task(tier.get(key(n), [1])) for n in range(3)]
    await asyncio.sleep(0)
    reads[1].cancel()
    assert [await reads[0], await reads[2]] == [{1: b"0"}, {1: b"2"}]
    reads = [asyncio.create_task(tier.get(key(n), [1])) for n in range(3)]
    for _ in range(3):
        await asyncio.sleep(0)
    reads[1].cancel()
    assert [await reads[0], await reads[2]] == [{1: b"0"}, {1: b"2"}]


async def test_a_redis_that_dies_fails_all_reads_of_a_round_trip() -> None:
    with RedisServer() as server:
        tier = make_tier(server.url)
        await tier.put(key(1), {1: b"one"})
    reads = [tier.get(key(n), [1]) for n in range(3)]
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert [type(each) for each in found] == [TierUnavailableError] * 3
    await tier.close()


async def test_two_processes_share_blocks_pins_and_the_bound(
    tier: RedisTier, other: RedisTier
) -> None:
    await tier.put(key(1), {1: bytes(600)})
    assert await other.get(key(1), [1]) == {1: bytes(600)}
    await other.pin([key(1)], 60)
    with pytest.raises(CapacityError):
        await tier.put(key(2), {1: bytes(600)})
    await other.unpin([key(1)])
    await asyncio.gather(*((tier, other)[n % 2].put(key(n), {1: bytes(90)}) for n in range(40)))
    await other.check_integrity()


async def test_a_pin_in_redis_ends_by_itself(tier: RedisTier) -> None:
    await tier.put(key(1), {1: bytes(600)})
    await tier.pin([key(1)], 0.05)
    await asyncio.sleep(0.1)
    assert await tier.put(key(2), {1: bytes(600)}) == [key(1)]


async def test_redis_out_of_memory_is_a_capacity_error_and_reads_go_on(
    tier: RedisTier, direct: Any
) -> None:
    await tier.put(key(1), {1: b"base"})
    await direct.config_set("maxmemory", 1)
    try:
        with pytest.raises(CapacityError):
            await tier.put(key(2), {1: bytes(10)})
        assert (await tier.contains([key(2)])) == [None]
    finally:
        await direct.config_set("maxmemory", 0)
    await tier.put(key(3), {1: bytes(10)})
    await tier.contains([key(2)])
    await tier.check_integrity()


async def test_a_dead_redis_is_noticed_soon_costs_nothing_after_and_recovers(
    own_redis: RedisServer,
) -> None:
    tier = make_tier(own_redis.url)
    await tier.put(key(1), {1: b"base"})
    own_redis.kill()
    began = time.monotonic()
    with pytest.raises(TierUnavailableError):
        await tier.get(key(1), [1])
    assert time.monotonic() - began < 1.5
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(TierUnavailableError):
            await tier.get(key(1), [1])
    assert time.monotonic() - began < 0.2
    assert not (await tier.usage()).healthy
    own_redis.restart()
    await eventually_healthy(tier)
    await tier.put(key(1), {1: b"base"})
    assert await tier.get(key(1), [1]) == {1: b"base"}
    await tier.close()


async def test_a_hanging_redis_is_noticed_within_its_time_limit(own_redis: RedisServer) -> None:
    tier = make_tier(own_redis.url, timeout_s=1)
    await tier.put(key(1), {1: b"base"})
    own_redis.pause()
    began = time.monotonic()
    with pytest.raises(TierUnavailableError):
        await tier.contains([key(1)])
    assert 0.9 < time.monotonic() - began < 5
    own_redis.resume()
    await eventually_healthy(tier)
    assert await tier.get(key(1), [1]) == {1: b"base"}
    await tier.close()


async def eventually_healthy(tier: RedisTier) -> None:
    deadline = time.monotonic() + 5
    while not (await tier.usage()).healthy:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_more_readers_than_connections_all_get_an_answer(redis: RedisServer) -> None:
    connection = RedisConnection(redis.url, max_connections=2)
    tier = RedisTier(connection, capacity_bytes=10_000, ttl_s=60, max_stratum_bytes=1 << 20)
    await tier.put(key(1), {1: b"base"})
    found = await asyncio.gather(*(tier.get(key(1), [1]) for _ in range(50)))
    assert found == [{1: b"base"}] * 50
    await tier.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret@127.0.0.1:1/0",
        "redis://user:s3cret@127.0.0.1:1",
        "redis://:s3c/s3cret@127.0.0.1:1",
        "redis://:s3?s3cret@127.0.0.1:1",
        "redis://127.0.0.1:1/0?password=s3cret",
        "redis://127.0.0.1:1/0?password=a@s3cret",
        "redis://:s3cret:1:2@[::1",
        "http://:s3cret@host",
        "s3cret",
    ],
)
async def test_a_password_is_in_no_message_and_no_log(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert "s3cret" not in mask_url(url)
    with pytest.raises(ConfigurationError) as caught:
        await connect(url)
    assert (
        "s3cret"
        not in f"{caught.value}{caught.value.metadata}{caught.value.__cause__}{caplog.text}"
    )
    assert caught.value.remedy


async def connect(url: str) -> None:
    connection = RedisConnection(url, timeout_s=0.3)
    try:
        await connection.check()
    finally:
        await connection.close()


async def test_a_wrong_password_is_told_without_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with RedisServer(password="right") as server:
        connection = RedisConnection(server.url.replace("right", "wr0ng"))
        with pytest.raises(ConfigurationError, match="AuthenticationError"):
            await connection.check()
        await connection.close()
        good = RedisConnection(server.url)
        await good.check()
        await good.close()
    assert "wr0ng" not in caplog.text
