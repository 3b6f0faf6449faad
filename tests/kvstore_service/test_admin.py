"""What an operator can see and do: explain, pin, move, verify, limit; never counted as use."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.departures import Departures
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos import kvstore_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials
from kvstrata.protos.errors import from_rpc_error
from kvstrata.protos.identity import BlockKey, CacheScope, ScopeDigest
from kvstrata.protos.service import call_metadata, open_channel
from tests.kvstore_service.tenancy import credentials, tenants_file

BASE, MID = 1, 2


class Operator:
    """A store with an ssd tier, its admin stub, and a client."""

    def __init__(self, store: LocalStore, channel: grpc.aio.Channel, client: StoreClient) -> None:
        self.store = store
        self.client = client
        self._stub: Any = AdminStub(channel)  # type: ignore[no-untyped-call]

    async def call(self, method: str, request: Any, who: ClientCredentials = ANONYMOUS) -> Any:
        try:
            call = getattr(self._stub, method)(request, metadata=call_metadata(who), timeout=30)
            return [r async for r in call] if hasattr(call, "__aiter__") else await call
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def explain(self, *keys: BlockKey, tokens: tuple[int, ...] = ()) -> pb.ExplainReply:
        hashes = b"".join(key.block_hash for key in keys)
        request = pb.ExplainRequest(scope=keys[0].scope, block_hashes=hashes, token_ids=tokens)
        reply: pb.ExplainReply = await self.call("Explain", request)
        return reply

    def count(self, name: str, **labels: str) -> int:
        return self.store.running.store.counters.get(name, **labels)


@pytest.fixture
async def operator(tmp_path: Path) -> AsyncIterator[Operator]:
    config = StoreConfig(dram_bytes=1 << 20, ssd_path=str(tmp_path / "ssd"), ssd_bytes=1 << 20)
    async with (
        LocalStore(config) as store,
        open_channel(store.address) as channel,
        StoreClient(store.address) as client,
    ):
        yield Operator(store, channel, client)


def message(key: BlockKey) -> kvstore_pb2.BlockKey:
    return kvstore_pb2.BlockKey(scope=key.scope, block_hash=key.block_hash)


def chain(scope: ScopeDigest, length: int, **options: Any) -> list[tuple[BlockKey, Any]]:
    blocks: list[tuple[BlockKey, Any]] = []
    for number in range(length):
        parent = blocks[-1][0].block_hash if blocks else None
        blocks.append(sample_block(scope, number, parent=parent, **options))
    return blocks


async def test_explain_tells_where_a_block_is_or_what_became_of_it(
    operator: Operator, scope: ScopeDigest
) -> None:
    blocks = chain(scope, 4)
    keys = [key for key, _ in blocks]
    await operator.client.put(blocks)
    await operator.client.delete([keys[1]])
    await operator.call("Evict", pb.EvictRequest(keys=[message(keys[2])], tier="dram"))
    before = operator.count(names.HITS), operator.count(names.MISSES), operator.count(names.LOOKUPS)
    reply = await operator.explain(*keys, sample_block(scope, 99)[0])
    assert reply.run == 1
    present, deleted, moved, also, never = reply.blocks
    assert list(present.listing.tiers) == ["dram", "ssd"]
    assert [(d.tier, d.reason) for d in deleted.departures] == [("", "deleted")]
    assert not deleted.listing.tiers
    assert list(moved.listing.tiers) == ["ssd"]
    assert [(d.tier, d.reason) for d in moved.departures] == [("dram", "admin")]
    assert moved.departures[0].unix_s > reply.remembers_since_unix_s > 1.7e9
    assert list(also.listing.tiers) == ["dram", "ssd"]
    assert (list(never.listing.tiers), list(never.departures)) == ([], [])
    after = operator.count(names.HITS), operator.count(names.MISSES), operator.count(names.LOOKUPS)
    assert before == after


async def test_explain_tells_evictions_for_capacity_and_refused_puts(
    operator: Operator, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, n, strata={BASE: 300_000}) for n in range(8)]
    await operator.client.put(blocks)
    reply = await operator.explain(*(key for key, _ in blocks))
    gone = [b for b in reply.blocks if not b.listing.tiers]
    assert gone
    for block in gone:
        assert {d.reason for d in block.departures} == {"capacity"}
        assert {d.tier for d in block.departures} <= {"dram", "ssd"}
    told = sum(len(b.departures) for b in reply.blocks)
    assert told == operator.count(names.EVICTIONS, reason="capacity") >= 8
    key, frames = sample_block(scope, 50)
    await operator.client.put([(key, {BASE: frames[BASE][:-1] + b"?"})])
    (state,) = (await operator.explain(key)).blocks
    assert [d.reason for d in state.departures] == ["rejected: corrupt"]


async def test_explain_finds_the_same_tokens_under_other_scopes(
    operator: Operator, scope: ScopeDigest
) -> None:
    other = CacheScope(b"m" * 16, "bfloat16", "sample/1").digest()
    (block,) = chain(other, 1)
    await operator.client.put([block])
    tokens = tuple(range(64))
    reply = await operator.explain(sample_block(scope, 0)[0], tokens=tokens)
    (found,) = reply.others
    assert found.scope == other
    assert (found.header.codec, len(found.header.token_ids)) == ("sample", 0)
    assert not (await operator.explain(block[0], tokens=tokens)).others
    assert not (await operator.explain(sample_block(scope, 0)[0], tokens=(9,) * 64)).others


async def test_explain_takes_a_tenants_own_keys(tmp_path: Path, scope: ScopeDigest) -> None:
    path = tenants_file(tmp_path, alice="", ops="admin = true")
    key, frames = sample_block(scope)
    async with (
        LocalStore(StoreConfig(tenants=path)) as store,
        open_channel(store.address) as channel,
        StoreClient(store.address, credentials=credentials("alice")) as client,
    ):
        operator = Operator(store, channel, client)
        await client.put([(key, frames)])

        async def run(**options: Any) -> int:
            request = pb.ExplainRequest(scope=scope, block_hashes=key.block_hash, **options)
            return int((await operator.call("Explain", request, credentials("ops"))).run)

        assert await run(tenant="alice") == 1
        assert await run() == await run(own_keys=True) == 0
        with pytest.raises(Exception, match="no tenant 'bob'"):
            await run(tenant="bob")


def test_departures_are_bounded_and_say_since_when(scope: ScopeDigest) -> None:
    counters = Counters()
    log = Departures(counters, max_blocks=3)
    keys = [sample_block(scope, n)[0] for n in range(5)]
    since = log.since_unix_s
    log.evicted(keys, "dram", "capacity")
    assert [bool(log.of(key)) for key in keys] == [False, False, True, True, True]
    assert log.since_unix_s > since
    for _ in range(20):
        log.note([keys[4]], "redis", "lost")
    assert len(log.of(keys[4])) == 8
    assert log.was_evicted(keys[3])
    assert not log.was_evicted(keys[4])
    log.forget(keys)
    assert not log.of(keys[3])
    assert counters.get(names.EVICTIONS, tier="dram", reason="capacity") == 5


async def test_pins_by_stored_key_exempt_a_block_until_they_are_ended(
    operator: Operator, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, n) for n in range(2)]
    await operator.client.put(blocks)
    absent = sample_block(scope, 7)[0]
    keys = [message(blocks[0][0]), message(absent)]
    reply = await operator.call("Pin", kvstore_pb2.PinRequest(keys=keys, ttl_ms=60_000))
    assert list(reply.missing) == [keys[1]]
    evicted = await operator.call("Evict", pb.EvictRequest())
    assert (evicted.evicted, evicted.skipped_pinned) == (1, 1)
    await operator.call("Unpin", kvstore_pb2.UnpinRequest(keys=keys))
    assert (await operator.call("Evict", pb.EvictRequest())).evicted == 1
    with pytest.raises(Exception, match="ttl_ms"):
        await operator.call("Pin", kvstore_pb2.PinRequest(keys=keys))


async def test_move_copies_then_removes(operator: Operator, scope: ScopeDigest) -> None:
    key, frames = sample_block(scope, strata={BASE: 4000, MID: 2000})
    await operator.client.put([(key, frames)])

    async def move(source: str, target: str, *keys: BlockKey) -> pb.MoveReply:
        request = pb.MoveRequest(source=source, target=target, keys=map(message, keys or [key]))
        reply: pb.MoveReply = await operator.call("Move", request)
        return reply

    async def tiers() -> list[str]:
        (state,) = (await operator.explain(key)).blocks
        return list(state.listing.tiers)

    assert (await move("ssd", "dram")).moved == 1
    assert await tiers() == ["dram"]
    assert (await move("", "ssd")).moved == 1
    assert await tiers() == ["dram", "ssd"]
    assert (await move("dram", "ssd")).moved == 1
    assert await tiers() == ["ssd"]
    pieces = [p async for p in operator.client.get(scope, [key.block_hash], [BASE, MID])]
    assert [bytes(p.frame.payload) for p in pieces if p.frame] == [frames[BASE], frames[MID]]
    (problem,) = (await move("ssd", "dram", sample_block(scope, 9)[0])).problems
    assert problem.reason == "absent"
    await operator.client.pin([key], 60)
    (problem,) = (await move("ssd", "dram")).problems
    assert problem.reason.startswith("pinned: ")
    assert await tiers() == ["dram", "ssd"]
    for source, target in (("", ""), ("dram", "dram"), ("tape", "dram"), ("dram", "tape")):
        with pytest.raises(Exception, match=r"tier|already"):
            await move(source, target)


async def test_verify_finds_what_was_damaged_and_repairs_it_when_told(
    operator: Operator, scope: ScopeDigest, tmp_path: Path
) -> None:
    blocks = [sample_block(scope, n, strata={BASE: 4000, MID: 2000}) for n in range(3)]
    await operator.client.put(blocks)
    order = await operator.store.running.store.dram.keys(9)
    (last,) = await operator.call("Verify", pb.VerifyRequest())
    assert (last.done, last.checked_blocks, last.total_blocks) == (True, 6, 6)
    assert (last.checked_strata, last.num_damaged) == (12, 0)
    stored = sum(len(f) for _, frames in blocks for f in frames.values())
    assert last.checked_bytes == 2 * stored
    (file,) = (tmp_path / "ssd").rglob(f"*{blocks[1][0].block_hash.hex()}*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for repair in (False, True):
        (last,) = await operator.call("Verify", pb.VerifyRequest(tier="ssd", repair=repair))
        (damage,) = last.damaged
        assert (damage.tier, damage.stratum, last.num_damaged) == ("ssd", MID, 1)
        assert damage.key == message(blocks[1][0])
        assert "checksum" in damage.what
    (last,) = await operator.call("Verify", pb.VerifyRequest(tier="ssd"))
    assert (last.num_damaged, last.checked_strata) == (0, 5)
    only = pb.VerifyRequest(tier="dram", keys=[message(blocks[0][0])])
    assert (await operator.call("Verify", only))[-1].checked_strata == 2
    assert operator.count(names.CORRUPT, tier="ssd") == 1
    assert await operator.store.running.store.dram.keys(9) == order
    assert operator.count(names.HITS) == 0


async def test_limits_are_shown_and_set_at_run_time(tmp_path: Path, scope: ScopeDigest) -> None:
    path = tenants_file(tmp_path, alice="quota_bytes = 9000", ops="admin = true")
    async with (
        LocalStore(StoreConfig(tenants=path)) as store,
        open_channel(store.address) as channel,
        StoreClient(store.address, credentials=credentials("alice")) as client,
    ):
        operator = Operator(store, channel, client)
        await client.put([sample_block(scope)])

        async def quota(**fields: Any) -> list[pb.TenantQuota]:
            reply = await operator.call("Quota", pb.QuotaRequest(**fields), credentials("ops"))
            return list(reply.tenants)

        assert [t.tenant for t in await quota()] == ["alice", "ops"]
        (alice,) = await quota(tenant="alice")
        assert (alice.quota_bytes, alice.requests_per_s) == (9000, 0)
        assert 4000 < alice.stored_bytes_now < 9000
        (alice,) = await quota(tenant="alice", requests_per_s=0.001, quota_bytes=0)
        assert (alice.quota_bytes, alice.requests_per_s) == (0, 0.001)
        await client.lookup(scope, [])
        with pytest.raises(Exception, match="rate: more than"):
            await client.lookup(scope, [])
        assert store.running.tenants.reload()
        assert (await quota(tenant="alice"))[0].quota_bytes == 9000
        await client.lookup(scope, [])
        for fields in (
            {"tenant": "bob"},
            {"quota_bytes": 1},
            {"tenant": "alice", "requests_per_s": -1.0},
            {"tenant": "alice", "requests_per_s": float("nan")},
        ):
            with pytest.raises(Exception, match=r"bob|nobody|requests_per_s"):
                await quota(**fields)


async def test_inspecting_counts_as_no_use(operator: Operator, scope: ScopeDigest) -> None:
    blocks = [sample_block(scope, n) for n in range(3)]
    await operator.client.put(blocks)
    dram = operator.store.running.store.dram
    order = await dram.keys(9)
    reply = await operator.call(
        "Inspect", pb.InspectRequest(key=message(blocks[0][0]), tokens=True)
    )
    assert [h.stratum for h in reply.headers] == [BASE]
    assert "codec 'sample/1'" in reply.tokens_unknown
    assert await dram.keys(9) == order
    assert operator.count(names.HITS) == operator.count(names.MISSES) == 0


async def test_verify_tells_a_tier_that_does_not_answer(
    own_redis: RedisServer, scope: ScopeDigest
) -> None:
    async with (
        LocalStore(redis_url=own_redis.url) as store,
        open_channel(store.address) as channel,
        StoreClient(store.address) as client,
    ):
        operator = Operator(store, channel, client)
        await client.put([sample_block(scope)])
        own_redis.kill()
        last = (await operator.call("Verify", pb.VerifyRequest()))[-1]
        assert (last.done, list(last.unavailable), last.checked_blocks) == (True, ["redis"], 1)
