"""Redis as operators run it: clusters, Sentinel groups, TLS and passwords."""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.kvstore_service.redis_client import parse_place
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_tier import RedisTier
from kvstrata.kvstore_service.redis_url import mask_url
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from tests.kvstore_service.redis_servers import (
    PASSWORD,
    QUOTED,
    RedisClusterServers,
    SentinelGroup,
    redis_cluster,
    sentinel_group,
)

# redis-py forgets to close connections of a cluster whose map it reads anew.
FORGOTTEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def key(number: int) -> BlockKey:
    return BlockKey(ScopeDigest(b"s" * 16), BlockHash(number.to_bytes(16, "big")))


def make_tier(url: str, timeout_s: float = 2) -> RedisTier:
    connection = RedisConnection(url, timeout_s=timeout_s, probe_s=0.05)
    return RedisTier(connection, capacity_bytes=4 << 20, ttl_s=60, max_stratum_bytes=1 << 20)


async def heal(tier: RedisTier, timeout_s: float = 30) -> None:
    """Wait until the tier answers again, by itself."""
    async with asyncio.timeout(timeout_s):
        while not (await tier.usage()).healthy:
            await asyncio.sleep(0.05)


@pytest.fixture(autouse=True)
def _forgotten_here() -> Iterator[None]:
    """Let what a test leaves open be found while its own filter holds, not in a later test."""
    yield
    gc.collect()


@pytest.fixture
def own_cluster() -> Iterator[RedisClusterServers]:
    with redis_cluster() as servers:
        yield servers


@pytest.fixture
def group(tmp_path: Path) -> Iterator[SentinelGroup]:
    with sentinel_group(tmp_path) as made:
        yield made


@FORGOTTEN
async def test_blocks_lie_on_every_master_of_a_cluster(own_cluster: RedisClusterServers) -> None:
    tier = make_tier(own_cluster.url)
    for number in range(12):
        await tier.put(key(number), {1: bytes(100), 2: bytes(100)})
    await tier.check_integrity()
    assert all(client.dbsize() for client in own_cluster.clients())
    assert [sizes or {} for sizes in await tier.contains([key(n) for n in range(12)])] == [
        {1: 100, 2: 100}
    ] * 12
    await tier.close()


@FORGOTTEN
async def test_a_lost_master_makes_the_tier_unavailable_until_it_is_back(
    own_cluster: RedisClusterServers,
) -> None:
    tier = make_tier(own_cluster.url)
    await tier.put(key(1), {1: b"base"})
    own_cluster.servers[0].pause()

    async def put_everywhere() -> None:
        for number in range(12):
            await tier.put(key(number), {1: b"base"})

    with pytest.raises(TierUnavailableError):
        await asyncio.wait_for(put_everywhere(), 60)
    usage = await tier.usage()
    assert (usage.healthy, bool(usage.detail)) == (False, True)
    own_cluster.servers[0].resume()
    await heal(tier)
    await tier.put(key(1), {1: b"base"})
    assert await tier.get(key(1), [1]) == {1: b"base"}
    await tier.close()


async def test_a_failover_by_sentinel_goes_on_with_the_new_master(group: SentinelGroup) -> None:
    tier = make_tier(group.url)
    await tier.put(key(1), {1: b"base"})
    group.master.kill()
    with pytest.raises(TierUnavailableError):
        await tier.put(key(2), {1: b"base"})
    await heal(tier)
    await tier.put(key(2), {1: b"base"})
    assert await tier.get(key(2), [1]) == {1: b"base"}
    assert group.master_port() == group.replica.port
    await tier.close()


async def test_tls_and_a_password_with_every_special_character(tls_url: str) -> None:
    tier = make_tier(tls_url, timeout_s=5)
    await tier.connection.check()
    await tier.put(key(1), {1: bytes(1 << 20), 2: b"mid"})
    found = await tier.get(key(1), [1, 2])
    assert found == {1: bytes(1 << 20), 2: b"mid"}
    await tier.close()


@pytest.mark.parametrize(
    ("old", "new"), [(QUOTED, "wrong"), ("?ssl_ca_certs", "?ssl_ca_data"), ("rediss", "redis")]
)
async def test_a_wrong_password_authority_or_scheme_is_told_without_secrets(
    tls_url: str, old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = tls_url.replace(old, new, 1)

    async def connect() -> None:
        connection = RedisConnection(url, timeout_s=5)
        try:
            await connection.check()
        finally:
            await connection.close()

    with pytest.raises(ConfigurationError) as caught:
        await connect()
    told = caught.value.describe() + caplog.text
    assert "127.0.0.1" in told
    assert PASSWORD not in told
    assert QUOTED not in told


def test_what_a_url_says() -> None:
    place = parse_place("redis+cluster://u:p%40@one:1,[::1]:2,three?client_name=kv")
    assert place.hosts == (("one", 1), ("::1", 2), ("three", 6379))
    assert (place.options["username"], place.options["password"]) == ("u", "p@")
    assert place.options["client_name"] == "kv"
    place = parse_place("rediss+sentinel://:p@one,two:7/my%20kv/3")
    assert (place.hosts, place.service) == ((("one", 26379), ("two", 7)), "my kv")
    assert (place.options["db"], place.options["ssl"]) == (3, True)
    assert "password" not in repr(place)


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://:secret@",
        "redis+cluster://:secret@one:0",
        "redis+cluster://:secret@one:70000",
        "redis+cluster://:secret@one/3",
        "redis+cluster://:secret@one?no_such_option=1",
        "redis+sentinel://:secret@one:1",
        "redis+swarm://:secret@one:1",
        "http://:secret@one",
        ":secret",
    ],
)
def test_other_urls_are_refused_without_secrets(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RedisConnection(url)
    assert "secret" not in caught.value.describe()
    assert "redis+cluster" in caught.value.remedy


@pytest.mark.parametrize("kind", ["cluster", "sentinel"])
def test_secrets_of_a_url_with_several_hosts_are_masked(kind: str) -> None:
    url = f"redis+{kind}://user:secret@one:1,two:2/kv"
    assert mask_url(url) == f"redis+{kind}://***@one:1,two:2/kv"
