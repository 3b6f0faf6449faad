"""Blocks that are read while they are written: segment by segment, verified, each with an end."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest

from kvstrata.kvstore_service import write_stream
from kvstrata.kvstore_service.client import (
    AttachedBlock,
    AttachedSegment,
    BlockWriter,
    StoreClient,
)
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.put_stream import ByteBudget
from kvstrata.kvstore_service.testing import LocalStore, RedisServer, sample_block
from kvstrata.kvstore_service.write_stream import MAX_HEADER_BYTES, WriteStream
from kvstrata.protos import admin_pb2
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.errors import DeadlineError, KVStrataError, LimitError, from_rpc_error
from kvstrata.protos.frame import Frame, draft_header, encode_frame, segment_checksum
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockKey, ScopeDigest
from kvstrata.protos.kvstore_pb2_grpc import KVStoreStub
from kvstrata.protos.service import CALL_METADATA, open_channel

BASE, MID = 1, 2
STRATA = {BASE: 4000, MID: 2000}
SIZES = {BASE: 8000, MID: 8000}
SOON_S = 20.0
"""Generous on a busy machine; far less than ``FOREVER_S``."""
FOREVER_S = 300.0

Block = tuple[BlockKey, dict[int, bytes]]
Events = list[AttachedSegment | AttachedBlock]


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as made:
        yield made


@pytest.fixture
async def client(store: LocalStore) -> AsyncIterator[StoreClient]:
    async with StoreClient(store.address, timeout_s=60) as made:
        yield made


def blocks(scope: ScopeDigest, count: int, first: int = 0) -> list[Block]:
    return [sample_block(scope, first + n, strata=STRATA) for n in range(count)]


def draft(block: Block) -> FrameHeader:
    return draft_header(Frame.open(block[1][BASE]).header)


def layer(block: Block, number: int) -> list[tuple[BlockKey, int, int, bytes]]:
    """Return both strata's segments of one layer, ready to be sent."""
    key, frames = block
    return [(key, s, number, bytes(Frame.open(f).segment(number))) for s, f in frames.items()]


async def open_all(writer: BlockWriter, made: Iterable[Block]) -> None:
    outcomes = await writer.open([draft(block) for block in made], SIZES)
    assert {outcome.outcome for outcome in outcomes} == {"open"}


class Reader:
    """Someone who attached: what has come so far, and how each block ended."""

    def __init__(
        self,
        client: StoreClient,
        wanted: list[Block],
        strata: tuple[int, ...] = (BASE, MID),
        silence_s: float = FOREVER_S,
    ) -> None:
        self.segments: list[AttachedSegment] = []
        self.ends: dict[int, AttachedBlock] = {}
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read(client, wanted, strata, silence_s))

    async def _read(
        self, client: StoreClient, wanted: list[Block], strata: tuple[int, ...], silence_s: float
    ) -> None:
        scope = wanted[0][0].scope
        hashes = [key.block_hash for key, _ in wanted]
        async for found in client.attach(scope, hashes, strata, silence_s=silence_s):
            if isinstance(found, AttachedSegment):
                assert found.index not in self.ends
                self.segments.append(found)
            else:
                assert found.index not in self.ends
                self.ends[found.index] = found
            self._changed.set()

    async def until(self, num_segments: int) -> None:
        async with asyncio.timeout(SOON_S):
            while len(self.segments) < num_segments:
                self._changed.clear()
                await self._changed.wait()

    async def reasons(self, within_s: float = SOON_S) -> list[str]:
        """Return why each block ended, in order, once all have."""
        async with asyncio.timeout(within_s):
            await self._task
        return [self.ends[index].reason for index in sorted(self.ends)]

    def layers(self, index: int, stratum: int) -> list[int]:
        return [s.layer for s in self.segments if (s.index, s.stratum) == (index, stratum)]

    async def cancel(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def nothing_is_held(store: LocalStore) -> None:
    running = store.running
    async with asyncio.timeout(SOON_S):
        while running.workload.in_flight or running.workload.in_flight_puts:
            await asyncio.sleep(0.01)
    arrivals = running.store.arrivals
    assert (arrivals._writers, arrivals._live, arrivals._waiters) == ({}, {}, {})
    assert all(usage.in_flight_bytes == 0 for usage in running.quotas._usages.values())


async def test_readers_get_layers_as_they_are_made_and_the_block_when_it_is_committed(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    made = blocks(scope, 3)
    early, base_only = Reader(client, made), Reader(client, made, (BASE,))
    async with client.write(timeout_s=60) as writer:
        await open_all(writer, made)
        for number in range(4):
            await writer.send(segment for block in made for segment in layer(block, number))
            await early.until(6 * (number + 1))
            await base_only.until(3 * (number + 1))
            assert not early.ends
            assert (await client.lookup(scope, [made[0][0].block_hash])).blocks == ()
        late = Reader(client, made)
        await late.until(24)
        outcomes = await writer.finish(dict(made))
    assert [(o.outcome, o.tiers) for o in outcomes] == [("committed", ("dram",))] * 3
    for reader, strata in ((early, STRATA), (base_only, {BASE}), (late, STRATA)):
        assert await reader.reasons() == [""] * 3
        for index, (_, frames) in enumerate(made):
            end = reader.ends[index]
            assert {s: bytes(f.payload) for s, f in end.frames.items()} == {
                s: frames[s] for s in strata
            }
            assert (end.tier, end.missing) == ("live", {})
            assert all(reader.layers(index, s) == [0, 1, 2, 3] for s in strata)
    assert {s.header.token_ids[0] for s in early.segments} == {0, 64, 128}
    for key, frames in made:
        held = await store.running.store.dram.get(key, [BASE, MID])
        assert held == frames
    await nothing_is_held(store)
    counters = store.running.store.counters
    assert counters.get("attached_blocks_total", outcome="committed") == 9
    assert counters.get("opened_blocks_total", state="open") == 3


async def test_attaching_to_committed_blocks_is_a_read(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    whole, base_only = sample_block(scope, 0, strata=STRATA), sample_block(scope, 1)
    unfinished, absent = sample_block(scope, 2, strata=STRATA), sample_block(scope, 3)
    await client.put([whole, base_only])
    async with client.write(timeout_s=60) as writer:
        await open_all(writer, [unfinished])
        await writer.send(layer(unfinished, 0))
        reader = Reader(client, [whole, base_only, unfinished, absent], silence_s=0)
        assert await reader.reasons() == ["", "", "absent", "absent"]
    assert {s: bytes(f.payload) for s, f in reader.ends[0].frames.items()} == whole[1]
    assert reader.ends[1].missing == {MID: "absent"}
    counters = store.running.store.counters
    assert reader.ends[0].tier == "dram"
    assert sum(end.num_bytes for end in reader.ends.values()) == counters.get("sent_bytes_total")
    for end, (_, frames) in zip((reader.ends[0], reader.ends[1]), (whole, base_only), strict=True):
        opened = [Frame.open(frame) for frame in frames.values()]
        lengths = [f.head_bytes + sum(s.length for s in f.header.segments) for f in opened]
        assert end.num_bytes == sum(lengths)  # all of the frames but what pads them
    assert counters.get("wanted_strata_total") == 8
    assert (counters.get("hits_total"), counters.get("misses_total")) == (3, 5)
    await nothing_is_held(store)


async def test_a_stratum_that_a_committed_block_lacks_is_told_at_once(
    client: StoreClient, scope: ScopeDigest
) -> None:
    """Waiting for it would never end, and once kept the event loop busy for ever."""
    block = sample_block(scope, strata={BASE: 400})
    await client.put([block])
    reader = Reader(client, [block], strata=(MID,), silence_s=FOREVER_S)
    assert await reader.reasons() == ["absent"]
    assert len((await client.lookup(scope, [block[0].block_hash])).blocks) == 1


async def test_segments_larger_than_a_message_come_whole(
    client: StoreClient, scope: ScopeDigest
) -> None:
    big = sample_block(scope, strata={BASE: 5_000_000, MID: 0}, num_layers=2)
    reader = Reader(client, [big])
    async with client.write(timeout_s=60) as writer:
        (opened,) = await writer.open([draft(big)], {BASE: 6_000_000, MID: 6_000_000})
        assert opened.outcome == "open"
        await writer.send(layer(big, 0))
        await reader.until(2)
        assert reader.segments[0].data == Frame.open(big[1][BASE]).segment(0)
        assert (await writer.finish({big[0]: big[1]}))[0].outcome == "committed"
    assert await reader.reasons() == [""]
    assert bytes(reader.ends[0].frames[BASE].payload) == big[1][BASE]


@pytest.mark.parametrize("how", ["leaves", "abandons", "is cancelled"])
async def test_the_end_of_the_writer_wakes_every_reader_with_the_reason(
    client: StoreClient, store: LocalStore, scope: ScopeDigest, how: str
) -> None:
    made = blocks(scope, 2)
    readers = [Reader(client, made) for _ in range(5)]
    hashes = [key.block_hash for key, _ in made]
    async with client.write(timeout_s=60) as writer:
        await open_all(writer, made)
        await writer.send(layer(made[0], 0))
        for reader in readers:
            await reader.until(2)
        getting = asyncio.create_task(get_all(client, scope, hashes, wait_ms=20_000))
        assert (await client.lookup(scope, hashes)).pending == 2
        async with asyncio.timeout(SOON_S):
            while not store.running.store.arrivals.waited_for():
                await asyncio.sleep(0.01)
        if how == "abandons":
            await writer.abandon()
        elif how == "is cancelled":
            writer._call.cancel()
        begin = time.monotonic()
        if how != "leaves":
            for reader in readers:
                assert await reader.reasons() == ["writer_gone"] * 2
    for reader in readers:
        assert await reader.reasons() == ["writer_gone"] * 2
    assert time.monotonic() - begin < SOON_S < FOREVER_S
    assert set(await getting) == {"writer_gone"}
    found = await client.lookup(scope, hashes)
    assert (found.blocks, found.pending) == ((), 0)
    await nothing_is_held(store)
    counters = store.running.store.counters
    assert counters.get("attached_blocks_total", outcome="writer_gone") == 10
    assert counters.get("unfinished_blocks_total", reason="writer_gone") == 2
    assert counters.get("puts_total") == 0


async def get_all(
    client: StoreClient, scope: ScopeDigest, hashes: list[Any], wait_ms: int
) -> list[str]:
    return [p.miss async for p in client.get(scope, hashes, [BASE, MID], wait_ms=wait_ms)]


ENDLESS = """
import asyncio, sys
from tests.kvstore_service.test_live_blocks import *
async def main():
    scope = ScopeDigest(bytes.fromhex(sys.argv[2]))
    made = blocks(scope, 2)
    async with StoreClient(sys.argv[1]) as client, client.write(timeout_s=600) as writer:
        await open_all(writer, made)
        await writer.send(layer(made[0], 0))
        print("sent", flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_writer_process_that_is_killed_wakes_every_reader(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ENDLESS, store.address, scope.hex()), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"sent\n"
    made = blocks(scope, 2)
    readers = [Reader(client, made) for _ in range(3)]
    for reader in readers:
        await reader.until(2)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    for reader in readers:
        assert await reader.reasons() == ["writer_gone"] * 2
    await nothing_is_held(store)


async def test_a_writer_that_is_silent_wears_out_its_readers_patience_but_not_one_that_gets_on(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    made = blocks(scope, 2)
    async with client.write(timeout_s=60) as writer:
        await open_all(writer, made)
        patient = Reader(client, made, silence_s=3.0)
        begin = time.monotonic()
        while time.monotonic() - begin < 4.0:
            await writer.progress()
            await asyncio.sleep(0.05)
        assert not patient.ends
        impatient = Reader(client, made, silence_s=0.3)
        assert await impatient.reasons() == ["wait_expired"] * 2
        assert time.monotonic() - begin >= 4.3
        assert await patient.reasons() == ["wait_expired"] * 2
        outcomes = await writer.finish(dict(made))  # what readers think is no matter of the writer
        assert [o.outcome for o in outcomes] == ["committed"] * 2
    absent = Reader(client, blocks(scope, 1, first=99), silence_s=0.2)
    assert await absent.reasons() == ["wait_expired"]
    await nothing_is_held(store)


async def test_a_block_that_is_put_meanwhile_ends_the_wait(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    made = blocks(scope, 2)
    reader = Reader(client, made)
    async with asyncio.timeout(SOON_S):
        while len(store.running.store.arrivals.waited_for()) < 2:
            await asyncio.sleep(0.01)
    await client.put(made)
    assert await reader.reasons() == ["", ""]
    assert {end.tier for end in reader.ends.values()} == {"dram"}


async def test_what_another_store_process_commits_ends_the_wait(
    redis: RedisServer, scope: ScopeDigest
) -> None:
    made = blocks(scope, 3)
    async with (
        LocalStore(redis_url=redis.url) as here,
        LocalStore(redis_url=redis.url) as there,
        StoreClient(here.address, timeout_s=60) as reading,
        StoreClient(there.address, timeout_s=60) as writing,
    ):
        reader = Reader(reading, made)
        async with asyncio.timeout(SOON_S):
            while len(here.running.store.arrivals.waited_for()) < 3:
                await asyncio.sleep(0.01)
        await writing.put(made)
        assert await reader.reasons() == ["", "", ""]
        assert {end.tier for end in reader.ends.values()} == {"redis"}
        await nothing_is_held(here)


async def test_a_reader_of_pending_blocks_does_not_wait_for_a_writer_that_has_gone(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    committed, pending, gone = blocks(scope, 3)
    await client.put([committed])
    async with client.write(timeout_s=60) as writer:
        await open_all(writer, [pending])
        hashes = [key.block_hash for key, _ in (committed, pending, gone)]
        found = client.attach(
            scope, hashes, [BASE, MID], silence_s=FOREVER_S, pending_only=True, timeout_s=60
        )
        ends: dict[int, str] = {}
        async for piece in found:
            if isinstance(piece, AttachedBlock):
                ends[piece.index] = piece.reason
            if len(ends) == 2:
                await writer.abandon()
    assert ends == {0: "", 1: "writer_gone", 2: "writer_gone"}
    await nothing_is_held(store)


async def test_draining_wakes_those_who_wait_for_nothing_and_lets_writers_finish(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    made = blocks(scope, 2)
    waiting = Reader(client, blocks(scope, 1, first=99))
    following = Reader(client, made)
    async with open_channel(store.address) as channel:
        admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
        async with client.write(timeout_s=60) as writer:
            await open_all(writer, made)
            await writer.send(layer(made[0], 0))
            await following.until(2)
            request = admin_pb2.DrainRequest(timeout_ms=60_000)
            draining = asyncio.ensure_future(admin.Drain(request))
            assert await waiting.reasons() == ["draining"]
            (refused,) = await writer.open([draft(blocks(scope, 1, first=5)[0])], SIZES)
            assert (refused.outcome, refused.reason) == (
                "rejected",
                "throttled: draining: the store is draining",
            )
            assert [o.outcome for o in await writer.finish(dict(made))] == ["committed"] * 2
            assert await following.reasons() == ["", ""]
        assert (await draining).drained


async def test_a_second_writer_is_told_to_wait_and_may_take_over(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    made = blocks(scope, 2)
    drafts = [draft(block) for block in made]
    async with client.write(timeout_s=60) as second:
        async with client.write(timeout_s=60) as first:
            assert [o.outcome for o in await first.open(drafts, SIZES)] == ["open", "open"]
            assert [o.outcome for o in await second.open(drafts, SIZES)] == ["pending"] * 2
            await first.finish({made[0][0]: made[0][1]})
            await first.send(layer(made[1], 0))
            reader = Reader(client, made)
            await reader.until(10)
        assert await reader.reasons() == ["", "writer_gone"]
        assert [o.outcome for o in await second.open(drafts, SIZES)] == ["exists", "open"]
        assert (await second.finish({made[1][0]: made[1][1]}))[0].outcome == "committed"
    counters = store.running.store.counters
    for state, count in {"open": 3, "pending": 2, "exists": 1}.items():
        assert counters.get("opened_blocks_total", state=state) == count
    await nothing_is_held(store)


async def test_no_room_in_flight_refuses_writers_and_leaves_readers_alone(
    scope: ScopeDigest,
) -> None:
    limits = StoreLimits(max_block_bytes=20_000, max_in_flight_bytes=20_000)
    async with (
        LocalStore(StoreConfig(limits=limits)) as store,
        StoreClient(store.address, timeout_s=60) as client,
    ):
        await client.put(blocks(scope, 1))
        made = blocks(scope, 4, first=10)
        async with client.write(timeout_s=60) as writer:
            await open_all(writer, made)  # reserves nothing
            following = Reader(client, made)
            for at in range(3):
                await writer.send(segment for block in made for segment in layer(block, at))
            await following.until(24)
            assert await Reader(client, blocks(scope, 1)).reasons() == [""]
            await writer.send(segment for block in made for segment in layer(block, 3))
            outcomes = await writer.finish(dict(made))
            assert [o.outcome for o in outcomes] == [
                *("committed", "rejected", "committed", "committed")
            ]
            assert outcomes[1].reason.startswith("throttled: in_flight")
            assert await following.reasons() == ["", "rejected", "", ""]
            await open_all(writer, [made[1]])
            assert (await writer.finish({made[1][0]: made[1][1]}))[0].outcome == "committed"
        counters = store.running.store.counters
        assert counters.get("puts_total", outcome="rejected", reason="throttled") == 1
        await nothing_is_held(store)


async def test_a_reader_that_leaves_frees_what_it_held(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    made = blocks(scope, 3)
    reader = Reader(client, made)
    async with client.write(timeout_s=60) as writer:
        await open_all(writer, made)
        await writer.send(layer(made[0], 0))
        await reader.until(2)
        await reader.cancel()
        await writer.finish({made[0][0]: made[0][1]})
    await nothing_is_held(store)
    counters = store.running.store.counters
    assert counters.get("attached_blocks_total", outcome="cancelled") == 3
    assert counters.get("abandoned_strata_total") == 6


# What a writer does by hand.


def opening(block: Block, number: int = 0, **changes: Any) -> pb.WriteOpen:
    key, _ = block
    sizes: Any = [{"stratum": s, "frame_bytes": n} for s, n in SIZES.items()]
    made = pb.WriteOpen(
        block=number,
        key=pb.BlockKey(scope=key.scope, block_hash=key.block_hash),
        header=draft(block),
        strata=sizes,
    )
    made.MergeFrom(pb.WriteOpen(**changes))
    return made


def segment(number: int, stratum: int, layer_number: int, data: bytes, **other: Any) -> Any:
    known: dict[str, Any] = {
        "block": number,
        "stratum": stratum,
        "layer": layer_number,
        "length": len(data),
        "checksum": segment_checksum(data),
        "data": data,
    }
    return pb.LayerSegment(**{**known, **other})


def finishing(number: int, frames: dict[int, bytes]) -> pb.WriteFinish:
    heads: Any = [
        {"stratum": s, "head": f[: Frame.open(f).head_bytes]} for s, f in sorted(frames.items())
    ]
    return pb.WriteFinish(block=number, heads=heads)


def all_segments(number: int, block: Block) -> list[pb.LayerSegment]:
    return [segment(number, s, n, data) for at in range(4) for _, s, n, data in layer(block, at)]


class RawWriter:
    """A Write stream of messages made by hand."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        stub: Any = KVStoreStub(channel)  # type: ignore[no-untyped-call]
        self.call = stub.Write(timeout=60, metadata=CALL_METADATA)
        self._waiting: list[pb.WriteStatus] = []

    async def say(self, **fields: Any) -> None:
        await self.call.write(pb.WriteRequest(**fields))

    async def status(self) -> tuple[int, str, str, str]:
        """Return block, state, outcome and reason of what is told next."""
        while not self._waiting:
            async with asyncio.timeout(SOON_S):
                reply = await self.call.read()
            assert reply is not grpc.aio.EOF, "the stream ended"
            self._waiting += reply.statuses
        told = self._waiting.pop(0)
        state = pb.WriteState.Name(told.state).removeprefix("WRITE_STATE_").lower()
        outcome = pb.PutOutcome.Name(told.result.outcome).removeprefix("PUT_OUTCOME_").lower()
        return told.block, state, outcome, told.result.reason

    async def error(self) -> KVStrataError:
        """Return what the stream ends with."""
        try:
            async with asyncio.timeout(SOON_S):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
                await self.call
        except grpc.RpcError as error:
            return from_rpc_error(error)
        raise AssertionError("the stream ended well")


@pytest.fixture
async def raw(store: LocalStore) -> AsyncIterator[RawWriter]:
    async with open_channel(store.address) as channel:
        made = RawWriter(channel)
        yield made
        made.call.cancel()


async def test_a_segment_that_fails_its_checksum_reaches_nobody_and_ends_its_block_alone(
    raw: RawWriter, client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    bad, good = blocks(scope, 2)
    reader = Reader(client, [bad, good])
    await raw.say(opens=[opening(bad, 0), opening(good, 1)])
    assert (await raw.status())[:2] == (0, "open")
    assert (await raw.status())[:2] == (1, "open")
    await raw.say(segments=[segment(0, BASE, 0, b"good"), segment(1, BASE, 0, b"good")])
    await reader.until(2)
    await raw.say(segments=[segment(0, BASE, 1, b"BAD", checksum=1), segment(0, BASE, 2, b"more")])
    told = await raw.status()
    assert (told[:3], told[3].split(":")[0]) == ((0, "done", "rejected"), "corrupt")
    async with asyncio.timeout(SOON_S):
        while 0 not in reader.ends:
            await asyncio.sleep(0.01)
    assert reader.ends[0].reason == "corrupt"
    assert b"BAD" not in [s.data for s in reader.segments]
    await raw.say(aborts=[1, 0])
    assert await raw.status() == (1, "done", "rejected", "abandoned: by its writer")
    assert await reader.reasons() == ["corrupt", "abandoned"]
    counters = store.running.store.counters
    assert counters.get("puts_total", outcome="rejected", reason="corrupt") == 1
    assert counters.get("unfinished_blocks_total", reason="abandoned") == 1
    await raw.call.done_writing()
    await nothing_is_held(store)


async def test_a_head_that_does_not_fit_what_was_sent_is_refused_and_readers_are_told(
    raw: RawWriter, client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    made = blocks(scope, 5)
    reader = Reader(client, made)
    other_writing = sample_block(scope, 0, strata=STRATA, seed=1)
    await raw.say(opens=[opening(block, n) for n, block in enumerate(made)])
    for _ in made:
        assert (await raw.status())[1] == "open"
    await raw.say(segments=[s for n, block in enumerate(made) for s in all_segments(n, block)])
    await reader.until(40)
    other_codec = reframed(made[1][1], codec="other")
    torn = {s: bytearray(f) for s, f in made[2][1].items()}
    torn[BASE][40] ^= 1
    wrong = {
        0: ("corrupt", other_writing[1]),
        1: ("identity", other_codec),
        2: ("corrupt", {s: bytes(f) for s, f in torn.items()}),
        3: ("corrupt", {BASE: made[3][1][BASE]}),
    }
    for number, (kind, frames) in wrong.items():
        heads: Any = [{"stratum": s, "head": f[: head_bytes(f)]} for s, f in frames.items()]
        await raw.say(finishes=[pb.WriteFinish(block=number, heads=heads)])
        told = await raw.status()
        assert (told[:3], told[3].split(":")[0]) == ((number, "done", "rejected"), kind)
    mixed = {BASE: made[4][1][BASE], MID: reframed(made[4][1], encoding_id=b"e" * 16)[MID]}
    await raw.say(finishes=[finishing(4, mixed)])
    told = await raw.status()
    assert (told[:3], told[3].split(":")[0]) == ((4, "done", "rejected"), "encoding")
    assert await reader.reasons() == ["corrupt", "rejected", "corrupt", "corrupt", "rejected"]
    found = await client.lookup(scope, [key.block_hash for key, _ in made])
    assert found.blocks == ()
    await raw.call.done_writing()
    await nothing_is_held(store)


def head_bytes(frame: bytes) -> int:
    return 32 + int.from_bytes(frame[12:16], "little")


def reframed(frames: dict[int, bytes], **changes: Any) -> dict[int, bytes]:
    made = {}
    for stratum, frame in frames.items():
        opened = Frame.open(frame)
        header = FrameHeader()
        header.CopyFrom(opened.header)
        for name, value in changes.items():
            setattr(header, name, value)
        made[stratum] = encode_frame(header, opened.segments())
    return made


async def test_blocks_that_must_not_be_opened_are_rejected_one_by_one(
    raw: RawWriter, scope: ScopeDigest
) -> None:
    block, other = blocks(scope, 2)
    foreign = opening(block, 0)
    foreign.header.block_hash = other[0].block_hash
    wrong_tokens = opening(block, 1)
    wrong_tokens.header.token_ids[0] += 1
    only_mid = opening(block, 2)
    del only_mid.strata[0]
    with_table = opening(block, 3)
    with_table.header.segments.add(layer=0)
    await raw.say(opens=[foreign, wrong_tokens, only_mid, with_table, opening(block, 4)])
    told = [await raw.status() for _ in range(5)]
    assert [(n, outcome, reason.split(":")[0]) for n, _, outcome, reason in told[:4]] == [
        (0, "rejected", "identity"),
        (1, "rejected", "tokens"),
        (2, "rejected", "strata"),
        (3, "rejected", "identity"),
    ]
    assert told[4][1] == "open"
    await raw.say(segments=[segment(4, BASE, 0, bytes(8001)), segment(4, BASE, 1, b"x")])
    told_4 = await raw.status()
    assert (told_4[:3], told_4[3].split(":")[0]) == ((4, "done", "rejected"), "limit")


async def test_broken_write_streams_get_the_named_error_and_the_service_goes_on(
    store: LocalStore, client: StoreClient, scope: ScopeDigest
) -> None:
    block, other = blocks(scope, 2)
    opened = {"opens": [opening(block)]}
    broken: dict[str, tuple[list[dict[str, Any]], str]] = {
        "a segment of no block": ([{"segments": [segment(0, BASE, 0, b"x")]}], "MalformedMessage"),
        "the end of no block": ([{"finishes": [finishing(3, block[1])]}], "MalformedMessage"),
        "a number used twice": ([opened, {"opens": [opening(other)]}], "MalformedMessage"),
        "another stratum": ([opened, {"segments": [segment(0, 3, 0, b"x")]}], "MalformedMessage"),
        "layers that descend": (
            [opened, {"segments": [segment(0, BASE, 1, b"x"), segment(0, BASE, 0, b"x")]}],
            "MalformedMessage",
        ),
        "a layer beyond any model": (
            [opened, {"segments": [segment(0, BASE, 4096, b"x")]}],
            "MalformedMessage",
        ),
        "a part of another segment": (
            [
                opened,
                {"segments": [segment(0, BASE, 0, b"xy", length=9), segment(0, BASE, 1, b"z")]},
            ],
            "MalformedMessage",
        ),
        "more than announced": (
            [opened, {"segments": [segment(0, BASE, 0, b"xyz", length=2)]}],
            "MalformedMessage",
        ),
        "a part without bytes": (
            [opened, {"segments": [segment(0, BASE, 0, b"", length=2)]}],
            "MalformedMessage",
        ),
        "no strata": ([{"opens": [pb.WriteOpen(key=opening(block).key)]}], "InvalidRequest"),
        "a short key": ([{"opens": [pb.WriteOpen(key=pb.BlockKey(scope=b"s"))]}], "InvalidRequest"),
        "petabytes": (
            [{"opens": [opening(block, strata=[pb.StratumSize(stratum=3, frame_bytes=1 << 50)])]}],  # type: ignore[arg-type]
            "Limit",
        ),
        "no such tier": ([{"opens": [opening(block, durability="tape")]}], "InvalidRequest"),
    }
    async with open_channel(store.address) as channel:
        for what, (requests, name) in broken.items():
            writer = RawWriter(channel)
            with contextlib.suppress(asyncio.InvalidStateError, grpc.RpcError):
                for request in requests:
                    await writer.say(**request)
                await writer.call.done_writing()
            error = await writer.error()
            assert type(error).__name__ == f"{name}Error", what
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT, what
    await nothing_is_held(store)
    async with client.write(timeout_s=60) as good:
        await open_all(good, [block])
        assert (await good.finish({block[0]: block[1]}))[0].outcome == "committed"


async def test_a_stream_that_falls_silent_is_ended_and_its_readers_are_told(
    scope: ScopeDigest,
) -> None:
    made = blocks(scope, 1)
    limits = StoreLimits(put_idle_s=0.5)
    async with (
        LocalStore(StoreConfig(limits=limits)) as store,
        StoreClient(store.address, timeout_s=60) as client,
        open_channel(store.address) as channel,
    ):
        reader = Reader(client, made)
        raw = RawWriter(channel)
        await raw.say(opens=[opening(made[0])])
        begin = time.monotonic()
        while time.monotonic() - begin < 1.5:  # an empty request keeps it alive
            await raw.say()
            await asyncio.sleep(0.02)
        assert not reader.ends
        assert isinstance(await raw.error(), DeadlineError)
        assert await reader.reasons() == ["writer_gone"]
        await nothing_is_held(store)


async def test_the_writer_has_a_deadline_of_its_own(
    client: StoreClient, scope: ScopeDigest
) -> None:
    made = blocks(scope, 1)
    async with client.write(timeout_s=1.0) as writer:
        await open_all(writer, made)
        await asyncio.sleep(1.1)
        with pytest.raises(DeadlineError):
            await writer.finish(dict(made))


async def test_a_finished_block_is_committed_though_its_writer_dies_at_once(
    client: StoreClient, store: LocalStore, scope: ScopeDigest
) -> None:
    made = blocks(scope, 2)
    reader = Reader(client, made)
    async with client.write(timeout_s=60) as writer:
        await open_all(writer, made)
        await writer.send(layer(made[0], 0))
        await reader.until(2)
        finishing_it = asyncio.create_task(writer.finish({made[0][0]: made[0][1]}))
        async with asyncio.timeout(SOON_S):
            while 0 not in reader.ends:
                await asyncio.sleep(0.005)
        finishing_it.cancel()
    assert await reader.reasons() == ["", "writer_gone"]
    assert len((await client.lookup(scope, [made[0][0].block_hash])).blocks) == 1
    await nothing_is_held(store)


def test_what_real_headers_take_is_far_below_what_an_opening_may_carry(scope: ScopeDigest) -> None:
    header = draft(sample_block(scope, 0, strata=STRATA, num_layers=128))
    header.token_ids[:] = [(1 << 32) - 1 - n for n in range(64)]
    header.profile, header.codec = bytes(16), "a codec of a long name"
    assert header.ByteSize() < MAX_HEADER_BYTES / 4


@pytest.mark.parametrize("where", ["known", "unknown"])
async def test_a_header_larger_than_any_real_one_is_refused_before_anything_is_kept(
    raw: RawWriter, store: LocalStore, scope: ScopeDigest, where: str
) -> None:
    first, second = blocks(scope, 2)
    large = opening(second, 1)
    if where == "known":
        large.header.codec = "x" * MAX_HEADER_BYTES
    else:  # field 99, of bytes
        large.header.MergeFromString(b"\x9a\x06\x80\x20" + bytes(4096))
    await raw.say(opens=[opening(first), large])
    error = await raw.error()
    assert isinstance(error, LimitError)
    assert "header of" in error.message
    await nothing_is_held(store)
    assert store.running.store.counters.get("opened_blocks_total") == 0


class SlowReader:
    """A Write stream whose client sends all that it is let, and reads what it is told to."""

    def __init__(self, store: LocalStore, requests: list[pb.WriteRequest], idle_s: float) -> None:
        self.num_sent = 0
        running = store.running
        self.stream = WriteStream(
            running.store,
            running.workload,
            StoreLimits(put_idle_s=idle_s),
            running.tenants.identify([]),
            running.quotas,
            ByteBudget(1 << 20),
        )
        self.replies = self.stream.serve(self._send(requests))

    async def _send(self, requests: list[pb.WriteRequest]) -> AsyncIterator[pb.WriteRequest]:
        for request in requests:
            self.num_sent += 1
            yield request

    async def until_it_waits(self) -> int:
        """Read one reply, and return how many requests were taken when no more are."""
        await anext(self.replies)
        async with asyncio.timeout(SOON_S):
            while not self.stream._statuses.full():
                await asyncio.sleep(0.01)
        for _ in range(100):
            await asyncio.sleep(0)
        return self.num_sent


@pytest.fixture
def few_statuses(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(write_stream, "MAX_STATUSES", 4)
    return 4


async def test_a_client_that_reads_nothing_is_read_no_further(
    store: LocalStore, scope: ScopeDigest, few_statuses: int
) -> None:
    made = blocks(scope, 20)
    opens = [pb.WriteRequest(opens=[opening(block, n)]) for n, block in enumerate(made)]
    reader = SlowReader(store, opens, FOREVER_S)
    assert await reader.until_it_waits() <= 2 * few_statuses + 2
    assert len(reader.stream._open) < 20
    told = [status async for reply in reader.replies for status in reply.statuses]
    by_state = [status.block for status in told if status.state == pb.WRITE_STATE_OPEN]
    assert by_state[-1] == 19
    assert len(by_state) >= 20 - few_statuses - 1  # the first reply was read before
    assert [s.block for s in told if s.state == pb.WRITE_STATE_DONE] == list(range(20))
    await nothing_is_held(store)


async def test_blocks_of_a_client_that_reads_nothing_for_too_long_end(
    store: LocalStore, scope: ScopeDigest, few_statuses: int
) -> None:
    made = blocks(scope, 20)
    opens = [pb.WriteRequest(opens=[opening(block, n)]) for n, block in enumerate(made)]
    reader = SlowReader(store, opens, 0.3)
    await reader.until_it_waits()
    await nothing_is_held(store)
    with pytest.raises(DeadlineError, match="no status was read"):
        async for _ in reader.replies:
            pass


async def test_finished_blocks_are_committed_though_nobody_reads_their_outcome(
    store: LocalStore, scope: ScopeDigest, few_statuses: int
) -> None:
    made = blocks(scope, 6)
    requests = [pb.WriteRequest(opens=[opening(b, n) for n, b in enumerate(made[:4])])]
    requests += [
        pb.WriteRequest(segments=all_segments(n, block), finishes=[finishing(n, block[1])])
        for n, block in enumerate(made[:4])
    ]
    requests.append(pb.WriteRequest(opens=[opening(b, 4 + n) for n, b in enumerate(made[4:])]))
    reader = SlowReader(store, requests, FOREVER_S)
    await reader.until_it_waits()
    async with asyncio.timeout(SOON_S):
        while len(await store.running.store.dram.keys(10)) < 4:
            await asyncio.sleep(0.01)
        await reader.replies.aclose()
    await nothing_is_held(store)
    assert not reader.stream._commits
