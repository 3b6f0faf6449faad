"""Slots by key against a dict; columns; runs of keys; what is held of many blocks at once."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstrata.kvstore_service.block_run import BlockRun
from kvstrata.kvstore_service.block_table import BlockTable
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.held_frames import strata_mask, strata_of
from kvstrata.kvstore_service.slot_order import SlotLinks, SlotOrder
from kvstrata.kvstore_service.slots import NONE, Slots
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest

SCOPES = [ScopeDigest(bytes([n]) * 16) for n in range(3)]
KEYS = [BlockKey(s, BlockHash(n.to_bytes(16, "big"))) for s in SCOPES for n in range(12)]
BASE, MID, EXACT = 1, 2, 4


class TableMachine(RuleBasedStateMachine):
    """The model is a dict of slots."""

    def __init__(self) -> None:
        super().__init__()
        self.table = BlockTable()
        self.note = self.table.column("Q")
        self.model: dict[BlockKey, int] = {}

    @rule(key=st.sampled_from(KEYS))
    def add_or_remove(self, key: BlockKey) -> None:
        slot = self.table.find(key)
        assert slot == self.model.get(key, NONE)
        if slot != NONE:
            self.table.remove(slot)
            del self.model[key]
            return
        self.model[key] = self.table.add(key)
        self.note[self.model[key]] = hash(key) & 0xFFFF

    @invariant()
    def agrees(self) -> None:
        assert len(self.table) == len(self.model) == len(set(self.model.values()))
        for key, slot in self.model.items():
            assert (self.table.key(slot), self.note[slot]) == (key, hash(key) & 0xFFFF)
        for scope in SCOPES:
            keys = [key for key in KEYS if key.scope == scope]
            run = self.table.find_run(scope, b"".join(key.block_hash for key in keys))
            assert run.tolist() == [self.model.get(key, NONE) for key in keys]
        self.table.check_integrity()


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_table_grows_bucket_by_bucket_and_finds_everything(scope: ScopeDigest) -> None:
    source, table = random.Random(1), BlockTable()
    keys = [BlockKey(scope, BlockHash(source.randbytes(16))) for _ in range(20_000)]
    slots = [table.add(key) for key in keys]
    assert sorted(slots) == list(range(20_000)), "no slot is left out"
    assert table.capacity < 1.07 * 20_000
    hashes = b"".join(key.block_hash for key in keys)
    assert table.find_run(scope, hashes).tolist() == slots
    assert table.find_run(SCOPES[0], hashes).tolist() == [NONE] * 20_000
    table.check_integrity()
    gone = keys[::3]
    for key in gone:
        table.remove(table.find(key))
    table.check_integrity()
    assert {table.find(key) for key in gone} == {NONE}
    assert {table.add(key) for key in gone} == set(slots[::3]), "slots are used again"


def test_an_empty_run_and_an_empty_table(scope: ScopeDigest) -> None:
    table = BlockTable()
    assert table.find_run(scope, b"").tolist() == []
    assert table.find_run(scope, bytes(32)).tolist() == [NONE, NONE]


def test_hashes_that_a_client_chose_do_not_share_a_bucket(scope: ScopeDigest) -> None:
    table = BlockTable()
    for number in range(4096):
        table.add(BlockKey(scope, BlockHash((number << 64).to_bytes(16, "little"))))
    longest = max(sum(1 for _ in chain(table, head)) for head in table._heads)
    assert longest < 20


def chain(table: BlockTable, slot: int) -> Iterator[int]:
    while slot != NONE:
        yield slot
        slot = table._next[slot]


def test_a_column_that_comes_late_is_as_long_as_the_others() -> None:
    slots = Slots()
    early = slots.column("I")
    taken = [slots.take() for _ in range(100)]
    late, objects = slots.column("d"), slots.object_column()
    assert len(early) == len(late) == len(objects) == slots.capacity
    late[taken[-1]], objects[taken[-1]] = 2.5, "x"
    while slots.capacity == len(late):
        slots.take()
        if slots.capacity > 2000:
            break
    assert (late[taken[-1]], objects[taken[-1]]) == (2.5, "x")
    assert len(early) == len(late) == len(objects)


def test_an_order_is_that_of_a_list() -> None:
    source, slots = random.Random(2), Slots()
    order, model = SlotOrder(SlotLinks(slots)), []
    for _ in range(30):
        slots.take()
    for _ in range(2000):
        slot = source.randrange(30)
        if slot in model:
            order.remove(slot)
            model.remove(slot)
        else:
            order.append(slot)
            model.append(slot)
        assert list(order) == model
        assert (order.first, order.last) == ((model[0], model[-1]) if model else (NONE, NONE))
        assert len(order) == len(model)


def test_a_run_is_the_sequence_of_its_keys(scope: ScopeDigest) -> None:
    keys = [BlockKey(scope, BlockHash(bytes([n]) * 16)) for n in range(5)]
    run = BlockRun(scope, b"".join(key.block_hash for key in keys))
    assert list(run) == keys == [run[i] for i in range(5)]
    assert list(run[1:3]) == keys[1:3]
    assert len(run[4:9]) == 1
    with pytest.raises(IndexError):
        run[5]
    for bad in ((b"short", bytes(16)), (scope, bytes(17))):
        with pytest.raises(ValueError, match="16 bytes"):
            BlockRun(ScopeDigest(bad[0]), bad[1])


def test_strata_are_a_mask_and_back() -> None:
    assert strata_mask([]) == 0
    assert strata_mask([BASE, MID, BASE]) == 0b110
    assert strata_of(0b10110) == (BASE, MID, EXACT)


async def test_a_look_at_a_run_tells_what_contains_tells_of_each(scope: ScopeDigest) -> None:
    tier, source = DramTier(1 << 20), random.Random(3)
    made = [sample_block(scope, n, strata={BASE: 400, MID: 100}) for n in range(40)]
    for key, frames in made[::2]:
        await tier.put(key, frames)
    tier.set_partial(made[2][0], True)
    await tier.drop(made[4][0], MID)
    order = [key for key, _ in made]
    source.shuffle(order)
    run = BlockRun(scope, b"".join(key.block_hash for key in order))
    for keys in (order, run):
        held = tier.look(keys)
        sizes = [found or {} for found in await tier.contains(keys)]
        assert [set(strata_of(mask)) for mask in held.strata] == [set(found) for found in sizes]
        assert held.num_bytes.tolist() == [sum(found.values()) for found in sizes]
        assert np.flatnonzero(held.is_partial).tolist() == [order.index(made[2][0])]
    assert tier.look([]).strata.tolist() == []


async def test_a_parent_that_goes_first_leaves_no_slot_behind(scope: ScopeDigest) -> None:
    tier, chain = DramTier(1 << 20), []
    parent: bytes = scope
    for number in range(50):
        chain.append(sample_block(scope, number, parent=parent))
        parent = chain[-1][0].block_hash
    for key, frames in reversed(chain):
        await tier.put(key, frames)
    await tier.check_integrity()
    for key, _ in chain:
        await tier.delete([key])
        await tier.check_integrity()
    assert len(tier._table) == 0


async def test_a_put_that_finds_no_room_leaves_no_slot_behind(scope: ScopeDigest) -> None:
    key, frames = sample_block(scope)
    tier = DramTier(len(frames[BASE]) + 10)
    await tier.put(key, frames)
    await tier.pin([key], 60)
    known = len(tier._table)
    for number in range(1, 20):
        other = sample_block(scope, number, parent=bytes([number]) * 16)
        with pytest.raises(Exception, match="no room"):
            await tier.put(*other)
    assert len(tier._table) == known
    await tier.check_integrity()
