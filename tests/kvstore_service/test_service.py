"""What the service answers to peers that break the contract, and to an operator."""

from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.protos import admin_pb2, kvstore_pb2
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.errors import from_rpc_error
from kvstrata.protos.identity import ScopeDigest
from kvstrata.protos.kvstore_pb2_grpc import KVStoreStub
from kvstrata.protos.service import MAX_MESSAGE_BYTES, open_channel

BASE, MID = 1, 2


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as made:
        yield made


@pytest.fixture
async def channel(store: LocalStore) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(store.address) as made:
        yield made


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return KVStoreStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def admin(channel: grpc.aio.Channel) -> Any:
    return AdminStub(channel)  # type: ignore[no-untyped-call]


async def refusal(call: Any) -> tuple[str, str]:
    """Return status and error name of a call that must fail."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.RpcError as error:
        raised = from_rpc_error(error)
        assert raised.remedy or raised.message
        return error.code().name, type(raised).__name__
    raise AssertionError("the call did not fail")


async def stream(requests: Iterable[pb.PutRequest]) -> AsyncIterator[pb.PutRequest]:
    for request in requests:
        yield request


def opening(scope: bytes, sizes: dict[int, int], block_hash: bytes = b"h" * 16) -> pb.PutRequest:
    strata: Any = [{"stratum": s, "frame_bytes": n} for s, n in sizes.items()]
    key = pb.BlockKey(scope=scope, block_hash=block_hash)
    return pb.PutRequest(open=pb.PutOpen(key=key, strata=strata))


async def test_broken_put_streams_get_the_named_error_and_the_service_goes_on(
    store: LocalStore, stub: Any, scope: ScopeDigest
) -> None:
    data = pb.PutRequest(data=b"x" * 10)
    broken = {
        "data without an open block": ([data], "MalformedMessageError"),
        "an empty request": ([pb.PutRequest()], "MalformedMessageError"),
        "more than declared": ([opening(scope, {BASE: 5}), data], "MalformedMessageError"),
        "data without bytes": (
            [opening(scope, {BASE: 5}), pb.PutRequest(data=b"")],
            "MalformedMessageError",
        ),
        "open inside open": ([opening(scope, {BASE: 5})] * 2, "MalformedMessageError"),
        "ends inside a block": ([opening(scope, {BASE: 50}), data], "InvalidRequestError"),
        "key too short": ([opening(b"s", {BASE: 5})], "InvalidRequestError"),
        "no strata": ([opening(scope, {})], "InvalidRequestError"),
        "an unknown stratum": ([opening(scope, {9: 5})], "InvalidRequestError"),
        "an empty frame": ([opening(scope, {BASE: 0})], "InvalidRequestError"),
        "petabytes": ([opening(scope, {BASE: 1 << 50})], "LimitError"),
        "a sum beyond 64 bits": ([opening(scope, {BASE: 1 << 63, MID: 1 << 63})], "LimitError"),
    }
    for what, (requests, name) in broken.items():
        assert await refusal(stub.Put(stream(requests))) == ("INVALID_ARGUMENT", name), what
    block = sample_block(scope)
    async with StoreClient(store.address) as client:
        assert (await client.put([block]))[0].outcome == "committed"
    assert store.running.workload.in_flight_puts == 0
    assert store.running.store.counters.get("puts_total") == 1


async def test_a_stream_broken_later_keeps_what_was_acknowledged(
    stub: Any, store: LocalStore, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    good = [
        opening(scope, {BASE: len(frames[BASE])}, key.block_hash),
        pb.PutRequest(data=frames[BASE][:100]),
        pb.PutRequest(data=frames[BASE][100:]),
    ]
    call = stub.Put(stream([*good, pb.PutRequest(data=b"x")]))
    assert (await anext(aiter(call))).outcome == pb.PUT_OUTCOME_COMMITTED
    assert await refusal(call) == ("INVALID_ARGUMENT", "MalformedMessageError")
    lookup = pb.LookupRequest(scope=scope, block_hashes=key.block_hash)
    reply = await stub.Lookup(lookup)
    assert reply.strata == bytes([1 << BASE])
    assert list(reply.block_bytes) == [len(frames[BASE])]
    assert [reply.tier_names[tier] for tier in reply.tiers] == ["dram"]


async def test_one_message_may_span_several_strata(stub: Any, scope: ScopeDigest) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    sizes = {s: len(f) for s, f in frames.items()}
    both = pb.PutRequest(data=b"".join(frames.values()))
    call = stub.Put(stream([opening(scope, sizes, key.block_hash), both]))
    assert (await call.read()).outcome == pb.PUT_OUTCOME_COMMITTED


async def test_a_block_may_be_opened_and_brought_in_one_message(
    stub: Any, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    request = opening(scope, {s: len(f) for s, f in frames.items()}, key.block_hash)
    request.data = b"".join(frames.values())
    replies = [reply.outcome async for reply in stub.Put(stream([request, request]))]
    assert replies == [pb.PUT_OUTCOME_COMMITTED, pb.PUT_OUTCOME_EXISTS]


async def test_small_blocks_share_a_message(
    store: LocalStore, stub: Any, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, n, strata={BASE: 300_000, MID: 1000}) for n in range(9)]
    async with StoreClient(store.address) as client:
        await client.put(blocks)
    hashes = b"".join(key.block_hash for key, _ in blocks)
    strata: Any = [BASE, MID]
    request = pb.GetRequest(scope=scope, block_hashes=hashes, strata=strata)
    replies = [reply async for reply in stub.Get(request)]
    assert [len({piece.index for piece in reply.pieces}) for reply in replies] == [4, 4, 1]
    sent = b"".join(reply.data for reply in replies)
    assert sent == b"".join(frame for _, frames in blocks for frame in frames.values())


async def test_the_generated_stub_reads_what_the_data_codec_sends(
    store: LocalStore, stub: Any, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 3_000_000})
    async with StoreClient(store.address) as client:
        await client.put([(key, frames)])
    request = pb.GetRequest(scope=scope, block_hashes=key.block_hash, strata=[pb.Piece().stratum])
    assert await refusal(stub.Get(request)) == ("INVALID_ARGUMENT", "InvalidRequestError")
    request.strata[:] = [BASE]  # type: ignore[list-item]
    replies = [reply async for reply in stub.Get(request)]
    assert b"".join(reply.data for reply in replies) == frames[BASE]
    pieces = [piece for reply in replies for piece in reply.pieces]
    assert [piece.last for piece in pieces] == [False, False, True]
    assert pieces[0].frame_bytes == len(frames[BASE])
    assert all(len(reply.data) <= 1 << 20 for reply in replies)


async def test_malformed_requests_get_the_named_error(
    channel: grpc.aio.Channel, stub: Any, scope: ScopeDigest
) -> None:
    lookup, invalid = pb.LookupRequest, "INVALID_ARGUMENT"
    assert await refusal(stub.Lookup(lookup(scope=b"s", block_hashes=b"h" * 16))) == (
        invalid,
        "InvalidRequestError",
    )
    assert await refusal(stub.Lookup(lookup(scope=scope, block_hashes=b"h" * 17))) == (
        invalid,
        "InvalidRequestError",
    )
    assert await refusal(stub.Lookup(lookup(scope=scope, block_hashes=bytes(16 * 20_000)))) == (
        invalid,
        "LimitError",
    )
    assert await refusal(
        stub.Lookup(lookup(scope=scope), metadata=(("kvstrata-protocol", "99"),))
    ) == ("FAILED_PRECONDITION", "ProtocolVersionError")
    layers = pb.GetRequest(scope=scope, strata=[BASE], first_layer=5, last_layer=2)  # type: ignore[list-item]
    assert await refusal(stub.Get(layers)) == (invalid, "InvalidRequestError")
    huge = pb.LookupRequest(scope=scope, block_hashes=bytes(MAX_MESSAGE_BYTES + 16))
    assert await refusal(stub.Lookup(huge)) == ("RESOURCE_EXHAUSTED", "MessageTooLargeError")
    for method in ("KVStore/Lookup", "KVStore/Delete", "Admin/ListBlocks"):
        raw = channel.unary_unary(f"/kvstrata.v1.{method}")
        assert await refusal(raw(b"\x0a\xff\xff\xff")) == (invalid, "MalformedMessageError")
    raw = channel.unary_unary("/kvstrata.v1.Admin/Evict")
    assert await refusal(raw(b"\x12\x02\xff\xfe")) == (invalid, "MalformedMessageError")


async def test_stats_tell_tiers_counters_and_health(
    store: LocalStore, admin: Any, scope: ScopeDigest
) -> None:
    block = sample_block(scope)
    async with StoreClient(store.address) as client:
        await client.put([block])
        await client.pin([block[0]], 60)
        async for _ in client.get(scope, [block[0].block_hash], [BASE]):
            pass
    stats = await admin.Stats(admin_pb2.StatsRequest())
    (dram,) = stats.tiers
    size = len(block[1][BASE])
    assert (dram.tier, dram.healthy, dram.blocks, dram.bytes, dram.hits) == (
        "dram",
        True,
        1,
        size,
        1,
    )
    assert (stats.pinned_blocks, stats.pinned_bytes, stats.health) == (1, size, "ok")
    assert all(counter.name.endswith("_total") for counter in stats.counters)
    sent = [c.value for c in stats.counters if c.name == "sent_bytes_total"]
    assert sent == [size]


async def test_listing_pages_over_a_snapshot(
    store: LocalStore, admin: Any, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, number) for number in range(5)]
    async with StoreClient(store.address) as client:
        await client.put(blocks)
        await client.pin([blocks[4][0]], 60)
    listed: list[admin_pb2.BlockListing] = []
    token = ""
    while True:
        page = await admin.ListBlocks(admin_pb2.ListBlocksRequest(page_size=2, page_token=token))
        listed += page.blocks
        token = page.next_page_token
        if not token:
            break
    assert [b.key.block_hash for b in listed] == [key.block_hash for key, _ in reversed(blocks)]
    assert [b.pinned for b in listed] == [True, False, False, False, False]
    assert listed[0].tiers == ["dram"]
    other = await admin.ListBlocks(admin_pb2.ListBlocksRequest(scope=b"o" * 16))
    assert (len(other.blocks), other.next_page_token) == (0, "")
    request = admin_pb2.ListBlocksRequest
    bad = {
        "LimitError": request(page_size=1_000_000_000),
        "InvalidRequestError": request(page_token="zz.99999999999999999999"),
    }
    for name, bad_request in bad.items():
        assert await refusal(admin.ListBlocks(bad_request)) == ("INVALID_ARGUMENT", name)
    assert (await refusal(admin.ListBlocks(request(scope=b"o"))))[1] == "InvalidRequestError"


async def test_inspect_tells_headers(store: LocalStore, admin: Any, scope: ScopeDigest) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    async with StoreClient(store.address) as client:
        await client.put([(key, frames)])
    message = kvstore_pb2.BlockKey(scope=scope, block_hash=key.block_hash)
    reply = await admin.Inspect(admin_pb2.InspectRequest(key=message))
    assert [h.stratum for h in reply.headers] == [BASE, MID]
    assert list(reply.headers[0].token_ids) == list(range(64))
    message.block_hash = b"?" * 16
    request = admin_pb2.InspectRequest(key=message)
    assert await refusal(admin.Inspect(request)) == ("NOT_FOUND", "BlockNotFoundError")


async def test_evict_skips_pinned_blocks_and_can_name_a_tier(
    redis: RedisServer, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, number) for number in range(4)]
    async with (
        LocalStore(redis_url=redis.url) as store,
        StoreClient(store.address) as client,
        open_channel(store.address) as channel,
    ):
        admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
        await client.put(blocks)
        await client.pin([blocks[0][0]], 60)
        reply = await admin.Evict(admin_pb2.EvictRequest(tier="dram"))
        assert (reply.evicted, reply.skipped_pinned) == (3, 1)
        found = await client.lookup(scope, [key.block_hash for key, _ in blocks[:2]])
        assert [b.tier for b in found.blocks] == ["dram", "redis"]
        reply = await admin.Evict(admin_pb2.EvictRequest())
        assert (reply.evicted, reply.skipped_pinned) == (3, 1)
        refused = await refusal(admin.Evict(admin_pb2.EvictRequest(tier="tape")))
        assert refused == ("INVALID_ARGUMENT", "InvalidRequestError")


async def test_health_says_degraded_without_redis_and_the_password_is_nowhere(
    scope: ScopeDigest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with RedisServer(password="s3cret") as server:
        async with (
            LocalStore(redis_url=server.url) as store,
            StoreClient(store.address) as client,
            open_channel(store.address) as channel,
        ):
            admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
            assert (await admin.Stats(admin_pb2.StatsRequest())).health == "ok"
            server.kill()
            outcomes = await client.put([sample_block(scope)])
            stats = await admin.Stats(admin_pb2.StatsRequest())
            assert stats.health.startswith("degraded: redis: ")
            assert not stats.tiers[1].healthy
    assert "s3cret" not in f"{stats}{outcomes}{caplog.text}"
    assert "redis is down" in caplog.text


async def test_drain_turns_health_off_and_answers(
    store: LocalStore, channel: grpc.aio.Channel, admin: Any
) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", "kvstrata.v1.KVStore", "kvstrata.v1.Admin"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with store.running.workload.call():
        reply = await admin.Drain(admin_pb2.DrainRequest(timeout_ms=50))
        assert (reply.drained, reply.in_flight) == (False, 1)
    assert (await admin.Drain(admin_pb2.DrainRequest(timeout_ms=1000))).drained
    reply = await health.Check(health_pb2.HealthCheckRequest(service=""))
    assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await admin.Stats(admin_pb2.StatsRequest())).health == "draining"
