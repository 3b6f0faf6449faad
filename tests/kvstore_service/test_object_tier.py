"""What the object tier promises beyond the contract: sharing, restarts, failures, foreign hands."""

import asyncio
import contextlib
import logging
import os
import random
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.lower_reader import Piece
from kvstrata.kvstore_service.object_name import ROOT, ObjectName
from kvstrata.kvstore_service.object_service import Listed, ObjectService, ReadFailedError
from kvstrata.kvstore_service.object_testing import S3Server
from kvstrata.kvstore_service.object_tier import ObjectTier
from kvstrata.kvstore_service.object_url import check_url
from kvstrata.kvstore_service.server import start_store
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.testing import LocalStore, ManualClock, sample_block
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import CapacityError, ConfigurationError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from tests.kvstore_service.s3_guard import Guard

BASE, MID, FINE = 1, 2, 3
MIB = 1 << 20
Open = Callable[..., Awaitable[ObjectTier]]

pytestmark = pytest.mark.timeout(60)


def key(number: int) -> BlockKey:
    return BlockKey(ScopeDigest(b"s" * 16), BlockHash(number.to_bytes(16, "little")))


class WatchedService(ObjectService):
    """Counts requests, and holds back listings of everything until told."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self.num_lists = 0
        self.lets_list = asyncio.Event()
        self.lets_list.set()

    async def list(self, folder: str) -> AsyncGenerator[list[Listed], None]:
        self.num_lists += 1
        async with contextlib.aclosing(super().list(folder)) as pages:
            async for page in pages:
                if folder == ROOT:
                    await self.lets_list.wait()
                yield page


@pytest.fixture
def url(tmp_path: Path) -> str:
    return (tmp_path / "objects").as_uri()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
async def open_tier(url: str) -> AsyncIterator[Open]:
    """Opens tiers that share the one folder, or what ``at`` names; closes them at the end."""
    opened: list[ObjectTier] = []

    async def open_one(
        at: str | ObjectService = "", *, is_listed: bool = True, **changes: Any
    ) -> ObjectTier:
        service = at if isinstance(at, ObjectService) else ObjectService(at or url, probe_s=0.05)
        settings = {"capacity_bytes": MIB, "max_stratum_bytes": MIB, **changes}
        tier = await ObjectTier(service, **settings).open()
        opened.append(tier)
        if is_listed:
            await until_listed(tier)
        return tier

    yield open_one
    for tier in opened:
        async with asyncio.timeout(10):
            await tier.close()


async def until_listed(tier: ObjectTier) -> None:
    async with asyncio.timeout(10):
        await asyncio.sleep(0)
        while (await tier.usage()).detail:
            await asyncio.sleep(0.005)


def files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in (folder / ROOT).rglob("*") if path.is_file()
    )


# Restarts


async def test_a_restart_finds_blocks_and_their_order(open_tier: Open, folder: Path) -> None:
    first = await open_tier()
    for number in range(4):
        await first.put(key(number), {BASE: b"base%d" % number, MID: b"mid"})
    await first.drop(key(1), MID)
    await first.delete([key(3)])
    await first.close()

    again = await open_tier()
    assert await again.keys(9) == [key(2), key(1), key(0)]
    assert await again.get(key(0), [BASE, MID]) == {BASE: b"base0", MID: b"mid"}
    assert await again.get(key(1), [BASE, MID]) == {BASE: b"base1"}
    assert await again.contains([key(3)]) == [None]
    await again.check_integrity()
    assert len(files(folder)) == 3


async def test_strata_with_a_gap_between_them_are_read_alone(open_tier: Open, s3_url: str) -> None:
    tier = await open_tier(s3_url)
    frames = {BASE: b"base", MID: b"mid", FINE: b"fine!"}
    await tier.put(key(1), frames)
    for wanted in ([FINE, BASE], [MID], [MID, FINE], [FINE, MID, BASE]):
        assert await tier.get(key(1), wanted) == {s: frames[s] for s in wanted}


async def test_a_smaller_capacity_evicts_the_oldest_after_the_listing(open_tier: Open) -> None:
    first = await open_tier()
    for number in range(6):
        await first.put(key(number), {BASE: bytes(1000)})
    await first.close()
    again = await open_tier(capacity_bytes=3500)
    async with asyncio.timeout(5):
        while (await again.usage()).evictions < 3:
            await asyncio.sleep(0.01)
    assert await again.keys(9) == [key(5), key(4), key(3)]
    await again.check_integrity()


@pytest.mark.parametrize("where", ["url", "s3_url"])
async def test_a_restarted_store_serves_from_the_object_tier(
    where: str, request: pytest.FixtureRequest, scope: ScopeDigest
) -> None:
    config = StoreConfig(
        dram_bytes=MIB, object_url=request.getfixturevalue(where), object_bytes=MIB
    )
    block = sample_block(scope, strata={BASE: 4000, MID: 2000})
    async with LocalStore(config) as store, StoreClient(store.address) as client:
        (outcome,) = await client.put([block])
        assert outcome.tiers == ("dram", "object")
    async with LocalStore(config) as store, StoreClient(store.address) as client:
        assert len((await client.lookup(scope, [block[0].block_hash])).blocks) == 1
        fetch = client.get(scope, [block[0].block_hash], [BASE, MID])
        fetched = [stratum async for stratum in fetch]
        assert {f.stratum: bytes(f.frame.payload) for f in fetched if f.frame} == block[1]
        assert {f.tier for f in fetched} == {"object"}
        read = await store.running.store.get(block[0], [BASE])
        assert isinstance(read[BASE], Piece)
        assert read[BASE].tier == "dram"


async def test_while_it_lists_it_says_so_and_works(open_tier: Open, url: str) -> None:
    first = await open_tier()
    await first.put(key(1), {BASE: b"one"})
    await first.put(key(2), {BASE: b"two"})
    await first.put(key(3), {BASE: b"three"})
    await first.close()

    service = WatchedService(url)
    service.lets_list.clear()
    tier = await open_tier(service, is_listed=False)
    await asyncio.sleep(0.05)
    usage = await tier.usage()
    assert usage.healthy
    assert usage.detail == "listing, 0 blocks so far"
    assert await tier.get(key(1), [BASE]) == {BASE: b"one"}
    await tier.put(key(2), {BASE: b"new"})
    await tier.put(key(4), {BASE: b"four"})
    assert await tier.delete([key(3)]) == 1
    service.lets_list.set()
    await until_listed(tier)
    assert await tier.keys(9) == [key(4), key(2), key(1)]
    assert [bool(s) for s in await tier.contains([key(n) for n in range(1, 5)])] == [
        *(True, True, False, True)
    ]
    assert await tier.get(key(2), [BASE]) == {BASE: b"new"}
    await tier.check_integrity()


# Sharing


@pytest.mark.parametrize("where", ["url", "s3_url"])
async def test_two_processes_see_each_others_changes(
    open_tier: Open, where: str, request: pytest.FixtureRequest
) -> None:
    shared: str = request.getfixturevalue(where)
    a, b = await open_tier(shared), await open_tier(shared)
    await a.put(key(1), {BASE: b"from a", MID: b"m"})
    assert await b.contains([key(1)]) == [{BASE: 6, MID: 1}]
    assert await b.get(key(1), [BASE, MID]) == {BASE: b"from a", MID: b"m"}
    await b.put(key(1), {BASE: b"from b!"})
    assert await a.get(key(1), [BASE, MID]) == {BASE: b"from b!"}
    assert await a.contains([key(1)]) == [{BASE: 7}]
    assert await b.delete([key(1)]) == 1
    assert await a.get(key(1), [BASE]) == {}
    assert await a.contains([key(1)]) == [None]
    await a.check_integrity()
    await b.check_integrity()


async def test_a_replacement_never_mixes_writings(open_tier: Open) -> None:
    a, b = await open_tier(), await open_tier()
    seen: set[bytes] = set()

    async def write(tier: ObjectTier, letters: bytes) -> None:
        for number in range(40):
            letter = letters[number % len(letters) :][:1]
            await tier.put(key(1), {BASE: letter * 900, MID: letter * 70})

    async def read(tier: ObjectTier) -> None:
        for _ in range(80):
            frames = await tier.get(key(1), [BASE, MID])
            assert len(set(b"".join(frames.values()))) <= 1
            assert len(frames) in (0, 2)
            seen.update(frame[:1] for frame in frames.values())

    await asyncio.gather(write(a, b"abc"), write(b, b"xyz"), read(a), read(b))
    assert len(seen) > 2


async def test_a_miss_asks_once_and_again_after_a_while(open_tier: Open, url: str) -> None:
    clock = ManualClock()
    service = WatchedService(url)
    tier = await open_tier(service, clock=clock, absent_s=5)
    other = await open_tier()
    asked = service.num_lists
    for _ in range(3):
        assert await tier.get(key(1), [BASE]) == {}
        assert await tier.contains([key(1)]) == [None]
    assert service.num_lists == asked + 1
    await other.put(key(1), {BASE: b"x"})
    assert await tier.contains([key(1)]) == [None]
    clock.advance(5.1)
    assert await tier.contains([key(1)]) == [{BASE: 1}]
    assert service.num_lists == asked + 2


async def test_contains_of_many_blocks_asks_for_few(open_tier: Open, url: str) -> None:
    first = await open_tier()
    for number in range(100):
        await first.put(key(number), {BASE: b"x"})
    service = WatchedService(url)
    tier = await open_tier(service, max_probes=32)
    asked = service.num_lists
    known = [key(number % 100) for number in range(2048)]
    begin = time.monotonic()
    assert all(await tier.contains(known))
    assert time.monotonic() - begin < 0.5
    assert service.num_lists == asked
    assert not any(await tier.contains([key(number) for number in range(1000, 3048)]))
    assert service.num_lists == asked + 32


async def test_a_listing_finds_what_others_wrote_and_deleted(open_tier: Open) -> None:
    tier = await open_tier(relist_s=0.05)
    other = await open_tier()
    await tier.put(key(1), {BASE: b"mine"})
    await other.put(key(2), {BASE: b"theirs"})
    await other.delete([key(1)])
    async with asyncio.timeout(5):
        while await tier.keys(9) != [key(2)]:
            await asyncio.sleep(0.02)
    await tier.check_integrity()


# Room


async def test_the_bound_holds_under_concurrent_churn(open_tier: Open, folder: Path) -> None:
    tier = await open_tier(capacity_bytes=20_000)
    source = random.Random(3)

    async def churn(worker: int) -> None:
        for _ in range(30):
            number = source.randrange(40)
            await tier.put(key(number), {BASE: bytes(source.randrange(1, 2000))})
            await tier.get(key(source.randrange(40)), [BASE])
            assert (await tier.usage()).num_bytes <= 20_000

    await asyncio.gather(*map(churn, range(6)))
    await tier.check_integrity()
    assert sum((folder / path).stat().st_size for path in files(folder)) <= 20_000
    assert (await tier.usage()).evictions


async def test_a_pin_holds_until_its_deadline(open_tier: Open) -> None:
    clock = ManualClock()
    tier = await open_tier(capacity_bytes=1000, clock=clock)
    await tier.put(key(1), {BASE: bytes(900)})
    await tier.pin([key(1)], 10)
    with pytest.raises(CapacityError):
        await tier.put(key(2), {BASE: bytes(900)})
    clock.advance(11)
    assert await tier.put(key(2), {BASE: bytes(900)}) == [key(1)]


async def test_a_stratum_beyond_the_limit_is_neither_written_nor_seen(open_tier: Open) -> None:
    large = await open_tier()
    await large.put(key(1), {BASE: bytes(2000)})
    small = await open_tier(max_stratum_bytes=1000)
    with pytest.raises(CapacityError):
        await small.put(key(2), {BASE: bytes(1001)})
    assert await small.get(key(1), [BASE]) == {}
    assert await large.get(key(1), [BASE]) == {BASE: bytes(2000)}


# Garbage and foreign hands


async def test_garbage_of_a_crash_is_removed_and_live_blocks_stay(
    open_tier: Open, folder: Path
) -> None:
    first = await open_tier()
    await first.put(key(1), {BASE: b"new"})
    await first.put(key(2), {BASE: b"kept"})
    live = files(folder)
    for number, content in ((5, b"older"), (6, b"old")):
        name = ObjectName(key(1), number, "0" * 8, ((BASE, len(content)),))
        (folder / name.path).write_bytes(content)
    again = await open_tier()
    async with asyncio.timeout(5):
        while files(folder) != live:
            await asyncio.sleep(0.01)
    assert await again.get(key(1), [BASE]) == {BASE: b"new"}
    assert await first.get(key(1), [BASE]) == {BASE: b"new"}
    await again.check_integrity()


async def test_a_block_that_is_asked_for_loses_its_garbage_at_once(
    open_tier: Open, folder: Path
) -> None:
    tier, other = await open_tier(), await open_tier()
    await other.put(key(1), {BASE: b"new"})
    live = files(folder)
    (folder / ObjectName(key(1), 5, "0" * 8, ((BASE, 3),)).path).write_bytes(b"old")
    assert await tier.get(key(1), [BASE]) == {BASE: b"new"}
    assert files(folder) == live


async def test_half_written_files_of_a_crash_are_removed_once_they_are_old(
    open_tier: Open, folder: Path
) -> None:
    first = await open_tier()
    await first.put(key(1), {BASE: b"x"})
    (path,) = files(folder)
    old, young, foreign = (folder / f"{path}#1", folder / f"{path}#2", folder / f"{ROOT}/a/b#1")
    foreign.parent.mkdir()
    for left in (old, young, foreign):
        left.write_bytes(b"half")
    for left in (old, foreign):
        os.utime(left, (1, 1))
    await open_tier()
    assert [left.exists() for left in (old, young, foreign)] == [False, True, True]


async def test_foreign_objects_are_neither_served_nor_deleted(
    open_tier: Open, folder: Path
) -> None:
    await (await open_tier()).close()
    valid = ObjectName(key(1), 7, "0" * 8, ((BASE, 3),)).path
    foreign = [
        "notes.txt",
        f"{ROOT}/notes.txt",
        valid.replace(ROOT, "kvstrata-2"),
        valid.replace(".1-3", ".1-03"),
        valid.replace(".1-3", ".1-3.1-3"),
        valid.replace(".1-3", ".0-3"),
        valid.replace(".1-3", ".1-3 (copy)"),
        valid.replace("0" * 8, "0" * 7),
        valid.replace(key(1).encode(), "s3cret"),
        f"{valid}/deeper",
        ObjectName(key(1), 8, "0" * 8, ((BASE, 10**12 - 1),)).path,
    ]
    for path in foreign:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"xyz")
    tier = await open_tier(capacity_bytes=10)
    assert (await tier.usage()).blocks == 0
    assert await tier.get(key(1), [BASE]) == {}
    assert await tier.delete([key(1)]) == 0
    await tier.put(key(2), {BASE: bytes(10)})
    assert all((folder / path).read_bytes() == b"xyz" for path in foreign)


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("wanted", [[BASE], [MID], [BASE, MID]])
async def test_a_truncated_object_is_a_miss_and_goes(
    open_tier: Open, folder: Path, is_known: bool, wanted: list[int]
) -> None:
    tier, other = await open_tier(), await open_tier()
    await (tier if is_known else other).put(key(1), {BASE: bytes(100), MID: bytes(50)})
    (path,) = files(folder)
    (folder / path).write_bytes(bytes(99))
    assert await tier.get(key(1), wanted) == {}
    assert await tier.contains([key(1)]) == [None]
    assert files(folder) == []
    assert (await tier.usage()).healthy
    await tier.put(key(1), {BASE: b"healed"})
    assert await tier.get(key(1), [BASE]) == {BASE: b"healed"}


async def test_damaged_bytes_are_a_miss_and_the_next_put_heals(
    open_tier: Open, folder: Path, scope: ScopeDigest
) -> None:
    tier = await open_tier()
    store = BlockStore(DramTier(MIB), [tier])
    block_key, frames = sample_block(scope, strata={BASE: 4000, MID: 2000})
    await store.put(block_key, frames)
    await store.dram.delete([block_key])
    (path,) = files(folder)
    content = bytearray((folder / path).read_bytes())
    content[-7] ^= 1
    (folder / path).write_bytes(content)
    read = await store.get(block_key, [BASE, MID])
    assert isinstance(read[BASE], Piece)
    assert read[MID] == "corrupt"
    assert await tier.contains([block_key]) == [{BASE: len(frames[BASE])}]
    await store.put(block_key, frames)
    assert await tier.get(block_key, [BASE, MID]) == frames


# Failures


@pytest.fixture
def own_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A service that the test may kill."""
    with S3Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


async def test_a_killed_service_is_noticed_and_found_again(
    open_tier: Open, own_s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bucket = own_s3.make_bucket()
    service = ObjectService(f"s3://{bucket}/p", timeout_s=1, probe_s=0.1)
    tier = await open_tier(service)
    await tier.put(key(1), {BASE: b"x"})
    own_s3.kill()
    begin = time.monotonic()
    with pytest.raises(TierUnavailableError) as failure:
        await tier.get(key(1), [BASE])
    assert time.monotonic() - begin < 3
    begin = time.monotonic()
    for call in (tier.contains([key(1)]), tier.put(key(1), {BASE: b"y"}), tier.delete([key(1)])):
        with pytest.raises(TierUnavailableError):
            await call
    assert time.monotonic() - begin < 0.1
    usage = await tier.usage()
    assert not usage.healthy
    texts = [caplog.text, usage.detail, str(failure.value), repr(failure.value.metadata)]
    assert not any("key-of-tests" in text for text in texts)

    own_s3.restart()
    own_s3.make_bucket(bucket)
    async with asyncio.timeout(30):
        while not (await tier.usage()).healthy or await tier.keys(1):
            await asyncio.sleep(0.05)
    assert await tier.get(key(1), [BASE]) == {}
    await tier.put(key(1), {BASE: b"z"})
    assert await tier.get(key(1), [BASE]) == {BASE: b"z"}
    await tier.check_integrity()


async def test_a_service_that_hangs_is_given_up_in_time(open_tier: Open, own_s3: S3Server) -> None:
    service = ObjectService(f"s3://{own_s3.make_bucket()}", timeout_s=1, probe_s=0.1)
    tier = await open_tier(service, find_s=0.2)
    await tier.put(key(1), {BASE: b"x"})
    own_s3.pause()
    begin = time.monotonic()
    assert await tier.contains([key(1), key(2)]) == [{BASE: 1}, None]
    assert 0.15 < time.monotonic() - begin < 0.8
    with pytest.raises(TierUnavailableError, match="no answer in time"):
        await tier.get(key(1), [BASE])
    assert time.monotonic() - begin < 2
    with pytest.raises(TierUnavailableError):
        await tier.put(key(2), {BASE: b"x"})
    assert time.monotonic() - begin < 2.1
    own_s3.resume()
    async with asyncio.timeout(10):
        while not (await tier.usage()).healthy:
            await asyncio.sleep(0.02)
    assert await tier.get(key(1), [BASE]) == {BASE: b"x"}


async def test_a_store_does_not_start_with_a_service_that_never_answers(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        config = StoreConfig(dram_bytes=MIB, object_url=s3_url, object_timeout_s=0.5)
        begin = time.monotonic()
        with pytest.raises(ConfigurationError, match="no answer in time") as failure:
            await start_store(config)
        assert 0.4 < time.monotonic() - begin < 2
    assert "key-of-tests" not in failure.value.describe()


class BrokenService(WatchedService):
    """Answers everything but reads."""

    async def read(self, path: str, places: Sequence[tuple[int, int]]) -> list[bytes] | None:
        raise ReadFailedError("GenericError: 500 Internal Server Error")


async def test_reads_that_fail_without_the_objects_fault_count_as_the_services(
    open_tier: Open, url: str
) -> None:
    tier = await open_tier(BrokenService(url, probe_s=30))
    await tier.put(key(1), {BASE: b"x"})
    with pytest.raises(TierUnavailableError, match="500"):
        await tier.get(key(1), [BASE])
    assert not (await tier.usage()).healthy


async def test_a_cancelled_put_ends_and_is_accounted(open_tier: Open) -> None:
    tier = await open_tier()
    put = asyncio.create_task(tier.put(key(1), {BASE: bytes(1000)}))
    await asyncio.sleep(0)
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    async with asyncio.timeout(5):
        while not await tier.keys(1):
            await asyncio.sleep(0.005)
    await tier.check_integrity()


@pytest.fixture
def guarded(shared_s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """The S3 service, behind a guard that can refuse writing."""
    with Guard(shared_s3.environment["AWS_ENDPOINT_URL"]) as guard:
        monkeypatch.setenv("AWS_ENDPOINT_URL", guard.url)
        yield guard


async def test_a_bucket_that_may_only_be_read_serves_and_refuses_puts(
    guarded: Guard, s3_url: str, open_tier: Open
) -> None:
    writer = await open_tier(ObjectService(s3_url))
    await writer.put(key(1), {BASE: b"x" * 100})
    await writer.put(key(2), {BASE: b"y" * 100})
    guarded.lets_write = False
    reader = await open_tier(ObjectService(s3_url, probe_s=0.02), is_listed=False)
    async with asyncio.timeout(30):
        while len(await reader.keys(9)) < 2:
            await asyncio.sleep(0.01)
    usage = await reader.usage()
    assert (usage.healthy, usage.blocks) == (False, 2)
    assert usage.detail.startswith("read-only: PermissionDeniedError")
    assert await reader.get(key(1), [BASE]) == {BASE: b"x" * 100}
    assert await reader.contains([key(2), key(3)]) == [{BASE: 100}, None]
    with pytest.raises(CapacityError, match="takes no objects"):
        await reader.put(key(3), {BASE: b"z"})
    for change in (reader.delete([key(1)]), reader.drop(key(1), BASE)):
        with pytest.raises(TierUnavailableError, match="lets nothing be deleted"):
            await change
    assert await reader.get(key(1), [BASE]) == {BASE: b"x" * 100}
    guarded.lets_write = True
    async with asyncio.timeout(30):
        while not (await reader.usage()).healthy:
            await asyncio.sleep(0.02)
    await reader.put(key(3), {BASE: b"z"})
    assert await reader.delete([key(1)]) == 1


async def test_a_bucket_that_becomes_read_only_is_noticed_at_the_next_put(
    guarded: Guard, s3_url: str, open_tier: Open, caplog: pytest.LogCaptureFixture
) -> None:
    tier = await open_tier(ObjectService(s3_url, probe_s=0.02))
    await tier.put(key(1), {BASE: b"x"})
    guarded.lets_write = False
    with pytest.raises(CapacityError, match="takes no objects"):
        await tier.put(key(2), {BASE: b"y"})
    assert await tier.get(key(1), [BASE]) == {BASE: b"x"}
    assert not (await tier.usage()).healthy
    assert "object store is read-only" in caplog.text
    assert "object store is down" not in caplog.text
    guarded.lets_write = True
    async with asyncio.timeout(30):
        while not (await tier.usage()).healthy:
            await asyncio.sleep(0.02)
    await tier.put(key(2), {BASE: b"y"})
    await tier.check_integrity()


async def test_a_store_says_that_its_bucket_is_read_only(
    guarded: Guard, s3_url: str, scope: ScopeDigest
) -> None:
    guarded.lets_write = False
    config = StoreConfig(dram_bytes=MIB, object_url=s3_url)
    async with LocalStore(config) as store, StoreClient(store.address) as client:
        (outcome,) = await client.put([sample_block(scope)])
        assert outcome.tiers == ("dram",)
        assert "object: object store takes no objects" in outcome.reason
        health = (await store.running.stats.tell()).health
        assert health.startswith("degraded: object: read-only: PermissionDenied")


async def test_a_missing_bucket_stops_the_start(open_tier: Open, s3_url: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        await open_tier("s3://there-is-no-such-bucket/p")


async def test_a_store_without_the_library_says_what_to_install(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvstrata.kvstore_service.object_service", None)
    with pytest.raises(ConfigurationError, match=r"kvstrata\[object\]"):
        await start_store(StoreConfig(dram_bytes=MIB, object_url=url))


@pytest.mark.parametrize(
    "bad",
    [
        "s3://AKIA:hunter2@bucket/p",
        "s3://bucket/p?secret=hunter2",
        "az://container/p?sig=hunter2",
        "ftp://user:hunter2@host/p",
        "hunter2",
        "s3://",
        "file://relative/folder",
        "https://hunter2@bucket.s3.amazonaws.com",
    ],
)
def test_a_url_that_is_none_or_has_a_secret_is_refused_unquoted(bad: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        check_url(bad)
    assert "hunter2" not in failure.value.describe()
