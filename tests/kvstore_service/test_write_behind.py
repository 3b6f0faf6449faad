"""What a tier gets after a put was acknowledged, and what becomes of it when it does not answer."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service import write_behind
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.held_frames import strata_of
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.kvstore_service.tier import Tier, TierUnavailableError
from kvstrata.kvstore_service.write_behind import WriteBehind
from kvstrata.protos.errors import CapacityError, InvalidRequestError
from kvstrata.protos.identity import BlockKey, ScopeDigest
from kvstrata.protos.kvstore_pb2 import PutOutcome
from tests.kvstore_service.test_store import SlowTier

BASE, MID = 1, 2


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "_RETRY_S", 0.01)


@pytest.fixture
def slow() -> SlowTier:
    return SlowTier()


@pytest.fixture
async def store(slow: SlowTier) -> AsyncIterator[BlockStore]:
    made = BlockStore(DramTier(1 << 20), [slow])
    yield made
    await made.close()


class Gate:
    """A write that waits until it is let through, and fails as told."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.error: Exception | None = None
        self.written: list[BlockKey] = []

    async def __call__(self, tier: Tier, key: BlockKey, frames: Mapping[int, bytes]) -> None:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        self.written.append(key)


def outcomes(counters: Counters, tier: str = "slow") -> dict[str, int]:
    found = {
        outcome: counters.get(names.WRITTEN_BEHIND, tier=tier, outcome=outcome)
        for outcome in ("written", "dropped", "no_room")
    }
    return {outcome: count for outcome, count in found.items() if count}


async def test_a_put_waits_for_the_named_tier_only(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope, strata={BASE: 400, MID: 400})
    slow.is_down = True
    result = await store.put(key, frames, "dram")
    assert (result.tiers, result.reason) == (("dram",), "")
    assert store.behind_bytes("slow") == sum(map(len, frames.values()))
    slow.is_down = False
    assert await store.flush(5)
    assert await slow.contains([key]) == await store.dram.contains([key])
    assert store.behind_bytes("slow") == 0
    assert outcomes(store.counters) == {"written": 1}


async def test_a_tier_that_was_down_gets_what_it_missed(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, number) for number in range(5)]
    slow.is_down = True
    for key, frames in blocks:
        result = await store.put(key, frames)
        assert (result.outcome, result.tiers) == (PutOutcome.PUT_OUTCOME_COMMITTED, ("dram",))
        assert result.reason == "slow: unplugged"
    assert not await store.flush(0.05)
    slow.is_down = False
    assert await store.flush(5)
    assert None not in await slow.contains([key for key, _ in blocks])


async def test_a_tier_that_does_not_exist_is_refused_before_anything_is_stored(
    store: BlockStore, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    with pytest.raises(InvalidRequestError, match="'tape'") as caught:
        await store.put(key, frames, "tape")
    assert "dram, slow" in caught.value.remedy
    assert await store.dram.contains([key]) == [None]


async def test_a_deleted_block_does_not_come_back(
    store: BlockStore, slow: SlowTier, scope: ScopeDigest
) -> None:
    key, frames = sample_block(scope)
    slow.is_down = True
    await store.put(key, frames, "dram")
    await store.delete([key])
    slow.is_down = False
    assert await store.flush(5)
    assert await slow.contains([key]) == [None]
    assert outcomes(store.counters) == {}


async def test_a_block_that_is_being_written_is_waited_for_before_it_is_forgotten(
    scope: ScopeDigest,
) -> None:
    gate, key = Gate(), sample_block(scope)[0]
    queue = WriteBehind(SlowTier(), gate, Counters(), 1000)
    queue.submit(key, {BASE: b"1"})
    await asyncio.sleep(0.01)
    forgetting = asyncio.create_task(queue.forget([key]))
    await asyncio.sleep(0.01)
    assert not forgetting.done()
    gate.open.set()
    await asyncio.wait_for(forgetting, 5)
    assert gate.written == [key]
    assert await queue.flush(5)


async def test_the_oldest_is_dropped_where_the_bound_is_reached(scope: ScopeDigest) -> None:
    gate, counters = Gate(), Counters()
    gate.error = TierUnavailableError("unplugged")
    gate.open.set()
    queue = WriteBehind(SlowTier(), gate, counters, 100)
    keys = [sample_block(scope, number)[0] for number in range(4)]
    assert not queue.submit(keys[0], {BASE: bytes(101)})
    for key in keys:
        assert queue.submit(key, {BASE: bytes(40)})
        assert queue.num_bytes <= 100
    gate.error = None
    assert await queue.flush(5)
    assert gate.written == keys[2:]
    assert outcomes(counters) == {"written": 2, "dropped": 3}


async def test_a_newer_writing_that_comes_while_the_older_is_written_follows_it(
    scope: ScopeDigest,
) -> None:
    gate, key = Gate(), sample_block(scope)[0]
    queue = WriteBehind(SlowTier(), gate, Counters(), 1000)
    queue.submit(key, {BASE: b"old"})
    await asyncio.sleep(0.01)
    queue.submit(key, {BASE: b"newer"})
    gate.open.set()
    assert await queue.flush(5)
    assert gate.written == [key, key]
    assert queue.num_bytes == 0


async def test_a_full_tier_is_not_tried_again(scope: ScopeDigest) -> None:
    gate, counters = Gate(), Counters()
    gate.error = CapacityError("full")
    gate.open.set()
    queue = WriteBehind(SlowTier(), gate, counters, 1000)
    queue.submit(sample_block(scope)[0], {BASE: b"1"})
    assert await queue.flush(5)
    assert outcomes(counters) == {"no_room": 1}


async def test_what_waits_at_the_end_is_dropped_and_counted(scope: ScopeDigest) -> None:
    gate, counters = Gate(), Counters()
    queue = WriteBehind(SlowTier(), gate, counters, 1000)
    for number in range(3):
        queue.submit(sample_block(scope, number)[0], {BASE: b"1"})
    assert not await queue.flush(0.05)
    await queue.close()
    await queue.close()
    assert outcomes(counters) == {"dropped": 3}
    assert queue.num_bytes == 0


async def test_shed_refinements_are_counted_and_still_found_below(
    slow: SlowTier, scope: ScopeDigest
) -> None:
    blocks = [sample_block(scope, n, strata={BASE: 400, MID: 400}) for n in range(3)]
    size = sum(map(len, blocks[0][1].values()))
    store = BlockStore(DramTier(2 * size), [slow])
    for key, frames in blocks:
        await store.put(key, frames)
    keys = [key for key, _ in blocks]
    held = await store.dram.contains(keys)
    assert {BASE} in [set(sizes or ()) for sizes in held]
    assert store.counters.get(names.SHED_BYTES, tier="dram") > 0
    found = await store.lookup(keys)
    assert [strata_of(mask) for mask in found.strata] == [(BASE, MID)] * 3
    await store.close()


async def test_a_deletion_by_another_process_does_not_end_one_of_ours_that_waits(
    scope: ScopeDigest,
) -> None:
    class DiskTier(SlowTier):
        name = "ssd"

        async def delete(self, keys: Sequence[BlockKey]) -> int:
            self._answer()
            return await super().delete(keys)

    disk = DiskTier()
    store = BlockStore(DramTier(1 << 20), [disk])
    (key, frames), (other, more) = sample_block(scope, 0), sample_block(scope, 1)
    await store.put(key, frames)
    disk.is_down = True
    await store.delete([key])
    await store.put(other, more, "dram")  # waits to be written
    await store.forget_deleted([key, other])
    disk.is_down = False
    assert await store.flush(20)
    assert await disk.contains([key, other]) == [None, None]
    assert await store.get(key, [BASE]) == {BASE: "absent"}
    assert store.counters.get(names.WRITTEN_BEHIND, outcome="deleted") == 1
    await store.close()
