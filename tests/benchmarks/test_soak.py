"""The soak's validator finds every broken promise; its proxy fails as told; a short soak holds."""

import asyncio
import copy
import os
from pathlib import Path
from typing import Any

import pytest
from bench_soak import Soak
from soak_blocks import BASE, MID, Name, digests, key_of, make, stream_hashes
from soak_faults import FAULTS, block_of_redis_key
from soak_proxy import Proxy
from soak_servers import MIB, Disk
from soak_validator import validate

from kvstrata.kvstore_service.redis_tier import value_key
from kvstrata.kvstore_service.ssd_file import SsdFile

BLOCK = Name(3, 1)
Event = dict[str, Any]


def op(kind: str, t0: float, t1: float, store: str = "a", **fields: Any) -> Event:
    event = {"kind": "op", "op": kind, "t0": t0, "t1": t1, "store": store, "client": "x"}
    return event | {"timeout_s": 6.0, "error": None, "blocks": []} | fields


def put(
    t0: float,
    t1: float,
    version: int = 0,
    tiers: tuple[str, ...] = ("dram", "redis", "ssd"),
    **fields: Any,
) -> Event:
    block = {"name": str(BLOCK), "version": version, "outcome": "committed", "tiers": list(tiers)}
    return op("put", t0, t1, blocks=[block], **fields)


def get(t0: float, t1: float, *, store: str = "a", found: int | str = 0, **fields: Any) -> Event:
    """A read of a version, or a miss."""
    block: Event = {"name": str(BLOCK)}
    for stratum in (BASE, MID):
        known = isinstance(found, int)
        block[str(stratum)] = digests(BLOCK, int(found))[stratum] if known else f"!{found}"
    return op("get", t0, t1, store, blocks=[block], **fields)


def fault(kind: str, t0: float, t1: float, store: str = "", *names: str) -> Event:
    return {"kind": "fault", "fault": kind, "t0": t0, "t1": t1, "store": store, "names": names}


def broken(*events: Event) -> list[str]:
    return [violation.promise for violation in validate(events).violations]


def test_a_history_without_fault_holds() -> None:
    events = [put(0, 1), get(2, 3), get(2, 3, store="b"), op("lookup", 0, 1), put(4, 5, 1)]
    report = validate([*events, get(4.5, 6, found=1), get(4.5, 6, found=0)])
    assert report.violations == []
    assert report.figures["promised_reads"] == 4


@pytest.mark.parametrize(
    "events",
    [
        [get(2, 3)],
        [put(0, 1), get(2, 3, found=7)],
        [put(4, 5), get(2, 3)],
    ],
    ids=["never put", "another version", "put later"],
)
def test_bytes_that_nobody_put_are_found(events: list[Event]) -> None:
    assert "bytes" in broken(*events)


def test_mixed_writings_and_strata_in_the_wrong_place_are_found() -> None:
    mixed = get(4, 5)
    mixed["blocks"][0][str(MID)] = digests(BLOCK, 1)[MID]
    assert broken(put(0, 1), put(2, 3, 1), mixed) == ["bytes"]
    swapped = get(4, 5)
    swapped["blocks"][0][str(MID)] = digests(BLOCK, 0)[BASE]
    assert "bytes" in broken(put(0, 1), swapped)


MISS = get(10, 11, found="absent")
MISS_AT_B = get(10, 11, store="b", found="absent")


@pytest.mark.parametrize("reason", ["absent", "evicted", "corrupt", "stale_encoding"])
def test_a_lost_block_is_found(reason: str) -> None:
    lost = get(10, 11, found=reason)
    assert broken(put(0, 1), lost) == ["durability"]
    assert broken(put(0, 1, tiers=("dram", "ssd")), lost) == ["durability"]
    assert broken(put(0, 1, tiers=("dram", "redis")), lost) == ["durability"]
    assert broken(put(0, 1, tiers=("redis",)), get(10, 11, store="b", found=reason))


@pytest.mark.parametrize(
    "events",
    [
        [put(0, 1, tiers=("dram",)), MISS],
        [put(0, 12), MISS],
        [put(0, 1, tiers=("ssd",)), MISS_AT_B],
        [put(0, 1, tiers=("redis",)), fault("redis_kill", 3, 4), MISS_AT_B],
        [put(0, 1, tiers=("redis",)), fault("redis_flip", 3, 3, "", str(BLOCK)), MISS_AT_B],
        [put(0, 1, tiers=("redis",)), fault("redis_hold", 8, 12, "a"), MISS],
        [put(0, 1, tiers=("ssd",)), fault("disk_flip", 3, 3, "a", str(BLOCK)), MISS],
        [put(0, 1), op("delete", 9, 12, blocks=[{"name": str(BLOCK)}]), MISS],
        [put(0, 1), op("delete", 5, 6, error="X", blocks=[{"name": str(BLOCK)}]), MISS],
    ],
    ids=[
        "only in dram",
        "not yet acknowledged",
        "another store's ssd",
        "redis died",
        "damaged in redis",
        "redis silent",
        "damaged on disk",
        "deleted",
        "perhaps deleted",
    ],
)
def test_what_was_not_promised_is_not_held_against_the_store(events: list[Event]) -> None:
    assert "durability" not in broken(*events)


@pytest.mark.parametrize(
    "between",
    [
        fault("store_kill", 3, 4, "a"),
        fault("redis_kill", 3, 4),
        fault("disk_full", 8, 12, "a"),
        fault("disk_flip", 3, 3, "b", str(BLOCK)),
        fault("disk_flip", 3, 3, "a", "9.9"),
        op("delete", 3, 4, "b", blocks=[{"name": str(BLOCK)}]),
    ],
    ids=lambda event: f"{event.get('fault', 'delete')} of {event['store']}",
)
def test_what_ssd_promises_outlives(between: Event) -> None:
    assert "durability" in broken(put(0, 1, tiers=("ssd",)), between, MISS)


def test_redis_outlives_the_store_and_a_put_after_its_death_counts_again() -> None:
    kept = put(0, 1, tiers=("redis",))
    assert broken(kept, fault("store_kill", 3, 4, "a"), MISS_AT_B) == ["durability"]
    died = fault("redis_kill", -9, -8)
    late = get(20, 21, store="b", found="absent")
    assert broken(died, put(9, 10, tiers=("redis",)), late) == ["durability"]


def test_a_broken_lease_is_found_also_where_nothing_else_was_promised() -> None:
    lost = get(10, 11, store="c", found="evicted", leased_t0=9.5)
    first = put(0, 1, tiers=("dram",), store="c")
    assert broken(first, lost) == ["durability"]
    assert broken(first, lost | {"t1": 12}) == []
    assert broken(first, fault("store_kill", 9.6, 9.9, "c"), lost) == []
    assert broken(first, fault("disk_flip", 9.6, 9.6, "c", str(BLOCK)), lost) == []
    shed = get(10, 11, store="c", leased_t0=9.5)
    shed["blocks"][0] |= {str(MID): "!evicted", "leased": [BASE]}
    assert broken(first, shed) == []
    shed["blocks"][0]["leased"] = [BASE, MID]
    assert broken(first, shed) == ["durability"]


def test_a_hang_and_an_unexplained_error_are_found() -> None:
    late = op("get", 0, 10.5, timeout_s=6.0, error="DeadlineError")
    assert broken(late) == ["time", "silence"]
    assert broken(late, fault("store_pause", 1, 4, "a")) == ["time"]
    failed = op("put", 5, 6, error="UnavailableError")
    assert broken(failed, fault("store_kill", 1, 4, "a")) == []
    assert broken(failed, fault("store_kill", 1, 4, "b")) == ["silence"]
    assert broken(failed, fault("redis_kill", 1, 4)) == ["silence"]
    defect = op("put", 2, 3, error="InternalError")
    assert broken(defect, fault("store_kill", 1, 4, "a")) == ["silence"]
    refused = put(0, 1)
    refused["blocks"][0] |= {"outcome": "rejected", "reason": "tokens"}
    assert broken(refused) == ["silence"]


def test_what_grows_beyond_its_bound_is_found() -> None:
    facts = {"kind": "facts", "bounds": {"disk": {"a": 100}}}
    sample = {"kind": "sample", "t": 1.0, "bytes": {"rss": {"a": 1}, "disk": {"a": 100}}}
    assert broken(facts, sample) == []
    more = copy.deepcopy(sample)
    more["bytes"]["disk"]["a"] = 101
    assert broken(facts, more) == ["bounds"]
    assert broken({"kind": "end", "t": 9.0, "problems": ["a stray file"]}) == ["bounds"]
    growing = [
        {"kind": "sample", "t": t, "bytes": {"rss": {"a": MIB * (100 + t // 5)}}}
        for t in range(600)
    ]
    assert broken(*growing) == ["bounds"]


def test_blocks_are_the_same_in_every_process_and_make_a_chain() -> None:
    key, frames = make(BLOCK, 2)
    assert make(BLOCK, 2) == (key, frames)
    assert make(BLOCK, 3)[0] == key
    assert make(BLOCK, 3)[1] != frames
    assert stream_hashes(3)[1] == key.block_hash == key_of(BLOCK).block_hash
    assert Name.parse(str(BLOCK)) == BLOCK


async def test_a_proxy_forwards_holds_and_cuts() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, Proxy(server.sockets[0].getsockname()[1]) as proxy, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.hold()
        writer.write(b"two")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(3), 0.1)
        proxy.heal()
        assert await reader.readexactly(3) == b"two"
        proxy.refuse()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        again, refused = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await again.readexactly(1)
        proxy.heal()
        reader, last = await asyncio.open_connection("127.0.0.1", proxy.port)
        last.write(b"six")
        assert await reader.readexactly(3) == b"six"
        for end in (writer, refused, last):
            end.close()
        await asyncio.gather(
            *(end.wait_closed() for end in (writer, refused, last)), return_exceptions=True
        )


def test_a_disk_is_filled_and_freed() -> None:
    disk = Disk(4 * MIB)
    try:
        if not disk.can_be_filled:
            pytest.skip("this kernel lets nobody make a mount namespace")
        disk.store_folder.mkdir()
        disk.fill()
        with pytest.raises(OSError, match="No space"):
            (disk.store_folder / "x").write_bytes(bytes(MIB))
        disk.free()
        (disk.store_folder / "00").mkdir()
        (disk.store_folder / "00" / "x").write_bytes(bytes(MIB))
        assert disk.used_bytes() == MIB
    finally:
        disk.close()


def test_damaged_things_are_known_by_name() -> None:
    key = key_of(BLOCK)
    assert block_of_redis_key(value_key(key, BASE).encode()) == key
    assert block_of_redis_key(b"kvs:{index}:order") is None
    file = SsdFile.of(key, 1, make(BLOCK, 0)[1])
    assert SsdFile.parse(file.name) == file


@pytest.mark.e2e
@pytest.mark.timeout(300)
async def test_a_short_soak_breaks_no_promise(tmp_path: Path) -> None:
    """Every kind of fault within some 20 s. KVSTRATA_SOAK_S makes it longer."""
    seconds = float(os.environ.get("KVSTRATA_SOAK_S", 20))
    every_s = min(5.0, seconds / len(FAULTS))
    soak = Soak(tmp_path, seconds=seconds, seed=4, fault_every_s=every_s)
    _, report = await soak.run()
    assert [str(violation) for violation in report.violations] == []
    assert report.figures["promised_reads"] > 300
    assert report.figures["strata"]["delivered"] > 1000
    assert len(report.figures["faults"]) >= len(FAULTS) - 2
