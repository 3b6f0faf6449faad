"""Hypothesis plays every sequence of calls that it can think of, against models of a few lines.

``KVSTRATA_FUZZ`` (see ``make fuzz``) lets it think longer.
"""

import asyncio
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.held_frames import strata_of
from kvstrata.kvstore_service.lease_table import LeaseTable
from kvstrata.kvstore_service.lower_reader import Piece
from kvstrata.kvstore_service.pin_table import PinTable
from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_tier import RedisTier
from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tenants import Tenant
from kvstrata.kvstore_service.testing import ManualClock, RedisServer, sample_block
from kvstrata.kvstore_service.tier import StratumSizes, Tier, TierUnavailableError
from kvstrata.protos.errors import CapacityError, ThrottledError
from kvstrata.protos.frame import open_head
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest

T = TypeVar("T")
BASE, MID, EXACT = 1, 2, 4
SCOPE = ScopeDigest(b"s" * 16)
SUBSETS = ({BASE: 500}, {BASE: 500, MID: 300}, {EXACT: 900})
THINK = max(1, min(10, int(os.environ.get("KVSTRATA_FUZZ", 20_000)) // 20_000))

numbers = st.integers(0, 7)
few = st.integers(0, 2)
seeds = st.integers(0, 1)
subsets = st.sampled_from(range(len(SUBSETS)))
durabilities = st.sampled_from(["", "dram", "redis", "ssd"])
ttls = st.sampled_from([0.5, 2.0, 60.0])


def _chain() -> list[BlockHash]:
    """Return the hashes of a prompt of eight blocks, so that some come before others."""
    hashes: list[BlockHash] = []
    for number in range(8):
        parent = hashes[-1] if hashes else None
        hashes.append(sample_block(SCOPE, number, parent=parent)[0].block_hash)
    return hashes


CHAIN = _chain()
KEYS = [BlockKey(SCOPE, name) for name in CHAIN]


def block(number: int, seed: int, subset: int) -> dict[int, bytes]:
    parent = CHAIN[number - 1] if number else None
    key, frames = sample_block(SCOPE, number, parent=parent, seed=seed, strata=SUBSETS[subset])
    assert key == KEYS[number]
    return frames


def loose_block(number: int, seed: int, subset: int) -> dict[int, bytes]:
    """A block that comes after no other, so that any may be evicted first."""
    return sample_block(SCOPE, 100 + number, seed=seed, strata=SUBSETS[subset])[1]


LOOSE_KEYS = [sample_block(SCOPE, 100 + number)[0] for number in range(8)]


def size(frames: Mapping[int, bytes]) -> int:
    return sum(map(len, frames.values()))


SIZE = size(block(0, 0, 1))


class Machine(RuleBasedStateMachine):
    """A machine with an event loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def teardown(self) -> None:
        self.loop.close()


class TierMachine(Machine):
    """One bounded tier against a dict: what it did not tell as evicted it still has."""

    capacity: ClassVar[int] = 4 * SIZE + 200
    sheds: ClassVar[bool] = False
    tier: Tier

    def open(self) -> Tier:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.blocks: dict[int, dict[int, bytes]] = {}
        self.pinned: set[int] = set()
        self.tier = self.open()

    def _forget(self, victims: Sequence[BlockKey], of: int = -1) -> None:
        for key in victims:
            number = KEYS.index(key)
            assert number not in self.pinned, "a pinned block was evicted"
            assert number != of, "a block made room for itself"
            del self.blocks[number]

    @rule(number=numbers, seed=seeds, subset=subsets)
    def put(self, number: int, seed: int, subset: int) -> None:
        frames = block(number, seed, subset)
        others = [size(f) for n, f in self.blocks.items() if n in self.pinned and n != number]
        try:
            victims = self.run(self.tier.put(KEYS[number], frames))
        except CapacityError:
            assert sum(others) + size(frames) > self.free_bytes, "there was room"
            return
        self._forget(victims, of=number)
        self.blocks[number] = frames

    @property
    def free_bytes(self) -> int:
        return self.capacity

    @rule(number=numbers, wanted=st.sampled_from([[BASE], [MID], [BASE, MID], [EXACT, BASE, MID]]))
    def get(self, number: int, wanted: list[int]) -> None:
        found = self.run(self.tier.get(KEYS[number], wanted))
        have = self.blocks.get(number, {})
        for stratum in wanted:
            if stratum in found:
                assert found[stratum] == have[stratum]
            elif not (self.sheds and stratum == MID):
                assert stratum not in have, "lost without a word"

    @rule()
    def contains(self) -> None:
        for number, sizes in enumerate(self.run(self.tier.contains(KEYS))):
            have = {s: len(f) for s, f in self.blocks.get(number, {}).items()}
            if self.sheds and sizes is not None and MID not in sizes:
                have.pop(MID, None)
            assert (sizes or {}) == have

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        assert self.run(self.tier.delete([KEYS[number]])) == (number in self.blocks)
        self.blocks.pop(number, None)
        self.pinned.discard(number)

    @rule(number=numbers, stratum=st.sampled_from([BASE, MID, EXACT]))
    def drop(self, number: int, stratum: int) -> None:
        self.run(self.tier.drop(KEYS[number], stratum))
        have = self.blocks.get(number, {})
        have.pop(stratum, None)
        if number in self.blocks and (not have or (set(have) == {MID} and self.is_gone(number))):
            del self.blocks[number]
        if number not in self.blocks:
            self.pinned.discard(number)

    def is_gone(self, number: int) -> bool:
        return self.run(self.tier.contains([KEYS[number]])) == [None]

    @rule(number=numbers)
    def pin(self, number: int) -> None:
        self.run(self.tier.pin([KEYS[number]], 600))
        if number in self.blocks:
            self.pinned.add(number)

    @rule(number=numbers)
    def unpin(self, number: int) -> None:
        self.run(self.tier.unpin([KEYS[number]]))
        self.pinned.discard(number)

    @rule()
    def restart(self) -> None:
        """Another process takes over; only some tiers outlive that."""

    @invariant()
    def accounts_hold(self) -> None:
        if hasattr(self, "tier"):
            self.run(self.tier.check_integrity())
            usage = self.run(self.tier.usage())
            assert usage.num_bytes <= usage.capacity_bytes

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.run(self.tier.close())
        super().teardown()


class DramMachine(TierMachine):
    """Dram sheds MID of cold blocks before it evicts."""

    sheds = True

    def open(self) -> Tier:
        return DramTier(self.capacity)


class SsdMachine(TierMachine):
    """Ssd counts in units of 4 KiB, and is found again after a restart."""

    capacity = 4 * 4096

    def open(self) -> Tier:
        self.folder = tempfile.TemporaryDirectory(prefix="kvstrata-machine-")
        return self._reopen()

    def _reopen(self) -> Tier:
        tier = SsdTier(
            f"{self.folder.name}/ssd", capacity_bytes=self.capacity, max_stratum_bytes=1 << 20
        )
        return self.run(tier.open())

    @property
    def free_bytes(self) -> int:
        return 0  # files are rounded up: room is the contract suite's matter

    @rule()
    def restart(self) -> None:
        self.run(self.tier.close())
        self.tier = self._reopen()
        self.pinned.clear()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            self.folder.cleanup()


class RedisMachine(TierMachine):
    """Redis is shared: after a restart another process sees blocks, order and pins."""

    sheds = True
    server: ClassVar[RedisServer]

    def open(self) -> Tier:
        tier = self._connect()

        async def flush() -> None:
            async with tier.connection.use() as redis:
                await redis.flushall()

        self.run(flush())
        return tier

    def _connect(self) -> RedisTier:
        connection = RedisConnection(self.server.url, timeout_s=30)
        return RedisTier(
            connection, capacity_bytes=self.capacity, ttl_s=600, max_stratum_bytes=1 << 20
        )

    @rule()
    def restart(self) -> None:
        self.run(self.tier.close())
        self.tier = self._connect()


class UnsteadyTier(DramTier):
    """A lower tier that is out of reach when told, and loses what it is told to lose."""

    resident = False

    def __init__(self, name: str, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self.name = name
        self.is_down = False

    def _answer(self) -> None:
        if self.is_down:
            raise TierUnavailableError("unplugged")

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        self._answer()
        return await super().get(key, strata)

    async def put(self, key: BlockKey, frames: Mapping[int, bytes]) -> list[BlockKey]:
        self._answer()
        return await super().put(key, frames)

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        self._answer()
        return await super().contains(keys)

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        self._answer()
        return await super().delete(keys)


class StoreMachine(Machine):
    """Three tiers as one store: which blocks exist, where, and what is served of them.

    Some tiers are down at times and small, so most may be lost; but nothing that was deleted comes
    back while all tiers answer, nothing is served that was not put, one reply never mixes writings,
    and what a Lookup tells, a Get delivers.
    """

    @initialize()
    def start(self) -> None:
        self.clock = ManualClock()
        self.lower = [UnsteadyTier("redis", 2 * SIZE), UnsteadyTier("ssd", 20 * SIZE)]
        self.store = BlockStore(DramTier(2 * SIZE + 200, self.clock), self.lower, self.clock)
        self.written: dict[int, set[bytes]] = {}
        self.safe: set[int] = set()  # acknowledged in ssd, which is large and loses nothing

    @rule(
        puts=st.lists(st.tuples(few, seeds, subsets, durabilities), min_size=5, max_size=30),
    )
    def put(self, puts: list[tuple[int, int, int, str]]) -> None:
        for number, seed, subset, durability in puts:
            frames = loose_block(number, seed, subset)
            self.written.setdefault(number, set()).update(frames.values())
            result = self.run(self.store.put(LOOSE_KEYS[number], frames, durability))
            if "ssd" in result.tiers:
                self.safe.add(number)

    @rule(number=few, wanted=st.sampled_from([[BASE], [BASE, MID], [MID], [EXACT]]))
    def get(self, number: int, wanted: list[int]) -> None:
        read = self.run(self.store.get(LOOSE_KEYS[number], wanted))
        frames = [found.frame for found in read.values() if isinstance(found, Piece)]
        assert all(frame in self.written[number] for frame in frames), "not what was put"
        refining = {s: f.frame for s, f in read.items() if isinstance(f, Piece) and s != EXACT}
        writings = {open_head(frame)[0].encoding_id for frame in refining.values()}
        assert len(writings) <= 1, "writings were mixed"
        if len(frames) < len(wanted) and wanted != [MID] and not any(t.is_down for t in self.lower):
            for tier in self.lower:  # a tier's own strata are of one writing
                (sizes,) = self.run(tier.contains([LOOSE_KEYS[number]]))
                assert not set(wanted) <= set(sizes or {}), "whole there, but not here"

    @rule(number=few)
    def delete(self, number: int) -> None:
        everything_answers = not any(tier.is_down for tier in self.lower)
        self.run(self.store.delete([LOOSE_KEYS[number]]))
        self.safe.discard(number)
        if everything_answers:
            self.written.pop(number, None)
            read = self.run(self.store.get(LOOSE_KEYS[number], [BASE, MID]))
            assert not any(isinstance(found, Piece) for found in read.values())

    @rule(count=st.integers(1, 8), lease_s=st.sampled_from([0.0, 5.0]))
    def lookup(self, count: int, lease_s: float) -> None:
        found = self.run(self.store.lookup(LOOSE_KEYS[:count], lease_s))
        anyone_is_down = any(tier.is_down for tier in self.lower)
        assert anyone_is_down or not found.degraded
        for number, mask in enumerate(found.strata):
            sizes = strata_of(mask)
            assert {BASE, EXACT} & set(sizes)
            if not anyone_is_down:
                wanted = [EXACT] if EXACT in sizes else [BASE]
                read = self.run(self.store.get(LOOSE_KEYS[number], wanted))
                assert isinstance(read[wanted[0]], Piece), "told, but not there"

    @precondition(lambda self: self.safe and not any(t.is_down for t in self.lower))
    @rule(data=st.data())
    def safe_blocks_are_there(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.safe)))
        (sizes,) = self.run(self.lower[1].contains([LOOSE_KEYS[number]]))
        assert sizes is not None, "an acknowledged block"
        read = self.run(self.store.get(LOOSE_KEYS[number], list(sizes)))
        assert all(isinstance(found, Piece) for found in read.values()), "not all of it"

    @rule(which=st.integers(0, 1), is_down=st.booleans())
    def unplug(self, which: int, is_down: bool) -> None:
        self.lower[which].is_down = is_down

    @rule(number=few, ttl_s=ttls)
    def pin(self, number: int, ttl_s: float) -> None:
        self.run(self.store.pin([LOOSE_KEYS[number]], ttl_s))

    @rule(seconds=st.sampled_from([0.4, 3.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def accounts_hold(self) -> None:
        if hasattr(self, "store"):
            for tier in self.store.tiers:
                self.run(tier.check_integrity())

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.run(self.store.close())
        super().teardown()


class PromiseMachine(RuleBasedStateMachine):
    """Pins and leases against a dict of deadlines: none ends early, none outlives its time."""

    @initialize()
    def start(self) -> None:
        self.clock = ManualClock()
        self.pins, self.leases = PinTable(self.clock), LeaseTable(self.clock)
        self.until: dict[str, dict[int, float]] = {"pin": {}, "lease": {}}

    def _extend(self, kind: str, number: int, ttl_s: float) -> None:
        known = self.until[kind]
        known[number] = max(known.get(number, 0.0), self.clock.now_s + ttl_s)

    @rule(number=numbers, ttl_s=ttls)
    def pin(self, number: int, ttl_s: float) -> None:
        self.pins.add(KEYS[number], ttl_s, 10)
        self._extend("pin", number, ttl_s)

    @rule(first=numbers, count=st.integers(0, 4), ttl_s=ttls)
    def lease(self, first: int, count: int, ttl_s: float) -> None:
        self.leases.add(KEYS[first : first + count], ttl_s)
        for number in range(first, min(first + count, len(KEYS))):
            self._extend("lease", number, ttl_s)

    @rule(number=numbers)
    def unpin(self, number: int) -> None:
        self.pins.remove(KEYS[number])
        self.until["pin"].pop(number, None)

    @rule(number=numbers)
    def forget(self, number: int) -> None:
        self.leases.forget([KEYS[number]])
        self.until["lease"].pop(number, None)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.5, 59.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def each_holds_until_its_deadline(self) -> None:
        if not hasattr(self, "until"):
            return
        alive = {
            kind: {n for n, end in ends.items() if end > self.clock.now_s}
            for kind, ends in self.until.items()
        }
        assert {n for n in range(8) if self.pins.holds(KEYS[n])} == alive["pin"]
        assert {n for n in range(8) if self.leases.holds(KEYS[n])} == alive["lease"]
        assert self.pins.usage() == (len(alive["pin"]), 10 * len(alive["pin"]))
        assert self.leases.usage() == len(alive["lease"])


class Keeper:
    """A store that forgets what it is told to."""

    def __init__(self, pins: PinTable) -> None:
        self.pins = pins
        self.deleted: list[BlockKey] = []

    async def delete(self, keys: Sequence[BlockKey], *, reason: str) -> int:
        assert reason
        self.deleted += keys
        return len(keys)


class QuotaMachine(Machine):
    """A tenant's quota against a list of its blocks, the coldest first."""

    LIMIT: ClassVar[int] = 100

    @initialize()
    def start(self) -> None:
        self.clock = ManualClock()
        self.keeper = Keeper(PinTable(self.clock))
        self.quotas = Quotas(Counters(), self.clock)
        self.tenant = Tenant("t", b"h" * 32, quota_bytes=self.LIMIT, in_flight_bytes=150)
        self.blocks: OrderedDict[int, int] = OrderedDict()

    @rule(number=numbers, num_bytes=st.sampled_from([10, 40, 90, 101]), keep=st.booleans())
    def put(self, number: int, num_bytes: int, keep: bool) -> None:
        try:
            self.quotas.check_put(self.tenant, num_bytes)
        except ThrottledError:
            assert num_bytes > self.LIMIT
            return
        assert num_bytes <= self.LIMIT
        self.keeper.deleted.clear()
        pinned = sum(
            size
            for n, size in self.blocks.items()
            if n != number and self.keeper.pins.holds(KEYS[n])
        )

        async def take() -> None:
            usage = self.quotas.of(self.tenant)
            with usage.in_flight(num_bytes):
                async with self.quotas.room(
                    self.tenant, KEYS[number], num_bytes, self.keeper
                ) as room:
                    assert usage.in_flight_bytes == num_bytes
                    assert usage.stored_bytes <= self.LIMIT
                    room.kept = keep

        try:
            self.run(take())
        except ThrottledError:
            assert pinned + num_bytes > self.LIMIT, "there was room"
            assert self.keeper.deleted == []
            return
        given_up = [KEYS.index(key) for key in self.keeper.deleted]
        loose = [n for n in self.blocks if n != number and not self.keeper.pins.holds(KEYS[n])]
        assert given_up == loose[: len(given_up)], "not the coldest"
        for n in given_up:
            del self.blocks[n]
        previous = self.blocks.pop(number, None)
        if keep:
            self.blocks[number] = num_bytes
        elif previous is not None:
            self.blocks[number] = previous

    @rule(number=numbers)
    def touch(self, number: int) -> None:
        self.quotas.of(self.tenant).touch(KEYS[number])
        if number in self.blocks:
            self.blocks.move_to_end(number)

    @rule(number=numbers)
    def remove(self, number: int) -> None:
        self.quotas.of(self.tenant).remove([KEYS[number]])
        self.blocks.pop(number, None)

    @rule(number=numbers, ttl_s=ttls)
    def pin(self, number: int, ttl_s: float) -> None:
        self.keeper.pins.add(KEYS[number], ttl_s)

    @rule(seconds=st.sampled_from([0.4, 3.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def counts_hold(self) -> None:
        if hasattr(self, "blocks"):
            usage = self.quotas.of(self.tenant)
            assert usage.stored_bytes == sum(self.blocks.values())
            assert [KEYS.index(key) for key in usage._blocks] == list(self.blocks)
            assert usage.in_flight_bytes == 0


def machine(kind: type[RuleBasedStateMachine], examples: int, steps: int) -> Any:
    """Return the test case of a machine, its number of examples grown by ``THINK``."""
    case = kind.TestCase
    case.settings = settings(
        max_examples=examples * THINK,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=THINK == 1,
    )
    return case


@pytest.fixture(scope="module", autouse=True)
def quick_disks() -> Iterator[None]:
    """Nothing crashes here, so nothing need be on disk."""
    fsync: Callable[[int], None] = os.fsync
    os.fsync = lambda fd: None
    yield
    os.fsync = fsync


@pytest.fixture(scope="module", autouse=True)
def own_server() -> Iterator[None]:
    with RedisServer() as server:
        RedisMachine.server = server
        yield


TestDram = machine(DramMachine, 60, 40)
TestSsd = machine(SsdMachine, 8, 25)
TestRedis = machine(RedisMachine, 12, 25)
TestStore = machine(StoreMachine, 60, 40)
TestPromises = machine(PromiseMachine, 60, 30)
TestQuota = machine(QuotaMachine, 60, 30)
