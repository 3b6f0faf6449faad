"""What the ssd tier promises beyond the contract: restarts, damage, failing disks, races."""

import asyncio
import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.lower_reader import Piece
from kvstrata.kvstore_service.ssd_claim import MARKER, FolderInUseError
from kvstrata.kvstore_service.ssd_file import SsdFile
from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.testing import LocalStore, ManualClock, sample_block
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import CapacityError, ConfigurationError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest

BASE, MID, FINE = 1, 2, 3
MIB = 1 << 20
Open = Callable[..., Awaitable[SsdTier]]

pytestmark = pytest.mark.timeout(60)


def key(number: int) -> BlockKey:
    return BlockKey(ScopeDigest(b"s" * 16), BlockHash(number.to_bytes(16, "little")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ssd"


@pytest.fixture
async def open_tier(folder: Path) -> AsyncIterator[Open]:
    """Opens tiers in the one folder; closes those that the test left open."""
    opened: list[SsdTier] = []

    async def open_one(**changes: Any) -> SsdTier:
        settings = {
            "capacity_bytes": MIB,
            "max_stratum_bytes": MIB,
            "fsync": False,
            "probe_s": 0.02,
        }
        tier = await SsdTier(str(folder), **{**settings, **changes}).open()
        opened.append(tier)
        return tier

    yield open_one
    for tier in opened:
        async with asyncio.timeout(10):
            await tier.close()


@pytest.fixture
async def tier(open_tier: Open) -> SsdTier:
    return await open_tier()


def files(folder: Path) -> list[Path]:
    """Return every file under the folder but the marker."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path.name != MARKER)


async def until_healthy(tier: SsdTier) -> None:
    async with asyncio.timeout(10):
        while not (await tier.usage()).healthy:
            await asyncio.sleep(0.01)


# Restarts


async def test_a_restart_finds_blocks_strata_and_order_of_use(
    open_tier: Open, folder: Path
) -> None:
    first = await open_tier(touch_s=0)
    for number in range(4):
        await first.put(key(number), {BASE: b"base%d" % number, MID: b"mid"})
        await asyncio.sleep(0.02)
    await first.get(key(0), [BASE])
    await first.drop(key(1), MID)
    await first.drop(key(2), BASE)
    await first.delete([key(3)])
    await first.close()

    again = await open_tier()
    assert await again.keys(9) == [key(0), key(2), key(1)]
    assert await again.get(key(0), [BASE, MID]) == {BASE: b"base0", MID: b"mid"}
    assert await again.get(key(1), [BASE, MID]) == {BASE: b"base1"}
    assert await again.get(key(2), [BASE, MID]) == {MID: b"mid"}
    assert await again.contains([key(3)]) == [None]
    assert not again.mended
    await again.put(key(4), {BASE: b"newest"})
    numbers = {found.number for path in files(folder) if (found := SsdFile.parse(path.name))}
    assert max(numbers) == 3
    await again.check_integrity()


async def test_the_time_of_use_is_written_once_in_a_while(open_tier: Open, folder: Path) -> None:
    clock = ManualClock()
    tier = await open_tier(touch_s=300, clock=clock)
    await tier.put(key(1), {BASE: b"x"})
    (path,) = files(folder)
    os.utime(path, (1, 1))
    await tier.get(key(1), [BASE])
    await asyncio.sleep(0.05)
    assert path.stat().st_mtime == 1
    clock.advance(301)
    await tier.get(key(1), [BASE])
    async with asyncio.timeout(10):
        while path.stat().st_mtime == 1:
            await asyncio.sleep(0.01)


async def test_a_smaller_capacity_evicts_the_least_recently_used_at_start(open_tier: Open) -> None:
    first = await open_tier()
    for number in range(6):
        await first.put(key(number), {BASE: bytes(4096)})
        await asyncio.sleep(0.01)
    await first.close()
    again = await open_tier(capacity_bytes=4 * 4096)
    assert await again.keys(9) == [key(5), key(4), key(3), key(2)]
    assert (await again.usage()).evictions == 2
    await again.check_integrity()


async def test_a_restarted_store_serves_from_ssd(folder: Path, scope: ScopeDigest) -> None:
    config = StoreConfig(dram_bytes=MIB, ssd_path=str(folder), ssd_bytes=MIB)
    block = sample_block(scope, strata={BASE: 4000, MID: 2000})
    async with LocalStore(config) as store, StoreClient(store.address) as client:
        (outcome,) = await client.put([block])
        assert outcome.tiers == ("dram", "ssd")
    async with LocalStore(config) as store, StoreClient(store.address) as client:
        assert len((await client.lookup(scope, [block[0].block_hash])).blocks) == 1
        fetch = client.get(scope, [block[0].block_hash], [BASE, MID])
        fetched = [stratum async for stratum in fetch]
        assert {f.stratum: bytes(f.frame.payload) for f in fetched if f.frame} == block[1]
        assert {f.tier for f in fetched} == {"ssd"}
        read = await store.running.store.get(block[0], [BASE])
        assert isinstance(read[BASE], Piece)
        assert read[BASE].tier == "dram"


# What a crash and foreign hands may leave


async def test_whatever_a_crash_leaves_is_mended_at_start(open_tier: Open, folder: Path) -> None:
    first = await open_tier()
    for number in range(4):
        await first.put(key(number), {BASE: b"b" * 100, MID: b"m" * 50})
    await first.close()
    paths = [folder / SsdFile(key(n), n, ((BASE, 100), (MID, 50))).path for n in range(4)]
    assert paths == files(folder)

    older = folder / SsdFile(key(0), 0, ((BASE, 7),)).path
    paths[0].rename(paths[0].with_name(SsdFile(key(0), 9, ((BASE, 100), (MID, 50))).name))
    older.write_bytes(b"o" * 7)
    os.truncate(paths[1], 149)
    paths[2].rename(paths[2].with_name(SsdFile(key(2), 2, ((BASE, 100),)).name))
    (folder / "7f" / "new.2a").write_bytes(b"torn")

    again = await open_tier()
    assert again.mended == {"superseded": 1, "wrong_size": 1, "cut": 1, "temporary": 1}
    assert await again.contains([key(n) for n in range(4)]) == [
        {BASE: 100, MID: 50},
        None,
        {BASE: 100},
        {BASE: 100, MID: 50},
    ]
    assert await again.get(key(0), [BASE]) == {BASE: b"b" * 100}
    await again.put(key(1), {BASE: b"new"})
    await again.check_integrity()


async def test_foreign_files_are_removed_and_what_links_lead_to_is_not(
    open_tier: Open, folder: Path, tmp_path: Path
) -> None:
    await (await open_tier()).close()
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 8)
    valid = SsdFile(key(1), 1, ((BASE, 8),))
    (folder / valid.path).symlink_to(secret)
    (folder / "ff").rmdir()
    (folder / "ff").symlink_to(tmp_path)
    (folder / "notes.txt").write_text("hello")
    (folder / "05" / valid.name).write_bytes(b"x" * 8)
    os.mkfifo(folder / "06" / "pipe")
    (folder / "07" / os.fsdecode(b"\xff\xfe\n")).write_bytes(b"")
    huge = folder / SsdFile(key(2), 2, ((BASE, 10**12 - 1),)).path
    huge.touch()
    os.truncate(huge, 10**12 - 1)

    again = await open_tier()
    assert again.mended == {"foreign": 7}
    assert files(folder) == []
    assert secret.read_bytes() == b"x" * 8
    assert (await again.usage()).blocks == 0


VALID = f"{key(1).encode()}.000000000000002a.1-4096.2-2048"


def test_a_name_carries_key_number_and_places() -> None:
    file = SsdFile.parse(VALID)
    assert file == SsdFile(key(1), 42, ((BASE, 4096), (MID, 2048)))
    assert (file.name, file.num_bytes) == (VALID, 6144)
    assert file.places() == {BASE: (0, 4096), MID: (4096, 2048)}
    cut, gap = file.without(MID), file.without(BASE)
    assert cut == SsdFile(key(1), 42, ((BASE, 4096),))
    assert gap is not None
    assert (gap.num_bytes, gap.places()) == (6144, {MID: (4096, 2048)})
    assert SsdFile.parse(gap.name) == gap
    assert gap.without(MID) is None


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "../../etc/passwd", MARKER, key(1).encode()),
        *(f"../{VALID}", f"{VALID}/..", f"{VALID}\n", f"{VALID}.", f" {VALID}", f"{VALID}\0"),
        *(VALID.upper(), VALID.replace("4096", "04096"), VALID.replace("4096", "-4096")),
        *(VALID.replace("1-4096", "3-4096"), VALID.replace("1-", "2-"), f"{VALID}.0-7"),
        *(VALID.replace("4096", "9" * 13), VALID.replace("4096", "\u0661")),
        *(VALID.replace("000000000000002a", "ffffffffffffffff"), VALID.replace("2a", "2")),
        *(VALID.replace("1-4096", ""), VALID.partition(".1-")[0]),
    ],
)
def test_other_names_are_foreign(name: str) -> None:
    assert SsdFile.parse(name) is None


async def test_data_and_names_are_on_disk_before_a_change_returns(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = await open_tier(fsync=True)
    done: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def note(first: Any, *others: Any, **options: Any) -> Any:
            is_folder = isinstance(first, int) and stat.S_ISDIR(os.fstat(first).st_mode)
            done.append(f"{name} folder" if is_folder else name)
            return None if name == "fsync" else real(first, *others, **options)

        return note

    for name in ("write", "fsync", "rename", "unlink", "truncate"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    appear = ["write", "write", "fsync", "rename", "fsync folder"]
    await tier.put(key(1), {BASE: b"x", MID: b"y"})
    assert done == appear
    done.clear()
    await tier.put(key(1), {BASE: b"z", MID: b"y"})
    assert done == [*appear, "unlink"]
    done.clear()
    await tier.drop(key(1), MID)
    assert done == ["rename", "fsync folder", "truncate"]
    done.clear()
    await tier.delete([key(1)])
    assert done == ["unlink", "fsync folder"]


# Whose folder


async def test_a_folder_with_other_content_is_refused_and_left_alone(
    open_tier: Open, folder: Path
) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigurationError, match="no ssd tier's") as caught:
        await open_tier()
    assert "empty folder" in caught.value.remedy
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


async def test_a_folder_within_is_refused_and_left_alone(open_tier: Open, folder: Path) -> None:
    await (await open_tier()).close()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigurationError, match="mine") as caught:
        await open_tier()
    assert "move it away" in caught.value.remedy
    assert (folder / "mine" / "thesis.txt").read_text() == "dear"


async def test_another_format_is_refused(open_tier: Open, folder: Path) -> None:
    folder.mkdir()
    (folder / MARKER).write_text("kvstrata ssd tier, format 2\n")
    with pytest.raises(ConfigurationError, match="format 2"):
        await open_tier()


async def test_a_file_system_of_its_own_is_taken(open_tier: Open, folder: Path) -> None:
    (folder / "lost+found").mkdir(parents=True)
    tier = await open_tier()
    await tier.put(key(1), {BASE: b"x"})
    await tier.check_integrity()


async def test_a_second_user_of_the_folder_is_refused(
    open_tier: Open, tier: SsdTier, folder: Path
) -> None:
    with pytest.raises(FolderInUseError):
        await open_tier()
    command = [sys.executable, "-P", "-m", "kvstrata.kvstore_service", "--ssd-path", str(folder)]
    run = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 2
    assert "in use by another store" in run.stderr
    assert "hint: " in run.stderr
    await tier.close()
    await open_tier()


async def test_an_impossible_folder_is_told_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tier = SsdTier(str(tmp_path / "file"), capacity_bytes=MIB, max_stratum_bytes=MIB)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        await tier.open()


# Damage while it runs


async def damaged_read(
    tier: SsdTier, folder: Path, scope: ScopeDigest, damage: Callable[[Path], None]
) -> tuple[BlockStore, BlockKey, Any]:
    """Put a block through a store, damage its file, and read it without dram's help."""
    store = BlockStore(DramTier(MIB), [tier])
    block_key, frames = sample_block(scope, strata={BASE: 4000, MID: 2000})
    await store.put(block_key, frames)
    await store.dram.delete([block_key])
    (path,) = files(folder)
    damage(path)
    read = await store.get(block_key, [BASE, MID])
    assert (await store.put(block_key, frames)).tiers == ("dram", "ssd")
    assert await tier.get(block_key, [BASE, MID]) == frames
    await tier.check_integrity()
    return store, block_key, read


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)


async def test_a_flipped_bit_is_a_miss_is_counted_and_healed_by_the_next_put(
    tier: SsdTier, folder: Path, scope: ScopeDigest
) -> None:
    store, _, read = await damaged_read(tier, folder, scope, _flip)
    assert read[BASE] == "corrupt"
    assert store.counters.get(names.CORRUPT, tier="ssd") == 1


@pytest.mark.parametrize("size", [0, 10, 4000])
async def test_a_cut_file_is_never_served(
    size: int, tier: SsdTier, folder: Path, scope: ScopeDigest
) -> None:
    store, _, read = await damaged_read(tier, folder, scope, lambda path: os.truncate(path, size))
    assert read == {BASE: "corrupt", MID: "corrupt"}
    assert store.counters.get(names.CORRUPT, tier="ssd") == 2


async def test_a_file_that_was_removed_is_a_miss_and_the_accounting_follows(
    tier: SsdTier, folder: Path, scope: ScopeDigest
) -> None:
    _, _, read = await damaged_read(tier, folder, scope, Path.unlink)
    assert read == {BASE: "absent", MID: "absent"}


async def test_an_unreadable_file_is_given_up(
    tier: SsdTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tier.put(key(1), {BASE: b"x"})
    await tier.put(key(2), {BASE: b"y"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing(errno.EIO))
        with pytest.raises(TierUnavailableError):
            await tier.get(key(1), [BASE])
    await until_healthy(tier)
    assert await tier.get(key(1), [BASE]) == {}
    assert await tier.get(key(2), [BASE]) == {BASE: b"y"}
    await tier.check_integrity()


# Full and failing disks


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


async def test_a_full_disk_refuses_puts_serves_reads_and_heals(
    tier: SsdTier, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tier.put(key(1), {BASE: b"old"})
    before = files(folder)
    real_write, num_writes = os.write, 0

    def write_some_then_fail(fd: int, data: memoryview) -> int:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 1:
            return real_write(fd, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some_then_fail)
        with pytest.raises(CapacityError, match="full") as caught:
            await tier.put(key(1), {BASE: b"new" * 100})
        assert "free space" in caught.value.remedy
        assert files(folder) == before
        assert await tier.get(key(1), [BASE]) == {BASE: b"old"}
        usage = await tier.usage()
        assert (usage.healthy, usage.detail) == (False, "the disk is full")
        await asyncio.sleep(0.1)
        with pytest.raises(CapacityError):
            await tier.put(key(2), {BASE: b"x"})
        assert not (await tier.usage()).healthy
        assert await tier.delete([key(1)]) == 1
    await until_healthy(tier)
    await tier.put(key(2), {BASE: b"x"})
    await tier.check_integrity()


async def test_a_disk_that_is_full_at_start_serves_reads(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await open_tier()
    await first.put(key(1), {BASE: b"x"})
    await first.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing(errno.ENOSPC))
        tier = await open_tier()
        assert (await tier.usage()).detail == "the disk is full"
        assert await tier.get(key(1), [BASE]) == {BASE: b"x"}
        with pytest.raises(CapacityError, match="full"):
            await tier.put(key(2), {BASE: b"y"})
    await until_healthy(tier)
    await tier.put(key(2), {BASE: b"y"})
    await tier.check_integrity()


def test_a_real_limit_leaves_nothing_partial(folder: Path) -> None:
    """RLIMIT_FSIZE stops a write in its middle, as a quota would."""
    code = """
import asyncio, os, resource, sys
from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
async def main():
    tier = SsdTier(sys.argv[1], capacity_bytes=1 << 20, max_stratum_bytes=1 << 20,
        fsync=False, probe_s=0.02)
    await tier.open()
    key = BlockKey(b"s" * 16, b"h" * 16)
    try:
        await tier.put(key, {1: bytes(50_000), 2: bytes(50_000)})
    except CapacityError:
        print("refused")
    async with asyncio.timeout(10):
        while not (await tier.usage()).healthy:
            await asyncio.sleep(0.01)
    await tier.check_integrity()
    await tier.put(key, {1: bytes(50_000)})
    await tier.check_integrity()
    await tier.close()
asyncio.run(main())
"""
    command = [sys.executable, "-P", "-c", code, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (run.returncode, run.stdout) == (0, "refused\n"), run.stderr
    assert [path.stat().st_size for path in files(folder)] == [50_000]


@pytest.mark.parametrize(
    ("function", "number", "remedy"),
    [
        ("open", errno.EACCES, "user write"),
        ("open", errno.EMFILE, "open files"),
        ("rename", errno.EROFS, "user write"),
        ("fsync", errno.EIO, "check the disk"),
    ],
)
async def test_a_failing_disk_is_unavailable_loses_nothing_and_heals(
    function: str,
    number: int,
    remedy: str,
    open_tier: Open,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    tier = await open_tier(fsync=True)
    await tier.put(key(1), {BASE: b"old"})
    before = files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(number))
        with pytest.raises(TierUnavailableError) as caught:
            await tier.put(key(1), {BASE: b"newer"})
        assert remedy in caught.value.remedy
        usage = await tier.usage()
        assert (usage.healthy, usage.detail) == (False, os.strerror(number))
        for call in (tier.get(key(1), [BASE]), tier.contains([]), tier.drop(key(1), BASE)):
            with pytest.raises(TierUnavailableError):
                await call
        assert files(folder) == before
    await until_healthy(tier)
    assert await tier.get(key(1), [BASE]) == {BASE: b"old"}
    await tier.put(key(1), {BASE: b"newer"})
    await tier.check_integrity()


async def test_a_hanging_disk_is_given_up_and_found_again(
    open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = await open_tier(fsync=True, timeout_s=0.5)
    gate = threading.Event()
    hanging = [gate]

    def hang_once(fd: int) -> None:
        if hanging:
            hanging.pop().wait(30)

    monkeypatch.setattr(os, "fsync", hang_once)
    began = time.monotonic()
    with pytest.raises(TierUnavailableError, match="did not answer"):
        await tier.put(key(1), {BASE: b"late"})
    with pytest.raises(TierUnavailableError):
        await tier.get(key(1), [BASE])
    assert time.monotonic() - began < 5
    await asyncio.sleep(0.1)
    assert not (await tier.usage()).healthy  # what hangs may yet change the folder
    gate.set()
    await until_healthy(tier)
    assert await tier.get(key(1), [BASE]) in ({}, {BASE: b"late"})
    await tier.check_integrity()


async def test_a_folder_that_goes_and_comes_back_is_found_again(
    tier: SsdTier, folder: Path, tmp_path: Path
) -> None:
    await tier.put(key(1), {BASE: b"x"})
    folder.rename(tmp_path / "away")
    with pytest.raises(TierUnavailableError) as caught:
        await tier.get(key(1), [BASE])
    assert "bring" in caught.value.remedy
    with pytest.raises(TierUnavailableError):
        await tier.put(key(2), {BASE: b"y"})
    await asyncio.sleep(0.1)
    assert not (await tier.usage()).healthy
    (tmp_path / "away").rename(folder)
    await until_healthy(tier)
    assert await tier.get(key(1), [BASE]) == {BASE: b"x"}
    await tier.check_integrity()


async def test_a_folder_that_was_removed_is_unavailable_and_nothing_else_is_taken(
    tier: SsdTier, folder: Path
) -> None:
    await tier.put(key(1), {BASE: b"x"})
    shutil.rmtree(folder)
    with pytest.raises(TierUnavailableError):
        await tier.put(key(2), {BASE: b"y"})
    folder.mkdir()
    await asyncio.sleep(0.1)
    usage = await tier.usage()
    assert not usage.healthy
    assert "no ssd tier's" in usage.detail
    assert list(folder.iterdir()) == []


async def test_a_sub_folder_that_was_removed_is_made_again(tier: SsdTier, folder: Path) -> None:
    await tier.put(key(1), {BASE: b"x"})
    shutil.rmtree(folder / "01")
    with pytest.raises(TierUnavailableError):
        await tier.put(key(1), {BASE: b"y"})
    await until_healthy(tier)
    assert await tier.contains([key(1)]) == [None]
    await tier.put(key(1), {BASE: b"y"})
    await tier.check_integrity()


# The bound, and races


async def test_bytes_are_those_that_files_take(tier: SsdTier) -> None:
    await tier.put(key(1), {BASE: bytes(1), MID: bytes(1)})
    await tier.put(key(2), {BASE: bytes(4096), MID: bytes(1)})
    assert (await tier.usage()).num_bytes == 3 * 4096
    await tier.drop(key(2), MID)
    assert (await tier.usage()).num_bytes == 2 * 4096


async def test_the_disk_never_holds_more_than_the_capacity(open_tier: Open, folder: Path) -> None:
    tier = await open_tier(capacity_bytes=10 * 4096)
    source = random.Random(1)

    async def churn(lane: int) -> None:
        for step in range(40):
            number = lane * 1000 + step
            await tier.put(key(number), {BASE: bytes(source.randrange(1, 3 * 4096))})
            if step % 5 == 4:
                await tier.delete([key(number)])

    most = 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            held = 0
            for path in files(folder):
                try:
                    held += -(-path.stat().st_size // 4096) * 4096
                except FileNotFoundError:
                    continue
            most = max(most, held)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        async with asyncio.timeout(30):
            await asyncio.gather(*(churn(lane) for lane in range(4)))
    finally:
        done.set()
        watcher.join()
    assert 0 < most <= 12 * 4096  # a listing that races changes may see a victim and its successor
    await tier.check_integrity()


async def test_puts_wait_for_each_others_room(open_tier: Open) -> None:
    tier = await open_tier(capacity_bytes=2 * 4096)
    async with asyncio.timeout(10):
        await asyncio.gather(*(tier.put(key(n), {BASE: bytes(4096)}) for n in range(16)))
    usage = await tier.usage()
    assert (usage.blocks, usage.evictions) == (2, 14)
    await tier.check_integrity()


async def test_a_replacement_that_finds_no_room_leaves_the_old_block(open_tier: Open) -> None:
    tier = await open_tier(capacity_bytes=4 * 4096)
    await tier.put(key(1), {BASE: bytes(4096)})
    await tier.put(key(2), {BASE: bytes(2 * 4096)})
    await tier.pin([key(2)], 60)
    with pytest.raises(CapacityError):
        await tier.put(key(1), {BASE: bytes(3 * 4096)})
    assert await tier.contains([key(1)]) == [{BASE: 4096}]
    await tier.put(key(1), {BASE: bytes(2 * 4096)})
    await tier.check_integrity()


async def test_an_oversized_stratum_is_refused(open_tier: Open) -> None:
    tier = await open_tier(max_stratum_bytes=100)
    with pytest.raises(CapacityError):
        await tier.put(key(1), {BASE: bytes(101)})


async def test_reads_run_in_parallel(tier: SsdTier, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        await tier.put(key(number), {BASE: b"x"})
    together = threading.Barrier(3, timeout=10)
    real_pread = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        together.wait()
        return real_pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    async with asyncio.timeout(20):
        reads = await asyncio.gather(*(tier.get(key(n), [BASE]) for n in range(3)))
    assert reads == [{BASE: b"x"}] * 3


async def test_no_file_is_touched_in_the_event_loop(
    tier: SsdTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()

    def spied(real: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*arguments: Any, **options: Any) -> Any:
            seen.add(threading.current_thread().name.rpartition("_")[0])
            return real(*arguments, **options)

        return spy

    for name in ("open", "pread", "write", "rename", "unlink", "truncate", "utime", "scandir"):
        monkeypatch.setattr(os, name, spied(getattr(os, name)))
    await tier.put(key(1), {BASE: b"x", MID: b"y"})
    await tier.get(key(1), [BASE])
    await tier.put(key(1), {BASE: b"z", MID: b"y"})
    await tier.drop(key(1), MID)
    await tier.delete([key(1)])
    await tier.check_integrity()
    assert seen == {"ssd-read", "ssd-change"}


async def test_a_read_that_races_changes_is_whole_or_a_miss(tier: SsdTier) -> None:
    writings = [{BASE: bytes([n]) * 5000, MID: bytes([n]) * (100 + n)} for n in range(200)]
    partial = [{BASE: frames[BASE]} for frames in writings]
    done = False
    num_hits = 0

    async def read() -> None:
        nonlocal num_hits
        while not done:
            found = await tier.get(key(1), [BASE, MID])
            if found:
                num_hits += 1
                assert found in writings or found in partial
            await asyncio.sleep(0)

    readers = [asyncio.create_task(read()) for _ in range(3)]
    for number, frames in enumerate(writings):
        await tier.put(key(1), frames)
        if number % 5 == 3:
            await tier.drop(key(1), MID)
        if number % 7 == 6:
            await tier.delete([key(1)])
    done = True
    async with asyncio.timeout(10):
        await asyncio.gather(*readers)
    assert num_hits > 50
    await tier.check_integrity()


async def test_changes_of_one_block_at_a_time_keep_the_accounting(tier: SsdTier) -> None:
    source = random.Random(2)

    async def change() -> None:
        chosen = key(source.randrange(3))
        action = source.choice(["put", "put", "drop", "delete", "get"])
        if action == "put":
            await tier.put(chosen, {s: bytes(s * 100) for s in (BASE, MID, FINE)})
        elif action == "drop":
            await tier.drop(chosen, source.choice((BASE, MID, FINE)))
        elif action == "delete":
            await tier.delete([chosen, key(9)])
        else:
            await tier.get(chosen, [BASE])

    for _ in range(15):
        async with asyncio.timeout(10):
            await asyncio.gather(*(change() for _ in range(20)))
        await tier.check_integrity()


async def test_a_put_whose_caller_gave_up_is_accounted(tier: SsdTier, folder: Path) -> None:
    for number in range(20):
        task = asyncio.create_task(tier.put(key(number), {BASE: b"x"}))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(10):
        while (await tier.usage()).blocks < 20:
            await asyncio.sleep(0.01)
    assert len(files(folder)) == 20
    await tier.check_integrity()


async def test_a_closed_tier_is_unavailable(tier: SsdTier) -> None:
    await tier.close()
    await tier.close()
    with pytest.raises(TierUnavailableError):
        await tier.get(key(1), [BASE])
    assert not (await tier.usage()).healthy
