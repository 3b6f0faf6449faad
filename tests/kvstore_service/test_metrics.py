"""The metrics port: its sums are those of a workload that is known, and equal to ``Stats``."""

import asyncio
import contextlib
import ssl
import urllib.request
from collections import Counter as Tally
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.counters import BUCKETS_S, Counters
from kvstrata.kvstore_service.metric_help import HELP
from kvstrata.kvstore_service.metrics import MetricsPort
from kvstrata.kvstore_service.testing import LocalStore, free_port, sample_block
from kvstrata.protos import admin_pb2, call_context
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.identity import ScopeDigest
from kvstrata.protos.service import call_metadata, open_channel
from tests.certificates import Authority
from tests.kvstore_service.tenancy import credentials, tenants_file

BASE, MID, EXACT = 1, 2, 4

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(address: str, **options: Any) -> Samples:
    scheme = "https" if options else "http"
    with urllib.request.urlopen(f"{scheme}://{address}/metrics", timeout=30, **options) as reply:
        text = reply.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum over every sample of that name that carries ``labels``."""
    return sum(
        value
        for (known, pairs), value in samples.items()
        if known == f"kvstrata_store_{name}" and labels.items() <= dict(pairs).items()
    )


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, **tenants: str) -> AsyncIterator[LocalStore]:
    config = StoreConfig(
        dram_bytes=1 << 20,
        ssd_path=str(tmp_path / "ssd"),
        ssd_bytes=4 << 20,
        tenants=tenants_file(tmp_path, **tenants),
        metrics_listen="127.0.0.1:0",
    )
    async with LocalStore(config) as store:
        yield store


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as made:
        yield made


async def stats(store: LocalStore) -> admin_pb2.StatsReply:
    async with open_channel(store.address) as channel:
        admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
        reply: admin_pb2.StatsReply = await admin.Stats(
            admin_pb2.StatsRequest(), metadata=call_metadata(credentials("ops"))
        )
        return reply


async def test_the_sums_of_a_known_workload_agree(tmp_path: Path, scope: ScopeDigest) -> None:
    blocks = [sample_block(scope, n, strata={BASE: 4000, MID: 2000}) for n in range(8)]
    hashes = [key.block_hash for key, _ in blocks]
    absent = [sample_block(scope, 100 + n)[0].block_hash for n in range(3)]
    sizes = [sum(map(len, frames.values())) for _, frames in blocks]
    got: Tally[str] = Tally()

    async def get(client: StoreClient, wanted: list[Any], strata: list[int], **call: Any) -> None:
        async for piece in client.get(scope, wanted, strata, **call):
            got["bytes"] += piece.num_bytes
            got[piece.tier or piece.miss] += 1

    tenants = {"alice": "quota_bytes = 1_000_000", "bob": "", "ops": "admin = true"}
    async with (
        serving(tmp_path, **tenants) as store,
        StoreClient(store.address, credentials=credentials("alice")) as alice,
        StoreClient(store.address, credentials=credentials("bob")) as bob,
    ):
        dram, address = store.running.store.dram, store.running.metrics_address
        await alice.put(blocks)
        await alice.put(blocks[:3])  # exist
        key, frames = blocks[0]
        await alice.put([(key, {BASE: frames[BASE][:-1] + b"?"})])  # rejected
        await alice.lookup(scope, [*hashes, *absent])
        await get(alice, hashes, [BASE, MID])
        await get(alice, [*absent, hashes[0]], [BASE, EXACT])
        await dram.delete(await dram.keys(99))
        await get(alice, hashes[:5], [BASE])  # from ssd
        await get(bob, hashes[:2], [BASE])  # another tenant's
        await get(bob, hashes[:1], [BASE], wait_ms=20)
        told = await stats(store)
        found = await asyncio.to_thread(scrape, address)

    def counted(name: str, **labels: str) -> int:
        return int(total(found, name, **labels))

    # Blocks: every one that was put has one outcome.
    assert counted("puts_total") == counted("puts_total", tenant="alice") == 8 + 3 + 1
    assert counted("puts_total", outcome="committed") == 8
    assert counted("puts_total", outcome="exists") == 3
    assert counted("puts_total", outcome="rejected", reason="corrupt") == 1
    assert counted("received_bytes_total") == sum(sizes) + sum(sizes[:3]) + len(frames[BASE])
    # Lookups: every block asked for is in the run or behind it.
    assert counted("lookup_blocks_total", result="hit") == 8
    assert counted("lookup_blocks_total", result="miss") == 3
    # Strata: every one asked for was found somewhere, or missed for a reason.
    assert counted("wanted_strata_total", tenant="alice") == 16 + 8 + 5
    assert counted("wanted_strata_total", tenant="bob") == 3
    for tenant in ("alice", "bob"):
        assert counted("wanted_strata_total", tenant=tenant) == sum(
            counted(f"{name}_total", tenant=tenant) for name in ("hits", "misses")
        )
    assert counted("hits_total", tenant="alice", tier="dram") == got["dram"] == 16 + 1
    assert counted("hits_total", tenant="alice", tier="ssd") == got["ssd"] == 5
    assert counted("hits_total", tenant="bob") == 0
    assert counted("misses_total", reason="absent") == got["absent"] == 3 * 2 + 1 + 2
    assert counted("misses_total", reason="wait_expired", tenant="bob") == got["wait_expired"] == 1
    assert counted("waits_total", outcome="wait_expired") == 1
    # Bytes: what went out is what came in.
    assert counted("sent_bytes_total") == counted("sent_bytes_total", tenant="alice")
    assert counted("sent_bytes_total") == got["bytes"] > sum(sizes)
    # Calls: each has a status and a duration.
    for method, count in (("Put", 3), ("Get", 5), ("Lookup", 1)):
        assert counted("calls_total", method=f"KVStore/{method}", code="OK") == count
        assert counted("calls_total", method=f"KVStore/{method}") == count
        assert counted("call_seconds_count", method=f"KVStore/{method}") == count
        assert counted("call_seconds_bucket", method=f"KVStore/{method}", le="+Inf") == count
    assert counted("calls_total", method="Admin/Stats", tenant="ops", code="OK") == 1
    # Tiers: below dram, bytes written are those of the blocks committed.
    assert counted("tier_moved_bytes_total", tier="ssd", direction="written") == sum(sizes)
    assert counted("tier_operation_seconds_count", tier="ssd", operation="put") == 8
    assert counted("tier_blocks", tier="ssd") == 8
    assert counted("tier_up", tier="ssd") == counted("up") == counted("healthy") == 1
    assert counted("tenant_stored_bytes", tenant="alice") == sum(sizes)
    # The port and Stats tell the same.
    for counter in told.counters:
        if not counter.labels.get("method", "").startswith("Admin/"):
            labels = frozenset(counter.labels.items())
            assert found[f"kvstrata_store_{counter.name}", labels] == counter.value


async def test_strata_that_a_stopped_get_left_unread_are_counted(
    store: LocalStore, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, n, strata={BASE: 400_000}) for n in range(4)]
    hashes = [key.block_hash for key, _ in blocks]
    count = store.running.store.counters.get
    async with StoreClient(store.address) as client:
        await client.put(blocks)
        async with contextlib.aclosing(client.get(scope, hashes * 50, [BASE])) as pieces:
            async for _ in pieces:
                break
        async with asyncio.timeout(30):  # until the server has seen that the call has ended
            while not count(names.CALLS, method="KVStore/Get"):
                await asyncio.sleep(0.01)
    assert count(names.CALLS, method="KVStore/Get", code="CANCELLED") == 1
    assert count(names.WANTED) == 200 == count(names.HITS) + count(names.ABANDONED)
    assert count(names.HITS) >= 1
    assert count(names.ABANDONED) >= 1


def test_every_number_has_a_help_text_and_a_name_by_the_rules() -> None:
    constants = {
        value
        for name, value in vars(names).items()
        if name.isupper() and isinstance(value, str) and value != names.OTHER
    }
    assert constants <= HELP.keys()
    for name in constants:
        assert name.endswith(("_total", "_seconds", "_ratio"))
        assert name == name.lower()


async def test_the_label_of_tenants_is_bounded() -> None:
    counters = Counters()
    for number in range(names.MAX_TENANTS + 50):
        call_context.tenant.set(f"tenant-{number}")
        counters.add(names.LOOKUPS)
    labels = {counter.labels["tenant"] for counter in counters.messages()}
    assert len(labels) == names.MAX_TENANTS + 1
    assert counters.get(names.LOOKUPS, tenant=names.OTHER) == 50
    assert counters.get(names.LOOKUPS) == names.MAX_TENANTS + 50


def test_a_duration_is_in_one_bucket_its_upper_bound_included() -> None:
    counters = Counters()
    for seconds in (0.0, BUCKETS_S[0], BUCKETS_S[0] * 1.01, BUCKETS_S[-1], 1e9):
        counters.observe(names.CALL_SECONDS, seconds, method="x")
    (times,) = counters.histograms()
    assert list(times.counts) == [2, 1, *[0] * (len(BUCKETS_S) - 3), 1, 1]
    assert times.sum_s == pytest.approx(1e9 + 60 + BUCKETS_S[0] * 2.01)


async def test_there_is_no_port_unless_asked_for(scope: ScopeDigest) -> None:
    async with LocalStore() as store:
        assert store.running.metrics_address == ""


async def test_a_process_that_cannot_answer_says_so() -> None:
    async def fail() -> admin_pb2.StatsReply:
        raise RuntimeError("s3cret")

    port = MetricsPort("127.0.0.1:0", "kvstrata_store", fail)
    try:
        found = await asyncio.to_thread(scrape, port.address)
        assert total(found, "up") == 0
        assert not total(found, "healthy")
        with pytest.raises(ConfigurationError, match="for metrics"):
            MetricsPort(port.address, "kvstrata_store", fail)
    finally:
        await port.close()


async def test_mutual_tls_guards_the_port(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls = authority.server(mutual=True)
    own = authority.client(mutual=True)
    config = StoreConfig(tls=tls, metrics_listen=f"127.0.0.1:{free_port()}")
    async with LocalStore(config) as store:
        address = store.running.metrics_address
        context = ssl.create_default_context(cafile=authority.ca)
        with pytest.raises(OSError):  # noqa: PT011 - of ssl, or a connection that is cut
            await asyncio.to_thread(scrape, address, context=context)
        context.load_cert_chain(own.cert, own.key)
        found = await asyncio.to_thread(lambda: scrape(address, context=context))
        assert total(found, "up") == 1
