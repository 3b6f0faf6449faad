"""What dram does under pressure: what it sheds, what it keeps, in which order blocks go."""

import random

import psutil
import pytest

from kvstrata.kvstore_service.cold_half import ColdHalf
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.eviction_gittins import GittinsPolicy
from kvstrata.kvstore_service.eviction_lru import LruPolicy
from kvstrata.kvstore_service.slots import Slots
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest

BASE, MID, FINE, EXACT = 1, 2, 3, 4
ALL = {BASE: 400, MID: 400, FINE: 400}

Block = tuple[BlockKey, dict[int, bytes]]


def blocks(
    scope: ScopeDigest, count: int, strata: dict[int, int], *, chained: bool = False
) -> list[Block]:
    made: list[Block] = []
    for number in range(count):
        parent = made[-1][0].block_hash if chained and made else None
        made.append(sample_block(scope, number, strata=strata, parent=parent))
    return made


def size(made: list[Block]) -> int:
    return sum(len(frame) for _, frames in made for frame in frames.values())


def refuse(key: BlockKey, num_bytes: int) -> None:
    raise AssertionError(f"{num_bytes} bytes of {key} were shed")


async def strata_of(tier: DramTier, made: list[Block]) -> list[set[int]]:
    return [set(sizes or ()) for sizes in await tier.contains([key for key, _ in made])]


async def test_fine_then_mid_of_cold_blocks_go_before_any_block(scope: ScopeDigest) -> None:
    made = blocks(scope, 9, ALL)
    tier = DramTier(size(made[:4]))
    told: list[tuple[BlockKey, int]] = []
    tier.on_shed = lambda key, num_bytes: told.append((key, num_bytes))
    for key, frames in made[:4]:
        await tier.put(key, frames)
    assert await tier.put(*made[4]) == []
    assert await strata_of(tier, made[:5]) == [{BASE, MID}] * 4 + [{BASE, MID, FINE}]
    assert told == [(key, len(frames[FINE])) for key, frames in made[:4]]
    assert await tier.put(*made[5]) == []
    held = await strata_of(tier, made[:6])
    assert held[0] == {BASE}
    assert all(BASE in strata for strata in held)
    assert all(FINE not in strata for strata in held[:5])
    await tier.check_integrity()
    evicted = [victim for key, frames in made[6:] * 3 for victim in await tier.put(key, frames)]
    evicted += [v for n in range(20, 40) for v in await tier.put(*sample_block(scope, n))]
    assert evicted
    await tier.check_integrity()


async def test_blocks_that_are_read_keep_their_quality(scope: ScopeDigest) -> None:
    made = blocks(scope, 12, ALL)
    tier = DramTier(size(made[:6]))
    for key, frames in made[:6]:
        await tier.put(key, frames)
    for key, _ in made[:2]:
        await tier.get(key, [BASE])
    for key, frames in made[6:]:
        await tier.put(key, frames)
    held = await strata_of(tier, made)
    assert held[:2] == [{BASE, MID, FINE}] * 2
    assert {BASE} in held[2:6]


async def test_pinned_blocks_are_not_shed(scope: ScopeDigest) -> None:
    made = blocks(scope, 5, ALL)
    tier = DramTier(size(made[:4]))
    for key, frames in made[:4]:
        await tier.put(key, frames)
    await tier.pin([made[0][0], made[1][0]], 60)
    await tier.put(*made[4])
    held = await strata_of(tier, made)
    assert held[:2] == [{BASE, MID, FINE}] * 2
    assert held[2] != {BASE, MID, FINE}
    await tier.check_integrity()


async def test_exact_and_bytes_that_are_no_frames_are_never_shed(scope: ScopeDigest) -> None:
    tier = DramTier(4000)
    tier.on_shed = refuse
    exact = sample_block(scope, 0, strata={EXACT: 1000})
    foreign = BlockKey(scope, BlockHash(b"f" * 16))
    await tier.put(*exact)
    await tier.put(foreign, {BASE: b"b" * 500, MID: b"m" * 500})
    for number in range(1, 4):
        for _ in range(3):
            await tier.put(*sample_block(scope, number, strata={EXACT: 1000}))
            sizes = await tier.contains([exact[0], foreign])
            assert all(held is None or set(held) in ({EXACT}, {BASE, MID}) for held in sizes)


async def test_a_put_without_room_restores_what_was_shed(scope: ScopeDigest) -> None:
    made = blocks(scope, 4, ALL)
    tier = DramTier(size(made[:3]))
    tier.on_shed = refuse
    for key, frames in made[:3]:
        await tier.put(key, frames)
    await tier.pin([key for key, _ in made[1:3]], 60)
    big = sample_block(scope, 9, strata={EXACT: size(made[:2])})
    with pytest.raises(CapacityError):
        await tier.put(*big)
    assert await strata_of(tier, [*made[:3], big]) == [{BASE, MID, FINE}] * 3 + [set()]
    assert await tier.get(made[0][0], [FINE]) == {FINE: made[0][1][FINE]}
    await tier.check_integrity()


async def test_a_block_that_lost_its_base_is_not_shed_to_nothing(scope: ScopeDigest) -> None:
    made = blocks(scope, 4, {BASE: 400, MID: 400})
    tier = DramTier(size(made[:3]))
    for key, frames in made[:3]:
        await tier.put(key, frames)
    await tier.drop(made[0][0], BASE)
    for number in range(10, 14):
        await tier.put(*sample_block(scope, number, strata={BASE: 400, MID: 400}))
        await tier.check_integrity()


@pytest.mark.parametrize("policy", [GittinsPolicy, LruPolicy], ids=["ours", "lru"])
async def test_the_last_block_of_a_chain_goes_first(
    scope: ScopeDigest, policy: type[GittinsPolicy | LruPolicy]
) -> None:
    chain = blocks(scope, 8, {BASE: 400}, chained=True)
    tier = DramTier(size(chain), policy=policy)
    for key, frames in chain:
        await tier.put(key, frames)
    gone = [v for n in range(50, 54) for v in await tier.put(*sample_block(scope, n))]
    in_chain = [key for key in gone if key in {key for key, _ in chain}]
    assert in_chain == [key for key, _ in reversed(chain)][: len(in_chain)]
    assert in_chain


def test_the_hot_half_is_of_what_was_read_last() -> None:
    slots = Slots()
    cold, blocks = ColdHalf(slots), [slots.take() for _ in range(6)]
    for block in blocks:
        cold.put(block, {BASE, MID})
    for block in blocks:
        cold.read(block)
    assert list(cold.holders(MID)) == blocks[:3]
    assert list(cold.holders(FINE)) == []
    cold.remove(blocks[0])
    cold.shed(blocks[1], MID)
    assert list(cold.holders(MID)) == [blocks[2]]


async def test_memory_does_not_grow_with_churn(scope: ScopeDigest) -> None:
    """Mixed sizes around malloc's threshold for its own mappings, the worst case for an arena."""
    source, tier = random.Random(2), DramTier(32 << 20)
    process = psutil.Process()
    fill = bytes(1 << 18)
    resident = []
    for number in range(60_000):
        key = BlockKey(scope, BlockHash(number.to_bytes(16, "big")))
        num_bytes = int(2 ** source.uniform(8, 17.9))
        await tier.put(key, {EXACT: memoryview(fill)[:num_bytes].tobytes()})
        if number % 10_000 == 9999:
            resident.append(process.memory_info().rss)
    assert (await tier.usage()).num_bytes > 31 << 20
    assert max(resident[1:]) < resident[0] + (24 << 20)
