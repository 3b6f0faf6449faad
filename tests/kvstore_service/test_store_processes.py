"""Several store processes on one Redis: what one does the others know, whatever Redis loses."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from kvstrata.kvstore_service import redis_deletions, write_behind
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_deletions import RedisDeletions
from kvstrata.kvstore_service.redis_tier import RedisTier
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.identity import BlockKey, ScopeDigest

BASE, MID = 1, 2
STRATA = {BASE: 4000, MID: 2000}
SOON_S = 30.0
WITHIN_S = 0.1
"""What the contract promises; tests on a busy machine measure it, and bear ten times as much."""

Block = tuple[BlockKey, dict[int, bytes]]


def prompt(scope: ScopeDigest, first: int, count: int) -> list[Block]:
    blocks: list[Block] = []
    for number in range(first, first + count):
        parent = blocks[-1][0].block_hash if blocks else None
        blocks.append(sample_block(scope, number, strata=STRATA, parent=parent))
    return blocks


def config_of(redis: RedisServer, **more: Any) -> StoreConfig:
    return StoreConfig(
        redis_url=redis.url, redis_bytes=64 << 20, redis_timeout_s=2.0, redis_probe_s=0.05, **more
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "_RETRY_S", 0.02)


class Pair:
    """Two store processes, and a client of each."""

    def __init__(self, stores: list[LocalStore], clients: list[StoreClient]) -> None:
        self.stores = stores
        self.one, self.two = clients

    async def until(self, condition: Any) -> float:
        """Wait for a condition and return the seconds that it took."""
        begin = time.monotonic()
        async with asyncio.timeout(SOON_S):
            while not await condition():
                await asyncio.sleep(0.002)
        return time.monotonic() - begin


@pytest.fixture
async def pair(own_redis: RedisServer) -> AsyncIterator[Pair]:
    async with (
        LocalStore(config_of(own_redis)) as one,
        LocalStore(config_of(own_redis)) as two,
        StoreClient(one.address, timeout_s=60) as client,
        StoreClient(two.address, timeout_s=60) as other,
    ):
        yield Pair([one, two], [client, other])


async def read(client: StoreClient, blocks: list[Block], wait_ms: int = 0) -> list[str]:
    """Return the reason of each missed stratum, "" for those that came and are what was put."""
    hashes = [key.block_hash for key, _ in blocks]
    found = []
    async for piece in client.get(blocks[0][0].scope, hashes, [BASE, MID], wait_ms=wait_ms):
        if piece.frame is not None:
            assert bytes(piece.frame.payload) == blocks[piece.index][1][piece.stratum]
        found.append(piece.miss)
    return found


async def length(client: StoreClient, blocks: list[Block]) -> int:
    hashes = [key.block_hash for key, _ in blocks]
    return len((await client.lookup(blocks[0][0].scope, hashes)).blocks)


async def test_what_one_commits_is_a_hit_in_the_other_at_once(
    pair: Pair, scope: ScopeDigest
) -> None:
    for first in range(0, 100, 10):
        blocks = prompt(scope, first, 10)
        assert await length(pair.two, blocks) == 0  # that it was absent is not remembered
        await pair.one.put(blocks)
        begin = time.monotonic()
        assert await length(pair.two, blocks) == 10
        assert await read(pair.two, blocks) == [""] * 20
        assert time.monotonic() - begin < 10 * WITHIN_S


async def test_a_reader_that_waits_gets_what_the_other_commits(
    pair: Pair, scope: ScopeDigest
) -> None:
    blocks = prompt(scope, 0, 5)
    waiting = asyncio.create_task(read(pair.two, blocks, wait_ms=20_000))
    async with asyncio.timeout(SOON_S):
        while not pair.stores[1].running.store.arrivals.waited_for():
            await asyncio.sleep(0.005)
    await pair.one.put(blocks)
    begin = time.monotonic()
    assert await waiting == [""] * 10
    assert time.monotonic() - begin < 10 * WITHIN_S


async def test_what_one_deletes_is_gone_from_the_memory_of_the_other(
    pair: Pair, scope: ScopeDigest
) -> None:
    blocks = prompt(scope, 0, 8)
    await pair.one.put(blocks)
    assert await read(pair.two, blocks) == [""] * 16  # now in the memory of both
    await pair.two.pin([key for key, _ in blocks], 60)
    await pair.one.delete([key for key, _ in blocks[4:]])

    async def is_gone() -> bool:
        return await length(pair.two, blocks) == 4

    assert await pair.until(is_gone) < 10 * WITHIN_S
    assert await read(pair.two, blocks[4:]) == ["absent"] * 8
    assert await read(pair.two, blocks[:4]) == [""] * 8
    counters = [store.running.store.counters for store in pair.stores]
    assert [c.get("deletions_total", outcome="followed") for c in counters] == [0, 4]
    await pair.one.put(blocks)  # and they may come again
    assert await length(pair.two, blocks) == 8


async def test_a_process_that_had_no_connection_learns_what_was_deleted_meanwhile(
    own_redis: RedisServer, scope: ScopeDigest
) -> None:
    blocks = prompt(scope, 0, 4)
    async with (
        LocalStore(config_of(own_redis)) as one,
        LocalStore(config_of(own_redis)) as two,
        StoreClient(one.address, timeout_s=60) as client,
        StoreClient(two.address, timeout_s=60) as other,
    ):
        await client.put(blocks)
        assert await read(other, blocks) == [""] * 8
        (tier,) = [t for t in two.running.store.tiers if t.name == "redis"]
        redis: Any = tier.inner  # type: ignore[attr-defined]
        assert isinstance(redis, RedisTier)
        redis.connection._detail = "cut off"  # as if its network had failed
        await client.delete([blocks[0][0]])
        await asyncio.sleep(0.3)
        assert await length(other, blocks) == 4  # it cannot know
        redis.connection._detail = ""
        async with asyncio.timeout(SOON_S):
            while await length(other, blocks):
                await asyncio.sleep(0.01)
        assert await read(other, blocks[1:]) == [""] * 6


async def test_deletions_that_were_cut_off_before_they_were_read_are_counted(
    pair: Pair, own_redis: RedisServer, scope: ScopeDigest
) -> None:
    from redis.asyncio import Redis

    counters = pair.stores[1].running.store.counters
    await pair.one.delete([prompt(scope, 0, 1)[0][0]])

    async def has_followed() -> bool:
        return counters.get("deletions_total", outcome="followed") > 0

    await pair.until(has_followed)
    async with Redis.from_url(own_redis.url) as direct:
        await direct.delete(redis_deletions.STREAM_KEY)
    await pair.one.delete([prompt(scope, 1, 1)[0][0]])

    async def has_missed() -> bool:
        return counters.get("deletions_total", outcome="missed") > 0

    await pair.until(has_missed)


async def test_entries_of_the_stream_that_are_not_ours_change_nothing(
    pair: Pair, own_redis: RedisServer, scope: ScopeDigest
) -> None:
    from redis.asyncio import Redis

    blocks = prompt(scope, 0, 2)
    await pair.one.put(blocks)
    async with Redis.from_url(own_redis.url) as direct:
        for fields in ({"keys": "no key"}, {"other": "x"}, {"keys": b"\xff\xfe"}):
            await direct.xadd(redis_deletions.STREAM_KEY, fields)  # type: ignore[arg-type]
    await pair.one.delete([blocks[1][0]])

    async def is_gone() -> bool:
        return await length(pair.two, blocks) == 1

    await pair.until(is_gone)


async def test_a_value_of_another_type_in_place_of_the_stream_costs_deletions_and_nothing_else(
    pair: Pair, own_redis: RedisServer, scope: ScopeDigest, caplog: pytest.LogCaptureFixture
) -> None:
    from redis.asyncio import Redis

    blocks = prompt(scope, 0, 2)
    counters = [store.running.store.counters for store in pair.stores]
    await pair.one.put(blocks[:1])
    assert await length(pair.two, blocks[:1]) == 1
    async with Redis.from_url(own_redis.url) as direct:
        await direct.delete(redis_deletions.STREAM_KEY)
        await direct.set(redis_deletions.STREAM_KEY, "taken")

        async def is_refused() -> bool:
            return all(c.get("deletions_total", outcome="missed") == 1 for c in counters)

        await pair.until(is_refused)
        await pair.one.delete([blocks[0][0]])
        assert counters[0].get("deletions_total", outcome="untold") == 1
        for _ in range(20):  # of the pauses between two looks
            assert not (await pair.two.lookup(scope, [blocks[1][0].block_hash])).degraded
            await asyncio.sleep(0.01)
        await pair.one.put(blocks[1:])
        assert await read(pair.two, blocks[1:]) == [""] * 2
        assert [c.get("tier_errors_total") for c in counters] == [0, 0]
        assert [c.get("deletions_total", outcome="missed") for c in counters] == [1, 1]
        told = [r.what for r in caplog.records if "refuses the stream" in r.message]  # type: ignore[attr-defined]
        assert sorted(told) == ["follow", "follow", "tell"]
        await direct.delete(redis_deletions.STREAM_KEY)
    await pair.one.delete([blocks[1][0]])

    async def is_gone() -> bool:
        return await length(pair.two, blocks[1:]) == 0

    await pair.until(is_gone)


async def test_a_user_who_may_not_use_the_stream_may_use_the_tier(
    own_redis: RedisServer, scope: ScopeDigest
) -> None:
    from redis.asyncio import Redis

    async with Redis.from_url(own_redis.url) as direct:
        rules = ["on", ">secret", "~*", "+@all", "-xadd", "-xread", "-xrevrange"]
        await direct.execute_command("ACL", "SETUSER", "kv", *rules)
    url = own_redis.url.replace("redis://", "redis://kv:secret@")
    blocks = prompt(scope, 0, 2)
    async with (
        LocalStore(StoreConfig(redis_url=url, redis_probe_s=0.05)) as store,
        StoreClient(store.address, timeout_s=60) as client,
    ):
        counters = store.running.store.counters
        async with asyncio.timeout(SOON_S):
            while counters.get("deletions_total", outcome="missed") < 1:
                await asyncio.sleep(0.01)
        await client.put(blocks)
        assert await client.delete([blocks[0][0]]) == 1
        assert not (await client.lookup(scope, [blocks[1][0].block_hash])).degraded
        assert counters.get("deletions_total", outcome="untold") == 1
        assert counters.get("tier_errors_total") == 0


async def test_a_deletion_that_cannot_be_followed_is_counted_and_costs_no_other(
    own_redis: RedisServer, scope: ScopeDigest
) -> None:
    keys = [sample_block(scope, n)[0] for n in range(2 * redis_deletions._READ_ENTRIES + 5)]
    connection = RedisConnection(own_redis.url, timeout_s=SOON_S)
    telling = RedisDeletions(connection)
    for key in keys:
        await telling.tell([key])
    following = RedisDeletions(connection, poll_s=300)  # there is no pause after a full batch
    following._read_up_to = "0-0"
    missed, followed = [], []
    following.on_missed = lambda: missed.append(followed[-1])

    async def apply(told: Sequence[BlockKey]) -> None:
        followed.extend(told)
        if told[0] in (keys[0], keys[70]):
            raise RuntimeError("no")

    following.follow(apply)
    async with asyncio.timeout(SOON_S):
        while len(followed) < len(keys):
            await asyncio.sleep(0.01)
    assert followed == keys
    assert missed == [keys[0], keys[70]]
    await following.close()
    await connection.close()


async def test_after_a_lost_connection_both_know_what_redis_has(
    pair: Pair, own_redis: RedisServer, scope: ScopeDigest
) -> None:
    before, after = prompt(scope, 0, 4), prompt(scope, 100, 4)
    await pair.one.put(before)
    assert await length(pair.two, before) == 4
    own_redis.kill()
    assert await length(pair.one, before) == 4  # its own memory
    found = await pair.two.lookup(scope, [key.block_hash for key, _ in before])
    assert (found.blocks, found.degraded) == ((), True)
    assert set(await read(pair.two, before)) == {"tier_unavailable"}
    own_redis.restart()  # empty

    async def is_back() -> bool:
        return not (await pair.two.lookup(scope, [before[0][0].block_hash])).degraded

    await pair.until(is_back)
    assert await read(pair.two, before) == ["absent"] * 8
    await pair.two.put(after)

    async def is_a_hit() -> bool:
        return await length(pair.one, after) == 4

    assert await pair.until(is_a_hit) < 10 * WITHIN_S
    for store in pair.stores:
        await store.running.store.tiers[1].check_integrity()


@pytest.mark.parametrize(
    "policy", ["allkeys-lru", "allkeys-random", "volatile-lru", "volatile-ttl"]
)
async def test_an_operators_own_eviction_policy_costs_hits_and_nothing_else(
    policy: str, scope: ScopeDigest
) -> None:
    options = ["--maxmemory", "8mb", "--maxmemory-policy", policy, "--maxmemory-samples", "3"]
    strata = {BASE: 20_000, MID: 10_000}
    everything = [sample_block(scope, n, strata=strata) for n in range(600)]  # 18 MB
    with RedisServer(options=options) as redis:
        small = {"dram_bytes": 100_000}
        async with (
            LocalStore(config_of(redis, **small)) as one,
            LocalStore(config_of(redis, **small)) as two,
            StoreClient(one.address, timeout_s=60) as client,
            StoreClient(two.address, timeout_s=60) as other,
        ):
            reasons: set[str] = set()

            async def write(source: random.Random) -> None:
                for first in range(0, 600, 20):
                    outcomes = await client.put(everything[first : first + 20])
                    assert {o.outcome for o in outcomes} <= {"committed", "exists"}
                    await asyncio.sleep(source.random() * 0.01)

            async def use(who: StoreClient, source: random.Random) -> None:
                for _ in range(60):
                    block = source.choice(everything)
                    told = await who.lookup(scope, [block[0].block_hash], lease_s=5)
                    got = await read(who, [block])
                    reasons.update(got)
                    assert not told.degraded

            await asyncio.gather(
                write(random.Random(0)),
                *(use(who, random.Random(n)) for n, who in enumerate([client, other] * 2)),
            )
            for store in (one, two):
                running = store.running.store
                assert running.counters.get("tier_errors_total") == 0
                assert running.counters.get("corrupt_total") == 0
            assert reasons <= {"", "absent", "evicted", "stale_encoding"}
            (tier,) = [t for t in one.running.store.tiers if t.name == "redis"]
            await tier.contains([key for key, _ in everything])  # looks at every block
            usage = await tier.usage()
            assert usage.healthy
            assert 0 < usage.num_bytes < 9 << 20


async def test_a_deletion_that_no_tier_answers_waits_and_is_bounded(
    scope: ScopeDigest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvstrata.kvstore_service.counters import Counters
    from kvstrata.kvstore_service.write_behind import WriteBehind
    from tests.kvstore_service.test_store import SlowTier

    class DownTier(SlowTier):
        async def delete(self, keys: Any) -> int:
            self._answer()
            return await super().delete(keys)

    monkeypatch.setattr(write_behind, "MAX_DELETIONS", 2)
    tier, counters = DownTier(), Counters()
    keys = [sample_block(scope, n)[0] for n in range(4)]
    for key in keys:
        await tier.put(key, {BASE: b"x"})
    tier.is_down = True

    async def write(_: Any, key: BlockKey, frames: Any) -> None:
        raise TierUnavailableError("unplugged")

    queue = WriteBehind(tier, write, counters, 100)
    assert [queue.submit_deletion(key) for key in keys[:3]] == [True, True, False]
    assert queue.submit(keys[3], {BASE: bytes(90)})
    assert queue.submit(keys[2], {BASE: bytes(90)})  # drops the block, no deletion
    await queue.forget([keys[2]])
    tier.is_down = False
    assert await queue.flush(SOON_S)
    assert [bool(s) for s in await tier.contains(keys)] == [False, False, True, True]
    names = {o: counters.get("written_behind_total", outcome=o) for o in ("deleted", "dropped")}
    assert names == {"deleted": 2, "dropped": 1}
    assert counters.get("written_behind_total", outcome="deletion_dropped") == 1
    await queue.close()
