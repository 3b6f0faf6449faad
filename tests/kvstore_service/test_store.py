"""Commit rules, lookup, reads over tiers, pins and waits, without a network."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.held_frames import strata_of
from kvstrata.kvstore_service.lower_reader import Piece
from kvstrata.kvstore_service.run_lookup import FoundRun
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.testing import ManualClock, sample_block
from kvstrata.kvstore_service.tier import StratumSizes, TierUnavailableError, TierUsage
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.frame import Frame, encode_frame
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from kvstrata.protos.kvstore_pb2 import PutOutcome

BASE, MID, FINE, EXACT = 1, 2, 3, 4
COMMITTED = PutOutcome.PUT_OUTCOME_COMMITTED
EXISTS = PutOutcome.PUT_OUTCOME_EXISTS
REJECTED = PutOutcome.PUT_OUTCOME_REJECTED
NOTHING = FoundRun(b"", b"", [], False)


class SlowTier(DramTier):
    """A lower tier that counts, takes its time and can be out of reach."""

    name = "slow"
    resident = False

    def __init__(self, capacity_bytes: int = 1 << 20) -> None:
        super().__init__(capacity_bytes)
        self.num_gets = self.num_contains = 0
        self.is_down = False
        self.gate = asyncio.Event()
        self.gate.set()

    def _answer(self) -> None:
        if self.is_down:
            raise TierUnavailableError("unplugged")

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        self._answer()
        self.num_gets += 1
        await self.gate.wait()
        return await super().get(key, strata)

    async def put(self, key: BlockKey, frames: Mapping[int, bytes]) -> list[BlockKey]:
        self._answer()
        return await super().put(key, frames)

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        self._answer()
        self.num_contains += 1
        return await super().contains(keys)

    async def usage(self) -> TierUsage:
        return await super().usage()


@pytest.fixture
def slow() -> SlowTier:
    return SlowTier()


@pytest.fixture
async def store(slow: SlowTier) -> AsyncIterator[BlockStore]:
    made = BlockStore(DramTier(1 << 20), [slow])
    yield made
    for tier in made.tiers:
        await tier.check_integrity()
    await made.close()


def reframe(frame: bytes, **changes: object) -> bytes:
    """Return ``frame`` with other header fields and right checksums."""
    opened = Frame.open(frame)
    header = FrameHeader()
    header.CopyFrom(opened.header)
    for name, value in changes.items():
        if name == "token_ids":
            del header.token_ids[:]
            header.token_ids.extend(value)  # type: ignore[arg-type]
        else:
            setattr(header, name, value)
    return encode_frame(header, {k: bytes(v) for k, v in opened.segments().items()})


@pytest.mark.parametrize("strata", [(BASE,), (BASE, MID), (BASE, MID, FINE), (EXACT,)])
async def test_valid_sets_of_strata_are_committed(
    store: BlockStore, scope: ScopeDigest, strata: tuple[int, ...]
) -> None:
    key, frames = sample_block(scope, strata=dict.fromkeys(strata, 400))
    result = await store.put(key, frames)
    assert (result.outcome, result.tiers, result.reason) == (COMMITTED, ("dram", "slow"), "")
    assert (await store.put(key, frames)).outcome == EXISTS


@pytest.mark.parametrize("strata", [(MID,), (BASE, FINE), (BASE, EXACT), (MID, FINE)])
async def test_other_sets_of_strata_are_rejected(
    store: BlockStore, scope: ScopeDigest, strata: tuple[int, ...]
) -> None:
    key, frames = sample_block(scope, strata=dict.fromkeys(strata, 400))
    result = await store.put(key, frames)
    assert (result.outcome, result.reason.split(":")[0]) == (REJECTED, "strata")


async def test_frames_that_disagree_are_rejected_and_nothing_is_stored(
    store: BlockStore, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    other_key, other = sample_block(scope, 1, strata={BASE: 400, MID: 400})
    rewritten = sample_block(scope, strata={BASE: 400, MID: 400}, seed=1)[1]
    base = frames[BASE]
    torn = bytearray(base)
    torn[-1] ^= 1
    wrong: list[tuple[str, dict[int, bytes]]] = [
        ("identity", other),
        ("identity", {BASE: frames[MID], MID: frames[BASE]}),
        ("identity", {BASE: reframe(base, scope=b"x" * 16)}),
        ("encoding", {BASE: base, MID: rewritten[MID]}),
        ("encoding", {BASE: reframe(base, encoding_id=b"short")}),
        ("corrupt", {BASE: bytes(torn)}),
        ("corrupt", {BASE: base[:-1]}),
        ("corrupt", {BASE: b"junk"}),
        ("tokens", {BASE: reframe(base, token_ids=range(63))}),
        ("tokens", {BASE: reframe(base, token_ids=range(1, 65))}),
        ("tokens", {BASE: reframe(base, parent_hash=b"p" * 16)}),
        ("tokens", {BASE: base, MID: reframe(frames[MID], token_ids=range(1, 65))}),
    ]
    for kind, bad in wrong:
        result = await store.put(key, bad)
        assert (result.outcome, result.reason.split(":")[0]) == (REJECTED, kind)
    assert store.counters.get(names.PUTS, outcome="rejected") == len(wrong)
    assert await store.lookup([key, other_key]) == NOTHING


async def test_lookup_tells_the_longest_run_in_one_round_trip_below(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, n) for n in range(6)]
    for key, frames in blocks:
        if key != blocks[4][0]:
            await store.put(key, frames)
    await store.dram.delete([blocks[1][0], blocks[2][0]])
    slow.num_contains = 0
    found = await store.lookup([key for key, _ in blocks])
    assert [store.tiers[i].name for i in found.tiers] == ["dram", "slow", "slow", "dram"]
    assert found.num_bytes == [len(frames[BASE]) for _, frames in blocks[:4]]
    assert (slow.num_contains, found.degraded) == (1, False)
    assert await store.lookup([]) == NOTHING


async def test_lookup_sees_strata_that_only_a_lower_tier_holds(
    store: BlockStore, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    await store.put(key, frames)
    await store.dram.delete([key])
    await store.get(key, [BASE])
    assert set((await store.dram.contains([key]))[0] or ()) == {BASE}
    found = await store.lookup([key])
    assert [strata_of(mask) for mask in found.strata] == [(BASE, MID)]
    assert found.num_bytes == [sum(map(len, frames.values()))]
    assert [store.tiers[i].name for i in found.tiers] == ["dram"]


async def test_a_read_from_below_is_promoted(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    await store.put(key, frames)
    await store.dram.delete([key])
    assert await store.get(key, [MID]) == {MID: Piece(frames[MID], "slow")}
    assert await store.get(key, [BASE, MID]) == {
        BASE: Piece(frames[BASE], "dram"),
        MID: Piece(frames[MID], "dram"),
    }
    assert slow.num_gets == 1


async def test_concurrent_misses_cause_one_read_below(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    await store.put(key, frames)
    await store.dram.delete([key])
    slow.gate.clear()
    reads = [asyncio.create_task(store.get(key, [BASE])) for _ in range(10)]
    await asyncio.sleep(0.01)
    reads[0].cancel()
    slow.gate.set()
    assert await asyncio.gather(*reads[1:]) == [{BASE: Piece(frames[BASE], "slow")}] * 9
    assert slow.num_gets == 1
    assert store.counters.get(names.SHARED_READS) == 9


async def test_a_block_deleted_during_a_read_is_not_promoted(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    await store.put(key, frames)
    await store.dram.delete([key])
    slow.gate.clear()
    read = asyncio.create_task(store.get(key, [BASE]))
    await asyncio.sleep(0.01)
    assert await store.delete([key]) == 1
    slow.gate.set()
    await read
    assert await store.locate([key]) == ([[]], False)


async def test_strata_of_another_writing_are_never_combined(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, old = sample_block(scope, strata={BASE: 400, MID: 400})
    _, new = sample_block(scope, strata={BASE: 400, MID: 400}, seed=1)
    await store.dram.put(key, {BASE: new[BASE]})
    await slow.put(key, old)
    assert await store.get(key, [MID]) == {MID: "stale_encoding"}
    await slow.drop(key, BASE)
    read = await store.get(key, [BASE, MID])
    assert read == {BASE: Piece(new[BASE], "dram"), MID: "stale_encoding"}
    await store.delete([key])
    await slow.put(key, {BASE: new[BASE], MID: old[MID]})
    assert (await store.get(key, [MID])) == {MID: "stale_encoding"}


async def test_a_whole_writing_below_is_served_where_dram_holds_part_of_another(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, old = sample_block(scope, strata={BASE: 400, MID: 400})
    _, new = sample_block(scope, strata={BASE: 400, MID: 400}, seed=1)
    await slow.put(key, old)
    assert (await store.put(key, new)).outcome == COMMITTED
    await store.dram.drop(key, MID)  # as under pressure
    for tier in (slow.name, "dram"):
        read = await store.get(key, [BASE, MID])
        assert read == {BASE: Piece(old[BASE], tier), MID: Piece(old[MID], tier)}
    await store.dram.check_integrity()


async def test_a_refinement_without_its_base_is_a_miss(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    await slow.put(key, {MID: frames[MID]})
    assert await store.get(key, [MID]) == {MID: "absent"}
    assert await store.lookup([key]) == NOTHING


async def test_a_corrupt_stratum_below_is_a_counted_miss_and_heals_on_put(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    torn = bytearray(frames[MID])
    torn[-1] ^= 1
    await slow.put(key, {BASE: frames[BASE], MID: bytes(torn)})
    read = await store.get(key, [BASE, MID])
    assert (read[BASE], read[MID]) == (Piece(frames[BASE], "slow"), "corrupt")
    assert store.counters.get(names.CORRUPT, tier="slow") == 1
    assert store.counters.get(names.MISSES, reason="corrupt") == 1
    assert await slow.contains([key]) == [{BASE: len(frames[BASE])}]
    assert (await store.put(key, frames)).outcome == COMMITTED
    assert (await store.get(key, [MID]))[MID] == Piece(frames[MID], "dram")


async def test_a_tier_out_of_reach_degrades_and_never_fails(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    slow.is_down = True
    key, frames = sample_block(scope)
    result = await store.put(key, frames)
    assert (result.outcome, result.tiers) == (COMMITTED, ("dram",))
    assert "unplugged" in result.reason
    absent = sample_block(scope, 1)[0]
    found = await store.lookup([key, absent])
    assert (len(found), found.degraded) == (1, True)
    assert await store.get(absent, [BASE]) == {BASE: "tier_unavailable"}
    assert store.counters.get(names.TIER_ERRORS, tier="slow") >= 3
    slow.is_down = False
    assert (await store.put(key, frames)).outcome == COMMITTED


async def test_an_evicted_block_is_told_as_evicted(scope: ScopeDigest) -> None:
    (first, frames), (second, more) = sample_block(scope, 0), sample_block(scope, 1)
    store = BlockStore(DramTier(len(frames[BASE]) + 100))
    await store.put(first, frames)
    await store.put(second, more)
    assert await store.get(first, [BASE]) == {BASE: "evicted"}
    assert store.counters.get(names.EVICTIONS, tier="dram") == 1


async def test_a_block_that_fits_nowhere_is_rejected(scope: ScopeDigest) -> None:
    key, frames = sample_block(scope)
    result = await BlockStore(DramTier(100)).put(key, frames)
    assert (result.outcome, result.reason.split(":")[0]) == (REJECTED, "no_tier")


async def test_a_pin_ends_at_its_deadline(scope: ScopeDigest) -> None:
    clock = ManualClock()
    (first, frames), (second, more) = sample_block(scope, 0), sample_block(scope, 1)
    size = len(frames[BASE])
    store = BlockStore(DramTier(size + 100, clock), clock=clock)
    await store.put(first, frames)
    assert await store.pin([first, second], 10) == [second]
    assert store.pins.usage() == (1, size)
    clock.advance(9.9)
    assert (await store.put(second, more)).outcome == REJECTED
    clock.advance(0.2)
    assert (await store.put(second, more)).outcome == COMMITTED
    assert store.pins.usage() == (0, 0)


async def test_a_repeated_pin_extends_and_never_shortens(scope: ScopeDigest) -> None:
    clock = ManualClock()
    key, frames = sample_block(scope)
    store = BlockStore(DramTier(1 << 20, clock), clock=clock)
    await store.put(key, frames)
    await store.pin([key], 10)
    await store.pin([key], 1)
    clock.advance(5)
    assert store.pins.holds(key)
    await store.unpin([key])
    assert not store.pins.holds(key)


def soon(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_waiting_ends_at_the_commit(store: BlockStore, scope: ScopeDigest) -> None:
    key, frames = sample_block(scope)
    waiting = asyncio.create_task(store.get(key, [BASE], soon(5)))
    await asyncio.sleep(0.02)
    with store.arrivals.writing(key):
        await store.put(key, frames)
    assert await waiting == {BASE: Piece(frames[BASE], "dram")}
    assert store.counters.get(names.WAITS, outcome="committed") == 1


async def test_waiting_sees_what_another_process_committed(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    waiting = asyncio.create_task(store.get(key, [BASE], soon(5)))
    await asyncio.sleep(0.02)
    await slow.put(key, frames)
    assert await waiting == {BASE: Piece(frames[BASE], "slow")}


async def test_waiting_ends_when_the_writer_dies(store: BlockStore, scope: ScopeDigest) -> None:
    key, _ = sample_block(scope)
    with store.arrivals.writing(key):
        waiting = asyncio.create_task(store.get(key, [BASE], soon(5)))
        await asyncio.sleep(0.02)
    assert await waiting == {BASE: "writer_gone"}


async def test_waiting_ends_at_its_deadline(store: BlockStore, scope: ScopeDigest) -> None:
    key, _ = sample_block(scope)
    began = time.monotonic()
    assert await store.get(key, [BASE], soon(0.15)) == {BASE: "wait_expired"}
    assert 0.14 < time.monotonic() - began < 1.0


async def test_waiting_is_over_at_once_for_a_stratum_the_block_does_not_have(
    store: BlockStore, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    await store.put(key, frames)
    assert await store.get(key, [MID], soon(5)) == {MID: "absent"}


async def test_unknown_hashes_do_not_stay_in_memory(store: BlockStore) -> None:
    for number in range(100):
        key = BlockKey(ScopeDigest(b"s" * 16), BlockHash(number.to_bytes(16, "big")))
        await store.get(key, [BASE], soon(0.001))
    assert not store.arrivals._waiters
    assert not store._lower._flights


async def test_a_read_during_a_deletion_brings_no_block_back(scope: ScopeDigest) -> None:
    class HeldTier(SlowTier):
        """Its deletions wait until they are let through."""

        def __init__(self) -> None:
            super().__init__()
            self.is_deleting, self.may_delete = asyncio.Event(), asyncio.Event()

        async def delete(self, keys: Sequence[BlockKey]) -> int:
            self.is_deleting.set()
            await self.may_delete.wait()
            return await super().delete(keys)

    below = HeldTier()
    store = BlockStore(DramTier(1 << 20), [below])
    key, frames = sample_block(scope)
    await store.put(key, frames)
    changed: list[bool] = []
    store.on_changed = lambda keys: changed.append(bool(store.dram.peek(keys[0], [BASE])))
    deleting = asyncio.create_task(store.delete([key]))
    async with asyncio.timeout(20):
        await below.is_deleting.wait()
        assert isinstance((await store.get(key, [BASE]))[BASE], Piece)
        below.gate.clear()
        await store.dram.delete([key])  # as eviction would
        late = asyncio.create_task(store.get(key, [BASE]))
        while below.num_gets < 1:
            await asyncio.sleep(0)
        below.may_delete.set()
        assert await deleting == 1
        below.gate.set()
        await late
    assert (await store.locate([key]))[0] == [[]]
    assert await store.get(key, [BASE]) == {BASE: "absent"}
    assert changed == [False]
    await store.close()


async def test_dram_forgets_a_block_although_the_deletion_below_fails(scope: ScopeDigest) -> None:
    class ReadOnlyTier(SlowTier):
        async def delete(self, keys: Sequence[BlockKey]) -> int:
            raise CapacityError("read-only")

    store = BlockStore(DramTier(1 << 20), [ReadOnlyTier()])
    key, frames = sample_block(scope)
    await store.put(key, frames)
    with pytest.raises(CapacityError):
        await store.delete([key])
    assert await store.dram.contains([key]) == [None]
    await store.close()
