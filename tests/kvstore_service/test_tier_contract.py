"""One suite for every tier: what ``Tier`` promises."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.object_service import ObjectService
from kvstrata.kvstore_service.object_tier import ObjectTier
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_tier import RedisTier
from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.kvstore_service.testing import RedisServer
from kvstrata.kvstore_service.tier import Tier
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from tests.kvstore_service.redis_servers import RedisClusterServers

CAPACITY = 1000


def key(number: int) -> BlockKey:
    return BlockKey(ScopeDigest(b"s" * 16), BlockHash(number.to_bytes(16, "big")))


REDIS = ["redis", "cluster", "redis-tls"]  # one server; three masters; TLS and a password
OTHERS = ["dram", "ssd", "object-folder", "object-s3"]


@pytest.fixture(params=[*OTHERS, *REDIS])
async def tier(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Tier]:
    made: Tier
    if request.param == "dram":
        made = DramTier(CAPACITY)
    elif request.param == "ssd":
        made = await SsdTier(
            str(tmp_path / "ssd"),
            capacity_bytes=CAPACITY,
            max_stratum_bytes=CAPACITY,
            allocation_bytes=1,
            fsync=False,
        ).open()
    elif request.param.startswith("object"):
        is_folder = request.param == "object-folder"
        url = tmp_path.as_uri() if is_folder else request.getfixturevalue("s3_url")
        made = await ObjectTier(
            ObjectService(url), capacity_bytes=CAPACITY, max_stratum_bytes=CAPACITY
        ).open()
    else:
        if request.param == "redis-tls":
            url = request.getfixturevalue("tls_url")
        else:
            server: RedisServer | RedisClusterServers = request.getfixturevalue(request.param)
            url = server.url
        made = RedisTier(
            RedisConnection(url),
            capacity_bytes=CAPACITY,
            ttl_s=60,
            max_stratum_bytes=CAPACITY,
        )
    yield made
    await made.check_integrity()
    await made.close()


async def test_put_then_get_returns_the_same_bytes(tier: Tier) -> None:
    await tier.put(key(1), {1: b"base\r\n\x00", 2: b"mid"})
    assert await tier.get(key(1), [1, 2, 4]) == {1: b"base\r\n\x00", 2: b"mid"}
    assert await tier.get(key(1), [2]) == {2: b"mid"}
    assert await tier.get(key(2), [1]) == {}


async def test_reading_many_blocks_returns_what_each_has_and_counts_as_uses(tier: Tier) -> None:
    for n in range(6):
        await tier.put(key(n), {1: b"base%d" % n, 2: b"mid%d" % n})
    await tier.drop(key(2), 2)
    wanted = [(key(2), [1, 2]), (key(9), [1]), (key(1), [2]), (key(0), [1, 4]), (key(2), [1])]
    found = [{1: b"base2"}, {}, {2: b"mid1"}, {1: b"base0"}, {1: b"base2"}]
    assert await tier.get_all(wanted) == found
    assert set((await tier.keys(9))[:3]) == {key(0), key(1), key(2)}
    assert await tier.get_all([]) == []


async def test_examining_returns_the_same_bytes_and_counts_as_no_use(tier: Tier) -> None:
    await tier.put(key(1), {1: b"base", 2: b"mid"})
    await tier.put(key(2), {1: b"other"})
    assert await tier.examine(key(1), [1, 2, 4]) == {1: b"base", 2: b"mid"}
    assert await tier.examine(key(1), [2]) == {2: b"mid"}
    assert await tier.examine(key(3), [1]) == {}
    assert await tier.keys(9) == [key(2), key(1)]


async def test_put_replaces_the_whole_block(tier: Tier) -> None:
    await tier.put(key(1), {1: b"a" * 10, 2: b"b" * 10})
    await tier.put(key(1), {4: b"c" * 30})
    assert await tier.contains([key(1)]) == [{4: 30}]
    assert await tier.get(key(1), [1, 2, 4]) == {4: b"c" * 30}
    assert (await tier.usage()).num_bytes == 30


async def test_contains_tells_sizes_and_absence_in_order(tier: Tier) -> None:
    await tier.put(key(1), {1: b"a" * 10, 2: b"b" * 20})
    assert await tier.contains([key(9), key(1), key(8)]) == [None, {1: 10, 2: 20}, None]
    assert await tier.contains([]) == []


async def test_the_least_recently_used_block_goes_first(tier: Tier) -> None:
    for number in range(4):
        await tier.put(key(number), {1: bytes(250)})
    await tier.get(key(0), [1])
    assert await tier.put(key(4), {1: bytes(400)}) == [key(1), key(2)]
    assert [bool(s) for s in await tier.contains([key(n) for n in range(5)])] == [
        *(True, False, False, True, True)
    ]
    assert (await tier.usage()).evictions == 2


async def test_a_block_beyond_the_capacity_is_refused_and_changes_nothing(tier: Tier) -> None:
    await tier.put(key(1), {1: bytes(500)})
    with pytest.raises(CapacityError):
        await tier.put(key(2), {1: bytes(CAPACITY + 1)})
    assert await tier.contains([key(1), key(2)]) == [{1: 500}, None]


async def test_pinned_blocks_are_exempt_until_unpinned(tier: Tier) -> None:
    await tier.put(key(1), {1: bytes(600)})
    assert await tier.pin([key(1), key(7)], 60) == [key(7)]
    with pytest.raises(CapacityError):
        await tier.put(key(2), {1: bytes(600)})
    await tier.unpin([key(1)])
    assert await tier.put(key(2), {1: bytes(600)}) == [key(1)]


async def test_leased_blocks_are_exempt_to_the_end_of_the_lease_whoever_unpins(tier: Tier) -> None:
    await tier.put(key(1), {1: bytes(400), 2: bytes(200)})
    assert await tier.lease([key(1), key(7)], 60) == [key(7)]
    assert await tier.lease([], 60) == []
    await tier.unpin([key(1)])
    with pytest.raises(CapacityError):
        await tier.put(key(2), {1: bytes(600)})
    assert await tier.contains([key(1)]) == [{1: 400, 2: 200}]
    await tier.delete([key(1)])
    await tier.put(key(1), {1: bytes(600)})
    assert await tier.lease([key(1)], 0.05) == []
    async with asyncio.timeout(30):
        while await tier.contains([key(1)]) != [None]:
            with contextlib.suppress(CapacityError):
                await tier.put(key(2), {1: bytes(600)})


async def test_delete_forgets_pinned_blocks_too_and_counts_what_was_there(tier: Tier) -> None:
    await tier.put(key(1), {1: b"x"})
    await tier.pin([key(1)], 60)
    assert await tier.delete([key(1), key(2)]) == 1
    assert await tier.delete([key(1)]) == 0
    assert await tier.contains([key(1)]) == [None]


async def test_drop_forgets_one_stratum(tier: Tier) -> None:
    await tier.put(key(1), {1: b"base", 2: b"mid"})
    await tier.drop(key(1), 2)
    assert await tier.contains([key(1)]) == [{1: 4}]
    await tier.drop(key(1), 1)
    await tier.drop(key(1), 1)
    assert await tier.contains([key(1)]) == [None]


async def test_keys_come_most_recently_used_first(tier: Tier) -> None:
    for number in range(3):
        await tier.put(key(number), {1: b"x"})
        await asyncio.sleep(0.005)
    await tier.get(key(0), [1])
    assert await tier.keys(2) == [key(0), key(2)]


@pytest.mark.parametrize("seed", range(3))
async def test_random_operations_agree_with_a_dict(
    tier: Tier, seed: int, request: pytest.FixtureRequest
) -> None:
    source = random.Random(seed)
    model: dict[BlockKey, dict[int, bytes]] = {}
    for _ in range(30 if "s3" in request.node.name else 120):
        chosen = key(source.randrange(8))
        action = source.choice(["put", "put", "get", "drop", "delete", "contains"])
        if action == "put":
            frames = {
                s: source.randbytes(source.randrange(1, 200))
                for s in source.sample((1, 2, 3, 4), 2)
            }
            for victim in await tier.put(chosen, frames):
                del model[victim]
            model[chosen] = frames
        elif action == "get":
            assert await tier.get(chosen, [1, 2, 3, 4]) == model.get(chosen, {})
        elif action == "drop":
            await tier.drop(chosen, 1)
            model.get(chosen, {}).pop(1, None)
            if not model.get(chosen):
                model.pop(chosen, None)
        elif action == "delete":
            assert await tier.delete([chosen]) == (model.pop(chosen, None) is not None)
        sizes = {k: {s: len(f) for s, f in frames.items()} for k, frames in model.items()}
        numbers = [key(n) for n in range(8)]
        assert await tier.contains(numbers) == [sizes.get(k) for k in numbers]
        await tier.check_integrity()
    assert (await tier.usage()).blocks == len(model)


async def test_the_bound_holds_under_churn(tier: Tier, request: pytest.FixtureRequest) -> None:
    source = random.Random(5)
    for number in range(40 if "s3" in request.node.name else 150):
        await tier.put(key(number), {1: bytes(source.randrange(1, 400))})
        assert (await tier.usage()).num_bytes <= CAPACITY
    await tier.check_integrity()
