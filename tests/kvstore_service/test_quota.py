"""What a tenant may use, and what happens beyond: refused stores, slower reads, never errors."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvstrata.kvstore_service.client import PutOutcome, StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.namespace import Namespace
from kvstrata.kvstore_service.quota import Quotas, TokenBucket, Usage
from kvstrata.kvstore_service.server import RunningStore, start_store
from kvstrata.kvstore_service.tenants import Tenant, read_tenants
from kvstrata.kvstore_service.testing import ManualClock, sample_block
from kvstrata.protos import frame_pb2, kvstore_pb2
from kvstrata.protos.errors import ThrottledError
from kvstrata.protos.identity import BlockKey, ScopeDigest
from kvstrata.protos.kvstore_pb2_grpc import KVStoreStub
from kvstrata.protos.service import call_metadata, open_channel
from tests.kvstore_service.tenancy import credentials, tenants_file

BASE = 1
Block = tuple[BlockKey, dict[int, bytes]]


def blocks(scope: ScopeDigest, count: int, size: int = 4000) -> list[Block]:
    return [sample_block(scope, number, strata={BASE: size}) for number in range(count)]


BLOCK_BYTES = max(len(frames[BASE]) for _, frames in blocks(ScopeDigest(b"s" * 16), 8))


async def until(holds: Callable[[], bool]) -> None:
    """Return when ``holds`` does."""
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.005)


class Shop:
    """A store with tenants and a clock that is turned by hand."""

    def __init__(self, running: RunningStore, clock: ManualClock, path: str) -> None:
        self.running = running
        self.clock = clock
        self.tenants = {tenant.name: tenant for tenant in read_tenants(path)}

    def client(self, name: str) -> StoreClient:
        return StoreClient(self.running.address, credentials=credentials(name))

    def usage(self, name: str) -> Usage:
        return self.running.quotas.of(self.tenants[name])

    def refusals(self, **labels: str) -> int:
        return self.running.store.counters.get("refusals_total", **labels)

    async def held(self, name: str, wanted: list[Block]) -> list[int]:
        """Return which of the blocks the store still holds for the tenant."""
        keys = Namespace(name).keys(key for key, _ in wanted)
        found, _ = await self.running.store.locate(keys)
        return [i for i, presence in enumerate(found) if presence]


@contextlib.asynccontextmanager
async def shop(folder: Path, **tenants: str) -> AsyncIterator[Shop]:
    path = tenants_file(folder, **tenants)
    clock = ManualClock()
    running = await start_store(StoreConfig(tenants=path), clock)
    try:
        yield Shop(running, clock, path)
    finally:
        await running.stop(0.5)


def test_permits_come_steadily_and_are_kept_for_a_second() -> None:
    clock = ManualClock()
    bucket = TokenBucket(clock)
    assert [bucket.take(4) for _ in range(4)] == [0, 0, 0, 0]
    assert bucket.take(4) == pytest.approx(0.25)
    clock.advance(0.3)
    assert bucket.take(4) == 0
    assert bucket.take(4) == pytest.approx(0.2)
    clock.advance(3600)
    assert [bucket.take(4) > 0 for _ in range(5)] == [False] * 4 + [True]
    slow = TokenBucket(clock)
    assert slow.take(0.5) == 0
    assert slow.take(0.5) == pytest.approx(2)


def test_without_limits_nothing_is_refused() -> None:
    quotas = Quotas(Counters(), ManualClock())
    for _ in range(1000):
        quotas.check_put(Tenant("free"), 1 << 40)
    assert quotas.may_read_ahead(Tenant("free"))


async def test_too_many_requests_are_refused_and_told_when_to_come_again(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    async with (
        shop(tmp_path, alice="requests_per_s = 5", bob="") as store,
        store.client("alice") as alice,
        store.client("bob") as bob,
    ):
        for _ in range(5):
            await alice.lookup(scope, [])
        with pytest.raises(ThrottledError, match="'alice'") as caught:
            await alice.lookup(scope, [])
        assert caught.value.retry_after_s == pytest.approx(0.2)
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        for refused in (alice.pin([], 1), alice.delete([]), anext(alice.get(scope, [], [BASE]))):
            with pytest.raises(ThrottledError):
                await refused
        await alice.unpin([])  # giving something back is never refused
        await bob.lookup(scope, [])
        assert store.refusals(tenant="alice", reason="rate") == 4
        assert store.refusals() == 4
        store.clock.advance(0.2)
        await alice.lookup(scope, [])


async def test_other_libraries_find_the_time_to_wait_in_retry_info(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    async with (
        shop(tmp_path, a="requests_per_s = 0.5") as store,
        open_channel(store.running.address) as channel,
    ):
        stub: Any = KVStoreStub(channel)  # type: ignore[no-untyped-call]
        request = kvstore_pb2.LookupRequest(scope=scope)
        await stub.Lookup(request, metadata=call_metadata(credentials("a")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Lookup(request, metadata=call_metadata(credentials("a")))
    status = rpc_status.from_call(caught.value)
    retry = error_details_pb2.RetryInfo()
    assert [detail.Unpack(retry) for detail in status.details] == [False, True]
    assert retry.retry_delay.ToNanoseconds() == 2_000_000_000


async def test_refused_puts_are_dropped_not_raised(tmp_path: Path, scope: ScopeDigest) -> None:
    wanted = blocks(scope, 12)

    async def one_by_one() -> AsyncIterator[Block]:
        for block in wanted:
            yield block

    async with (
        shop(tmp_path, alice="requests_per_s = 5") as store,
        store.client("alice") as alice,
    ):
        outcomes = await alice.put(iter(wanted))
        assert [o.key for o in outcomes] == [key for key, _ in wanted]
        assert [o.outcome for o in outcomes] == ["committed"] * 5 + ["rejected"] * 7
        assert all(o.reason.startswith("throttled: ") for o in outcomes[5:])
        assert alice.dropped_puts == 7
        store.clock.advance(1)
        streamed: list[PutOutcome] = await alice.put(one_by_one())
        assert [o.outcome for o in streamed[:5]] == ["exists"] * 5
        assert {o.outcome for o in streamed[5:]} == {"rejected"}
        assert store.usage("alice").in_flight_bytes == 0


async def test_a_refused_stream_ends_as_exhausted_once_it_is_written(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    wanted = blocks(scope, 3, size=900_000)

    async def requests() -> AsyncIterator[kvstore_pb2.PutRequest]:
        for key, frames in wanted:
            sizes: Any = [{"stratum": frame_pb2.STRATUM_BASE, "frame_bytes": len(frames[BASE])}]
            message = kvstore_pb2.BlockKey(scope=key.scope, block_hash=key.block_hash)
            yield kvstore_pb2.PutRequest(open=kvstore_pb2.PutOpen(key=message, strata=sizes))
            yield kvstore_pb2.PutRequest(data=frames[BASE])

    async with (
        shop(tmp_path, alice="requests_per_s = 1") as store,
        open_channel(store.running.address) as channel,
    ):
        stub: Any = KVStoreStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Put(requests(), metadata=call_metadata(credentials("alice")), timeout=10)
        first, second = await call.read(), await call.read()
        assert first.outcome == kvstore_pb2.PUT_OUTCOME_COMMITTED
        assert second.reason.startswith("throttled: rate: ")
        assert second.key.block_hash == wanted[1][0].block_hash
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(await call.trailing_metadata())
        status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
        retry = error_details_pb2.RetryInfo()
        assert [detail.Unpack(retry) for detail in status.details] == [False, True]
        assert await store.held("alice", wanted) == [0]
        assert store.usage("alice").in_flight_bytes == 0


async def test_bytes_in_flight_refuse_puts_before_they_delay_gets(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    large = blocks(scope, 12, size=1_000_000)
    hashes = [key.block_hash for key, _ in large]
    async with (
        shop(tmp_path, alice="in_flight_bytes = 2_500_000", bob="") as store,
        store.client("alice") as alice,
        store.client("bob") as bob,
    ):
        assert [(await alice.put([block]))[0].outcome for block in large] == ["committed"] * 12
        async with contextlib.aclosing(alice.get(scope, hashes, [BASE])) as slow:
            first = await anext(slow)  # then reads no more: the store holds what it read ahead
            assert first.frame is not None
            await until(lambda: store.usage("alice").in_flight_bytes > 1_600_000)
            (refused,) = await alice.put([large[0]])
            assert refused.reason.startswith("throttled: in_flight: ")
            assert store.refusals(tenant="alice", reason="in_flight") == 1
            assert store.usage("alice").in_flight_bytes <= 4 * 1_010_000
            assert (await bob.put([large[0]]))[0].outcome == "committed"
            rest = [piece async for piece in slow]
        assert [piece.index for piece in rest] == list(range(1, 12))
        assert all(piece.frame is not None for piece in rest)
        assert store.usage("alice").in_flight_bytes == 0
        assert (await alice.put([large[0]]))[0].outcome == "exists"


async def test_a_tenant_at_its_quota_gives_up_its_own_coldest_blocks(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    wanted = blocks(scope, 8)
    async with (
        shop(tmp_path, alice=f"quota_bytes = {4 * BLOCK_BYTES}", bob="") as store,
        store.client("alice") as alice,
        store.client("bob") as bob,
    ):
        await bob.put(wanted)
        for block in wanted[:4]:
            await alice.put([block])
        assert [p async for p in alice.get(scope, [wanted[0][0].block_hash], [BASE])]
        for block in wanted[4:7]:
            assert (await alice.put([block]))[0].outcome == "committed"
        assert await store.held("alice", wanted) == [0, 4, 5, 6]
        assert await store.held("bob", wanted) == list(range(8))
        assert 3 * BLOCK_BYTES < store.usage("alice").stored_bytes <= 4 * BLOCK_BYTES
        counters = store.running.store.counters
        assert counters.get("quota_evictions_total", tenant="alice") == 3


async def test_pinned_blocks_that_leave_no_room_refuse_the_put_until_they_expire(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    wanted = blocks(scope, 3)
    keys = [key for key, _ in wanted]
    async with (
        shop(tmp_path, alice=f"quota_bytes = {2 * BLOCK_BYTES}") as store,
        store.client("alice") as alice,
    ):
        await alice.put(wanted[:2])
        await alice.pin(keys[:2], 60)
        (refused,) = await alice.put(wanted[2:])
        assert refused.reason.startswith("throttled: bytes: ")
        assert await store.held("alice", wanted) == [0, 1]
        assert store.refusals(tenant="alice", reason="bytes") == 1
        assert (await alice.put(wanted[:1]))[0].outcome == "exists"
        store.clock.advance(61)
        assert (await alice.put(wanted[2:]))[0].outcome == "committed"
        assert await store.held("alice", wanted) == [0, 2]
        (large,) = await alice.put([sample_block(scope, 9, strata={BASE: 3 * BLOCK_BYTES})])
        assert "larger than the quota" in large.reason


async def test_only_blocks_that_were_kept_are_counted(tmp_path: Path, scope: ScopeDigest) -> None:
    wanted = blocks(scope, 3)
    damaged = {BASE: wanted[1][1][BASE][:-1] + b"?"}
    async with (
        shop(tmp_path, alice="quota_bytes = 1_000_000") as store,
        store.client("alice") as alice,
    ):
        await alice.put(wanted[:1])
        outcomes = await alice.put([(wanted[1][0], damaged), (wanted[0][0], damaged)])
        assert [o.outcome for o in outcomes] == ["rejected", "rejected"]
        assert store.usage("alice").stored_bytes == len(wanted[0][1][BASE])
        stub: Any = alice._stub
        sizes: Any = [{"stratum": frame_pb2.STRATUM_BASE, "frame_bytes": 5000}]
        key = kvstore_pb2.BlockKey(scope=scope, block_hash=wanted[2][0].block_hash)
        opening = kvstore_pb2.PutRequest(open=kvstore_pb2.PutOpen(key=key, strata=sizes))

        async def half() -> AsyncIterator[kvstore_pb2.PutRequest]:
            yield opening
            await asyncio.sleep(60)

        call = stub.Put(half(), metadata=call_metadata(credentials("alice")))
        reading = asyncio.ensure_future(call.read())
        await until(lambda: store.usage("alice").in_flight_bytes == 5000)
        call.cancel()
        await asyncio.wait([reading])
        await until(lambda: store.usage("alice").in_flight_bytes == 0)
        assert store.usage("alice").stored_bytes == len(wanted[0][1][BASE])
        await alice.delete([wanted[0][0]])
        assert store.usage("alice").stored_bytes == 0
