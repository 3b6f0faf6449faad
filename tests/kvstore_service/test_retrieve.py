"""Searching blocks by a query, over a real socket: what is found, named and refused."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.lower_reader import Read
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import DeadlineError, InvalidRequestError, KVStrataError, LimitError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from kvstrata.protos.representatives import ATTACHMENT, pack_representatives
from tests.kvstore_service.tenancy import credentials, tenants_file

BASE, EXACT = 1, 4
DIM = 8  # one KV head, as sample blocks have it
LAYER = 3
Block = tuple[BlockKey, dict[int, bytes]]


def direction(angle: float) -> list[float]:
    """Return a unit vector in the plane of the first two dimensions."""
    return [math.cos(angle), math.sin(angle)] + [0.0] * (DIM - 2)


def attached(values: Sequence[float], layer: int = LAYER) -> dict[str, bytes]:
    row = np.array(values, "<f2").tobytes()
    return {ATTACHMENT: pack_representatives({layer: row, layer + 1: bytes(2 * DIM)})}


def chain(
    scope: ScopeDigest,
    values: Sequence[Sequence[float] | None],
    *,
    stratum: int = BASE,
    seed: int = 0,
) -> list[Block]:
    """Return the blocks of one stream; None for a block without representatives."""
    blocks: list[Block] = []
    for number, row in enumerate(values):
        blocks.append(
            sample_block(
                scope,
                number + 1000 * seed,
                parent=blocks[-1][0].block_hash if blocks else None,
                strata={stratum: 800},
                attachments=None if row is None else attached(row),
                first_position=64 * number,
            )
        )
    return blocks


def hashes(blocks: Sequence[Block]) -> list[BlockHash]:
    return [key.block_hash for key, _ in blocks]


async def put(client: StoreClient, blocks: Sequence[Block]) -> None:
    assert {o.outcome for o in await client.put(blocks)} == {"committed"}


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as made:
        yield made


@pytest.fixture
async def client(store: LocalStore) -> AsyncIterator[StoreClient]:
    async with StoreClient(store.address) as made:
        yield made


def scaled(values: Sequence[float]) -> list[list[float]]:
    return [[value] + [0.0] * (DIM - 1) for value in values]


ONE = [1.0] + [0.0] * (DIM - 1)


async def test_the_golden_example_over_the_wire(client: StoreClient, scope: ScopeDigest) -> None:
    """R6 of papers.md."""
    blocks = chain(scope, scaled([1, 5, 2, 2, 9]))
    await put(client, blocks)
    found = await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=4, chunk=2)
    (selection,) = found.selections
    assert selection.ids == (0, 1, 4)
    assert selection.scores == (1.0, 5.0, 9.0)
    assert (found.absent, found.unrepresented, found.degraded, found.truncated) == (
        (),
        (),
        False,
        False,
    )


async def test_each_query_chooses_for_itself_and_cosine_ignores_length(
    client: StoreClient, scope: ScopeDigest
) -> None:
    rows = [direction(0), [5 * v for v in direction(1.2)], direction(0.3), direction(-0.2)]
    blocks = chain(scope, rows)
    await put(client, blocks)
    queries = [(LAYER, direction(0)), (LAYER, direction(1.0)), (LAYER + 1, direction(0))]
    dot = await client.retrieve(scope, hashes(blocks), queries, top_k=2)
    assert [s.ids for s in dot.selections] == [(0, 1), (1, 2), (0, 1)]
    cosine = await client.retrieve(scope, hashes(blocks), queries, top_k=2, cosine=True)
    assert [s.ids for s in cosine.selections] == [(0, 3), (1, 2), (0, 1)]
    assert cosine.selections[0].scores == pytest.approx([1, math.cos(0.2)], abs=1e-3)
    assert cosine.selections[2].scores == (0.0, 0.0)


async def test_a_query_of_more_heads_is_summed_within_its_group(
    client: StoreClient, scope: ScopeDigest
) -> None:
    blocks = chain(scope, scaled([1, 2, 3]))
    await put(client, blocks)
    query = [*ONE, *(2 * v for v in ONE), *(-1 * v for v in ONE)]
    dot, cosine = [
        await client.retrieve(scope, hashes(blocks), [(LAYER, query)], top_k=3, cosine=is_cosine)
        for is_cosine in (False, True)
    ]
    assert dot.selections[0].scores == (2.0, 4.0, 6.0)
    assert cosine.selections[0].scores == pytest.approx([2 / math.sqrt(6) / math.sqrt(3)] * 3)


async def test_first_and_last_blocks_are_always_chosen_and_ids_ascend(
    client: StoreClient, scope: ScopeDigest
) -> None:
    """R5 of papers.md."""
    blocks = chain(scope, scaled([0, 0, 1, 9, 1, 8, 1, 0]))
    await put(client, blocks)
    found = await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=2, sinks=1, recent=2)
    assert found.selections[0].ids == (0, 3, 5, 6, 7)


async def test_missing_blocks_and_missing_representatives_are_named(
    client: StoreClient, scope: ScopeDigest
) -> None:
    blocks = chain(scope, [None, *scaled([4, 3]), None, *scaled([2, 1]), None])
    await put(client, [b for n, b in enumerate(blocks) if n != 2])
    names = hashes(blocks)
    found = await client.retrieve(scope, names, [(LAYER, ONE)], top_k=2, sinks=1, recent=1)
    assert found.absent == (2,)
    assert found.unrepresented == (0, 3, 6)
    (selection,) = found.selections
    assert selection.ids == (0, 1, 4, 6)  # a sink needs no representative
    assert np.isnan(selection.scores).tolist() == [True, False, False, True]
    other = await client.retrieve(scope, names, [(77, ONE)], top_k=2)
    assert other.unrepresented == (0, 1, 3, 4, 5, 6)
    assert other.selections[0].ids == ()


async def test_the_blocks_of_a_whole_scope_are_found_by_position(
    client: StoreClient, scope: ScopeDigest
) -> None:
    one, two = chain(scope, scaled([1, 5, 2])), chain(scope, scaled([7, 0]), seed=1)
    await put(client, [*two, *one])
    await put(client, chain(ScopeDigest(b"another scope..."), scaled([99])))
    found = await client.retrieve(scope, [], [(LAYER, ONE)], top_k=2)
    wanted = sorted(
        (64 * n, key.block_hash, score)
        for blocks, scores in ((one, [1, 5, 2]), (two, [7, 0]))
        for n, ((key, _), score) in enumerate(zip(blocks, scores, strict=True))
    )
    assert found.hashes == tuple(name for _, name, _ in wanted)
    scores = [score for *_, score in wanted]
    assert found.selections[0].ids == tuple(sorted((scores.index(7), scores.index(5))))
    empty = await client.retrieve(ScopeDigest(b"empty scope ...."), [], [(0, ONE)], top_k=2)
    assert (empty.hashes, empty.selections[0].ids) == ((), ())


async def test_exact_blocks_carry_them_too(client: StoreClient, scope: ScopeDigest) -> None:
    blocks = chain(scope, scaled([1, 3, 2]), stratum=EXACT)
    await put(client, blocks)
    found = await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=1)
    assert found.selections[0].ids == (1,)


async def test_they_are_read_once_and_again_after_a_change(
    store: LocalStore, client: StoreClient, scope: ScopeDigest
) -> None:
    counters = store.running.store.counters
    blocks = chain(scope, scaled([1, 2, 3]))
    await put(client, blocks)
    for _ in range(3):
        await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=1)
    assert counters.get("representatives_read_total") == 3
    await client.delete([blocks[2][0]])
    found = await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=1)
    assert (found.absent, found.selections[0].ids) == ((2,), (1,))
    changed = sample_block(
        scope, 2, parent=blocks[1][0].block_hash, attachments=attached(scaled([0.5])[0])
    )
    assert changed[0] == blocks[2][0]
    await put(client, [changed])
    found = await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=3)
    assert found.selections[0].scores == (1.0, 2.0, 0.5)
    assert counters.get("representatives_read_total") == 4
    assert counters.get("retrieved_blocks_total", result="absent") == 1
    assert counters.get("hits_total") == 0  # a search is no read


async def test_a_bound_below_the_chain_costs_reads_not_answers(scope: ScopeDigest) -> None:
    blocks = chain(scope, scaled(range(12)))
    async with (
        LocalStore(StoreConfig(representative_bytes=2000)) as store,
        StoreClient(store.address) as client,
    ):
        await put(client, blocks)
        for _ in range(2):
            found = await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=3)
            assert found.selections[0].ids == (9, 10, 11)
        # Three entries fit: the second search reads the other nine again.
        assert store.running.store.counters.get("representatives_read_total") == 12 + 9


async def test_another_process_finds_them_in_the_lower_tiers(
    redis: RedisServer, scope: ScopeDigest, tmp_path: Path
) -> None:
    blocks = chain(scope, scaled([3, 1, 2]))
    configs = [
        StoreConfig(redis_url=redis.url, redis_timeout_s=5),
        StoreConfig(ssd_path=str(tmp_path / "ssd")),
    ]
    for config in configs:
        async with LocalStore(config) as first, StoreClient(first.address) as client:
            await put(client, blocks)
        async with LocalStore(config) as second, StoreClient(second.address) as client:
            for names in (hashes(blocks), []):
                found = await client.retrieve(scope, names, [(LAYER, ONE)], top_k=2)
                assert found.selections[0].ids == (0, 2)
                assert found.hashes == tuple(hashes(blocks))


async def test_without_redis_the_answer_says_degraded(
    own_redis: RedisServer, scope: ScopeDigest
) -> None:
    blocks = chain(scope, scaled([3, 1, 2]))
    async with (
        LocalStore(redis_url=own_redis.url) as store,
        StoreClient(store.address) as client,
    ):
        await put(client, blocks)
        await store.running.store.dram.delete([blocks[0][0]])
        own_redis.kill()
        for names in (hashes(blocks), []):
            found = await client.retrieve(scope, names, [(LAYER, ONE)], top_k=3)
            assert found.degraded
            assert len(found.selections[0].ids) == 2


async def test_damaged_representatives_are_not_trusted(
    client: StoreClient, scope: ScopeDigest
) -> None:
    good = chain(scope, scaled([1, 2]))
    bad = sample_block(
        scope, 2, parent=good[1][0].block_hash, attachments={ATTACHMENT: b"\xff" * 20}
    )
    await put(client, [*good, bad])
    found = await client.retrieve(scope, hashes([*good, bad]), [(LAYER, ONE)], top_k=3)
    assert found.selections[0].ids == (0, 1)
    assert found.unrepresented == (2,)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"scope": b"short"}, InvalidRequestError),
        ({"block_hashes": b"x" * 17}, InvalidRequestError),
        ({"block_hashes": b"x" * 16 * 9}, LimitError),
        ({"queries": []}, InvalidRequestError),
        ({"queries": [pb.RetrieveQuery(vector=bytes(4))] * 4}, LimitError),
        ({"queries": [pb.RetrieveQuery()]}, InvalidRequestError),
        ({"queries": [pb.RetrieveQuery(vector=bytes(7))]}, InvalidRequestError),
        ({"queries": [pb.RetrieveQuery(vector=bytes.fromhex("0000c07f"))]}, InvalidRequestError),
        ({"queries": [pb.RetrieveQuery(vector=bytes.fromhex("000080ff"))]}, InvalidRequestError),
        ({"queries": [pb.RetrieveQuery(vector=bytes(12), layer=LAYER)]}, InvalidRequestError),
        ({"top_k": 9}, LimitError),
        ({"top_k": 3, "chunk_blocks": 2}, LimitError),
        ({"top_k": 2**32 - 1}, LimitError),
        ({"sink_blocks": 9}, LimitError),
        ({"recent_blocks": 9}, LimitError),
        ({"top_k": 8, "chunk_blocks": 9}, LimitError),
        ({"similarity": 7}, InvalidRequestError),
    ],
)
async def test_what_cannot_be_answered_is_refused_by_name(
    fields: dict[str, object], error: type[KVStrataError], scope: ScopeDigest
) -> None:
    blocks = chain(scope, scaled([1, 2]))
    async with (
        LocalStore(StoreConfig(limits=StoreLimits(max_hashes=8, max_queries=3))) as store,
        StoreClient(store.address) as client,
    ):
        await put(client, blocks)
        good = {
            "scope": scope,
            "block_hashes": b"".join(hashes(blocks)),
            "queries": [pb.RetrieveQuery(layer=LAYER, vector=bytes(4 * DIM))],
            "top_k": 2,
        }
        with pytest.raises(error) as caught:
            await client._call(client._stub.Retrieve, pb.RetrieveRequest(**(good | fields)))
        assert caught.value.remedy


async def test_a_search_that_takes_too_long_ends_and_goes_on_when_asked_again(
    scope: ScopeDigest, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = chain(scope, scaled(range(300)))
    config = StoreConfig(limits=StoreLimits(max_wait_ms=4_000))
    async with LocalStore(config) as store, StoreClient(store.address) as client:
        await put(client, blocks)
        read, hangs = store.running.store.read, True

        async def hanging(key: BlockKey, strata: Sequence[int]) -> Read:
            if hangs and key == blocks[-1][0]:
                await asyncio.sleep(60)
            return await read(key, strata)

        monkeypatch.setattr(store.running.store, "read", hanging)
        with pytest.raises(DeadlineError, match="256 of 300") as caught:
            await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=1)
        assert "again" in caught.value.remedy
        hangs = False
        found = await client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=1)
        assert found.selections[0].ids == (299,)
        assert store.running.store.counters.get("representatives_read_total") == 300
        assert store.running.workload.in_flight == 0


async def test_a_cancelled_search_leaves_nothing_running(
    store: LocalStore,
    client: StoreClient,
    scope: ScopeDigest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = chain(scope, scaled([1, 2]))
    await put(client, blocks)
    started = asyncio.Event()

    async def hanging(key: BlockKey, strata: Sequence[int]) -> Read:
        started.set()
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(store.running.store, "read", hanging)
    searching = asyncio.create_task(client.retrieve(scope, hashes(blocks), [(LAYER, ONE)], top_k=1))
    await started.wait()
    searching.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.RpcError)):
        await searching
    async with asyncio.timeout(10):
        while store.running.workload.in_flight:
            await asyncio.sleep(0.01)


async def test_a_tenant_finds_its_own_blocks_alone(tmp_path: Path, scope: ScopeDigest) -> None:
    config = StoreConfig(tenants=tenants_file(tmp_path, alice="", bob=""))
    blocks = chain(scope, scaled([1, 5, 2]))
    async with (
        LocalStore(config) as store,
        StoreClient(store.address, credentials=credentials("alice")) as alice,
        StoreClient(store.address, credentials=credentials("bob")) as bob,
    ):
        await put(alice, blocks)
        await put(bob, blocks[:1])
        for names in (hashes(blocks), []):
            found = await alice.retrieve(scope, names, [(LAYER, ONE)], top_k=2)
            assert (found.selections[0].ids, found.absent) == ((1, 2), ())
            found = await bob.retrieve(scope, names, [(LAYER, ONE)], top_k=2, sinks=3)
            assert found.selections[0].ids == (0,)
            assert found.absent == ((1, 2) if names else ())
