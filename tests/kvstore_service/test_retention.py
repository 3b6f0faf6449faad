"""Hints how long to keep blocks: what they change, how they end, and that they are bounded."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.ranked_leaves import Rank
from kvstrata.kvstore_service.retention_table import RetentionTable, Standing
from kvstrata.kvstore_service.server import RunningStore, start_store
from kvstrata.kvstore_service.testing import ManualClock, sample_block
from kvstrata.protos import retention_pb2
from kvstrata.protos.errors import InvalidRequestError, LimitError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from kvstrata.protos.retention import HIGH, LOW, NORMAL, Retention, read_retention

Block = tuple[BlockKey, dict[int, bytes]]
STRATA = {1: 4000, 2: 2000}
BLOCK_BYTES = sum(map(len, sample_block(ScopeDigest(b"s" * 16), strata=STRATA)[1].values()))
CAPACITY = 21 * BLOCK_BYTES // 2  # ten, whose sizes differ by a few bytes


def block(scope: ScopeDigest, number: int) -> Block:
    return sample_block(scope, number, strata=STRATA)


def some(scope: ScopeDigest, first: int, count: int) -> list[Block]:
    return [block(scope, number) for number in range(first, first + count)]


def hashes(blocks: list[Block]) -> list[BlockHash]:
    return [key.block_hash for key, _ in blocks]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def running(clock: ManualClock) -> AsyncIterator[RunningStore]:
    limits = StoreLimits(max_keep_ms=100_000)
    store = await start_store(StoreConfig(dram_bytes=CAPACITY, limits=limits), clock)
    yield store
    await store.store.dram.check_integrity()
    await store.stop(0)


@pytest.fixture
async def client(running: RunningStore) -> AsyncIterator[StoreClient]:
    async with StoreClient(running.address, timeout_s=60) as made:
        yield made


async def left(running: RunningStore, blocks: list[Block]) -> int:
    """Return how many of the blocks dram holds whole; looking counts as no use."""
    found = await running.store.dram.contains([key for key, _ in blocks])
    return sum(sizes is not None and len(sizes) == len(STRATA) for sizes in found)


async def test_high_blocks_survive_a_flood_whole_until_their_time_is_over(
    running: RunningStore, client: StoreClient, clock: ManualClock, scope: ScopeDigest
) -> None:
    dear = some(scope, 0, 4)
    await client.put(dear, retention=Retention(HIGH, keep_s=60, session="s"))
    await client.put(some(scope, 100, 60))
    assert await left(running, dear) == 4
    clock.advance(61)
    await client.put(some(scope, 200, 60))
    assert await left(running, dear) == 0


async def test_low_blocks_go_before_anything_is_shed(
    running: RunningStore, client: StoreClient, scope: ScopeDigest
) -> None:
    first, cheap = some(scope, 0, 6), some(scope, 50, 4)
    await client.put(first)
    await client.put(cheap, retention=Retention(LOW))
    await client.put(some(scope, 100, 4))
    assert await left(running, first) == 6
    assert await left(running, cheap) == 0


async def test_a_hint_at_the_lookup_holds_for_blocks_that_are_made_later(
    running: RunningStore, client: StoreClient, scope: ScopeDigest
) -> None:
    dear = some(scope, 0, 4)
    hint = Retention(HIGH, keep_s=60, session="s")
    assert not (await client.lookup(scope, hashes(dear), retention=hint)).blocks
    await client.put(dear)
    await client.put(some(scope, 100, 60))
    assert await left(running, dear) == 4


async def test_what_a_released_session_alone_used_goes_first(
    running: RunningStore, client: StoreClient, scope: ScopeDigest
) -> None:
    shared, own = some(scope, 0, 3), some(scope, 50, 3)
    await client.put(own + shared, retention=Retention(session="s"))
    await client.put(some(scope, 100, 4))
    await client.lookup(scope, hashes(shared))
    assert await client.release("s") == 6
    await client.put(some(scope, 200, 3))
    assert (await left(running, own), await left(running, shared)) == (0, 3)
    assert await client.release("s") == 6, "again, and nothing changes"
    assert await client.release("unknown") == 0
    counters = running.store.counters
    assert counters.get(names.RETENTIONS, outcome="normal") == 6
    assert counters.get(names.RELEASED) == 12


async def test_priority_can_be_changed_after_the_fact_and_a_release_taken_back(
    running: RunningStore, client: StoreClient, scope: ScopeDigest
) -> None:
    blocks = some(scope, 0, 3)
    await client.put(blocks, retention=Retention(LOW, session="s"))
    await client.release("s")
    await client.lookup(scope, hashes(blocks[:1]), retention=Retention(HIGH, session="s"))
    await client.put(some(scope, 100, 60))
    assert await left(running, blocks) == 3


async def test_nobody_fills_a_tier_with_high_priority(
    running: RunningStore, client: StoreClient, scope: ScopeDigest
) -> None:
    modest = some(scope, 0, 2)
    await client.put(modest, retention=Retention(HIGH, session="m", account="modest"))
    for number in range(100, 130):
        greedy = Retention(HIGH, session=f"g{number}", account="greedy")
        await client.put([block(scope, number)], retention=greedy)
    plain = some(scope, 500, 5)
    await client.put(plain)
    assert await left(running, modest) == 2
    assert await left(running, plain) == 5
    ranked = running.store.dram.ranked
    assert ranked.high_bytes.total() <= ranked.max_high_bytes == CAPACITY // 2


async def test_the_server_cuts_a_time_that_is_too_long_and_tells_what_holds(
    running: RunningStore, client: StoreClient, clock: ManualClock, scope: ScopeDigest
) -> None:
    key, frames = block(scope, 0)
    await client.put([(key, frames)], retention=Retention(HIGH, keep_s=1e6, session="s"))
    retention = running.store.retention
    assert retention.standing(key) == Standing(HIGH, 1, 100.0)
    await client.put([(key, frames)], retention=Retention(LOW, session="t"))
    assert retention.standing(key) == Standing(HIGH, 2, 100.0)
    clock.advance(101)
    assert retention.standing(key) is None
    assert retention.num_sessions == 0


async def test_bad_hints_are_refused(client: StoreClient, scope: ScopeDigest) -> None:
    for retention in (Retention(session="x" * 129), Retention(account="x" * 129)):
        with pytest.raises(LimitError, match="the limit is 128"):
            await client.lookup(scope, [], retention=retention)
        with pytest.raises(LimitError, match="the limit is 128"):
            await client.put([block(scope, 0)], retention=retention)
    with pytest.raises(LimitError):
        await client.release("x" * 129)
    with pytest.raises(InvalidRequestError, match="no session"):
        await client.release("")
    unknown: Any = 9
    with pytest.raises(InvalidRequestError, match="unknown priority 9"):
        await client.lookup(scope, [], retention=Retention(unknown))


def test_an_unset_priority_is_normal() -> None:
    assert read_retention(retention_pb2.Retention(session="s")) == Retention(session="s")
    assert read_retention(Retention(LOW, 3.0, "s", "a").message()) == Retention(LOW, 3.0, "s", "a")


def test_the_table_is_bounded_and_forgets_everything(scope: ScopeDigest) -> None:
    counters, clock = Counters(), ManualClock()
    table = RetentionTable(counters, clock, max_uses=100)
    told: set[BlockKey] = set()
    table.on_changed = told.update
    keys = [block(scope, number)[0] for number in range(60)]
    table.note("t", Retention(HIGH, 10.0, "s"), keys)
    table.note("t", Retention(HIGH, 20.0), keys)
    table.note("t", Retention(HIGH, 20.0, "late"), keys)
    assert counters.get(names.RETENTIONS, outcome="high") == 100
    assert counters.get(names.RETENTIONS, outcome="refused") == 80
    assert told == set(keys)
    for _ in range(1000):
        table.note("t", Retention(HIGH, 10.0, "s"), keys[:1])
    assert len(table._ends) < 100
    clock.advance(11)
    told.clear()
    table.expire()
    assert told == set(keys)
    assert [table.rank(key) for key in (keys[0], keys[59])] == [Rank(HIGH, ("t", "")), None]
    clock.advance(11)
    table.expire()
    assert table.num_sessions == 0
    assert not table._users
    assert table._num_uses == 0


def test_sessions_without_a_block_are_not_kept(scope: ScopeDigest) -> None:
    table = RetentionTable(Counters(), ManualClock(), max_uses=100)
    for number in range(1000):
        table.note("t", Retention(HIGH, 10.0, f"s{number}"), [])
    assert (table.num_sessions, len(table._ends)) == (0, 0)
    key, _ = block(scope, 0)
    table.note("t", Retention(HIGH, 10.0, "s"), [key])
    table.note("t", Retention(LOW, 10.0, "s"), [])  # a short prompt of the same session
    assert table.rank(key) == Rank(LOW, ("t", ""))


def test_a_session_has_no_more_blocks_than_can_be_ranked_anew_in_a_moment(
    scope: ScopeDigest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.kvstore_service.retention_table.MAX_SESSION_BLOCKS", 3)
    counters = Counters()
    table = RetentionTable(counters, ManualClock())
    keys = [block(scope, number)[0] for number in range(5)]
    table.note("t", Retention(HIGH, 10.0, "s"), keys)
    table.note("t", Retention(HIGH, 10.0, "other"), keys[3:])
    assert table.release("t", "", "s") == 3
    assert counters.get(names.RETENTIONS, outcome="refused") == 2
    assert [table.rank(key) for key in keys[2:]] == [Rank(LOW, ("t", ""))] + [
        Rank(HIGH, ("t", ""))
    ] * 2


def test_a_use_without_a_hint_is_never_below_normal(scope: ScopeDigest) -> None:
    table = RetentionTable(Counters(), ManualClock())
    key = block(scope, 0)[0]
    table.note("t", Retention(LOW, 10.0, "s"), [key])
    assert table.rank(key) == Rank(LOW, ("t", ""))
    table.note_use([key])
    assert table.rank(key) is None
    assert table.standing(key) == Standing(NORMAL, 1, 10.0)
