"""How fast the store moves blocks: Put and Get over gRPC, per tier and number of streams.

    make bench-store                       # all; --quick under a minute, --json for machines

Beside it, in the same run, the same bytes by memcpy, over a bare socket of the loopback, over bare
grpcio streaming and by redis-py. Every system takes its turn in every round, so that noise hits all
alike; a ratio is the median over rounds. Store, Redis and the bare servers are processes of their
own. A block is random bytes as large as a ``balanced`` block of the model; ``effective_gbps`` is
the bf16 KV that it stands for.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import records
from store_wires import GrpcPeer, Memcpy, RedisPeer, SocketPeer

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import RedisServer, sample_block
from kvstrata.protos.identity import BlockKey, CacheScope

BASE, MID = 1, 2
SCOPE = CacheScope(b"bench" + bytes(11), "bfloat16", "sample/1").digest()
# bf16 bytes of a block of 64 tokens, and of its BASE and MID by `balanced` (make bench-codec).
SHAPES = {
    "SmolLM2-135M": (30 * 3 * 64 * 2 * 2 * 64, 186_000, 20_000, 30),
    "Llama-3-8B": (32 * 8 * 128 * 2 * 2 * 64, 1_060_000, 115_000, 32),
}
STREAMS = (1, 4, 16, 32)
BLOCKS_PER_CALL = 8
ROUNDS, QUICK_ROUNDS = 7, 3
LOOKUP_BLOCKS = 2048
PACKAGES = ("grpcio", "redis", "protobuf")

Block = tuple[BlockKey, dict[int, bytes]]
Call = Callable[[], Awaitable[list[float]]]


@dataclass(frozen=True)
class Entry:
    """One system in a contest; a call moves ``num_bytes`` and returns seconds per request."""

    system: str
    call: Call
    num_bytes: int


@contextlib.asynccontextmanager
async def store(*options: str, redis_url: str = "") -> AsyncIterator[str]:
    """Run a store in a process of its own; give its address."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "kvstrata.kvstore_service", "--log-level", "ERROR", *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"KVSTRATA_REDIS_URL": redis_url},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the store did not start")
        yield json.loads(line)["address"]
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def blocks_of(shape: str, count: int) -> list[Block]:
    _, base, mid, layers = SHAPES[shape]
    return [
        sample_block(SCOPE, number, strata={BASE: base, MID: mid}, num_layers=layers)
        for number in range(count)
    ]


def size_of(blocks: Sequence[Block]) -> int:
    return sum(len(frame) for _, frames in blocks for frame in frames.values())


async def timed(call: Callable[[], Awaitable[object]]) -> list[float]:
    start = time.perf_counter()
    await call()
    return [time.perf_counter() - start]


class Gets:
    """Reads all blocks, ``streams`` calls at a time, a few blocks each."""

    def __init__(self, client: StoreClient, blocks: Sequence[Block], streams: int) -> None:
        self._client = client
        hashes = [key.block_hash for key, _ in blocks]
        self._calls = [
            hashes[i : i + BLOCKS_PER_CALL] for i in range(0, len(hashes), BLOCKS_PER_CALL)
        ]
        self._streams = streams

    async def call(self) -> list[float]:
        """Read everything once; return seconds of each request."""
        waiting, seconds = iter(self._calls), []

        async def stream() -> None:
            for hashes in waiting:
                start = time.perf_counter()
                async for found in self._client.get(SCOPE, hashes, [BASE, MID], timeout_s=120):
                    if found.frame is None:
                        raise AssertionError(f"a miss: {found.miss}")
                seconds.append(time.perf_counter() - start)

        await asyncio.gather(*(stream() for _ in range(self._streams)))
        return seconds


class Puts:
    """Deletes, untimed, then writes all blocks over ``streams`` streams."""

    def __init__(self, client: StoreClient, blocks: Sequence[Block], streams: int) -> None:
        self._client = client
        self._keys = [key for key, _ in blocks]
        self._shares = [blocks[i::streams] for i in range(streams) if blocks[i::streams]]

    async def call(self) -> list[float]:
        """Write everything once; return the seconds of it all."""
        await self._client.delete(self._keys)
        begun = time.perf_counter()

        async def stream(share: Sequence[Block]) -> None:
            for outcome in await self._client.put(share, timeout_s=120):
                if outcome.outcome != "committed":
                    raise AssertionError(f"{outcome.outcome}: {outcome.reason}")

        await asyncio.gather(*map(stream, self._shares))
        return [time.perf_counter() - begun]


async def rounds(entries: Sequence[Entry], count: int, tick: Callable[[], None]) -> list[Any]:
    """Return, per entry, (median GB/s, median ratio to the first entry, seconds per request)."""
    taken: list[list[float]] = [[] for _ in entries]
    requests: list[list[float]] = [[] for _ in entries]
    for turn in range(count + 1):  # the first one warms up
        for place in range(len(entries)):
            number = (turn + place) % len(entries)
            start = time.perf_counter()
            seconds = await entries[number].call()
            wall = time.perf_counter() - start
            # A put's untimed deletion is no part of it; of gets in parallel the wall counts.
            taken[number].append(seconds[0] if len(seconds) == 1 else wall)
            requests[number] += seconds
            tick()
    taken, requests = [t[1:] for t in taken], [r[len(r) // (count + 1) :] for r in requests]
    rates = [[e.num_bytes / s for s in t] for e, t in zip(entries, taken, strict=True)]
    return [
        (
            statistics.median(mine) / 1e9,
            statistics.median(a / b for a, b in zip(mine, rates[0], strict=True)),
            sorted(request),
        )
        for mine, request in zip(rates, requests, strict=True)
    ]


def row(shape: str, op: str, tier: str, streams: int, entry: Entry, found: Any) -> dict[str, Any]:
    gbps, ratio, seconds = found
    bf16, base, mid, _ = SHAPES[shape]
    return {
        "bench": "store",
        "system": entry.system,
        "op": op,
        "tier": tier,
        "streams": streams,
        "block": shape,
        "gbps": round(gbps, 5),
        "of_kvstrata": round(ratio, 3),
        "effective_gbps": round(gbps * bf16 / (base + mid), 3)
        if entry.system == "kvstrata"
        else None,
        "p50_ms": round(1e3 * seconds[len(seconds) // 2], 3),
        "p99_ms": round(1e3 * seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)], 3),
    }


async def measure(
    shape: str, tier: str, streams: Sequence[int], count: int, tick: Callable[[], None]
) -> AsyncIterator[dict[str, Any]]:
    """Yield the rows of one tier and shape."""
    blocks = blocks_of(shape, 64 if SHAPES[shape][1] < 1 << 19 else 32)
    size = size_of(blocks)
    async with contextlib.AsyncExitStack() as stack:
        options, redis_url = ["--dram", str(2 * size)], ""
        if tier != "dram":  # too small to keep what is promoted
            options = ["--dram", str(size // len(blocks) + 4096)]
        if tier == "redis":
            redis_url = stack.enter_context(RedisServer()).url
        if tier == "ssd":
            options += ["--ssd-path", stack.enter_context(tempfile.TemporaryDirectory())]
        address = await stack.enter_async_context(store(*options, redis_url=redis_url))
        client = await stack.enter_async_context(StoreClient(address, timeout_s=60))
        grpc_peer = GrpcPeer(size // len(blocks), len(blocks))
        socket_peer = SocketPeer(size // len(blocks), len(blocks))
        stack.callback(grpc_peer.close)
        stack.callback(socket_peer.close)
        stack.push_async_callback(grpc_peer.aclose)
        copy = Memcpy(size)
        baselines = [
            Entry("grpcio", lambda: timed(grpc_peer.call), size),
            Entry("socket", lambda: timed(socket_peer.call), size),
            Entry("memcpy", lambda: timed(copy.call), size),
        ]
        values = [frame for _, frames in blocks for frame in frames.values()]
        redis_peer = RedisPeer(redis_url, values) if redis_url else None
        if redis_peer:
            stack.push_async_callback(redis_peer.aclose)
        for parallel in streams:
            puts = Puts(client, blocks, parallel)
            entries = [Entry("kvstrata", puts.call, size)]
            if redis_peer:
                entries.append(Entry("redis-py", lambda: timed(redis_peer.put), size))
            for entry, found in zip(entries, await rounds(entries, count, tick), strict=True):
                yield row(shape, "put", tier, parallel, entry, found)
            gets = Gets(client, blocks, parallel)
            entries = [Entry("kvstrata", gets.call, size), *baselines]
            if redis_peer:
                entries.append(Entry("redis-py", lambda: timed(redis_peer.get), size))
            for entry, found in zip(entries, await rounds(entries, count, tick), strict=True):
                yield row(shape, "get", tier, parallel, entry, found)


async def lookup(count: int) -> dict[str, Any]:
    """Return the row of looking up the blocks of a prompt of 128k tokens."""
    blocks = [sample_block(SCOPE, n, strata={BASE: 400}) for n in range(LOOKUP_BLOCKS)]
    async with store("--dram", "64MiB") as address, StoreClient(address, timeout_s=60) as client:
        await client.put(blocks, timeout_s=120)
        hashes, seconds = [key.block_hash for key, _ in blocks], []
        for _ in range(count * 10):
            start = time.perf_counter()
            found = await client.lookup(SCOPE, hashes)
            seconds.append(time.perf_counter() - start)
            if len(found.blocks) != LOOKUP_BLOCKS:
                raise AssertionError("blocks are missing")
    seconds.sort()
    entry = Entry("kvstrata", lambda: timed(asyncio.sleep), 0)
    return row("SmolLM2-135M", f"lookup {LOOKUP_BLOCKS}", "dram", 1, entry, (0, 1, seconds)) | {
        "gbps": None,
        "effective_gbps": None,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    columns = [key for key in rows[0] if key != "bench"]
    table = Table(title="the store over gRPC, and the same bytes otherwise")
    for key in columns:
        table.add_column(key)
    for one in rows:
        style = "bold" if one["system"] == "kvstrata" else None
        table.add_row(*("-" if one[key] is None else str(one[key]) for key in columns), style=style)
    Console(width=140).print(table)


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    count = QUICK_ROUNDS if options.quick else ROUNDS
    shapes = ["SmolLM2-135M"] if options.quick else list(SHAPES)
    streams = (1, 16) if options.quick else STREAMS
    tiers = ("dram", "redis", "ssd")
    rows = []
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        # per tier and stream: put (1 system, redis 2), get (4, redis 5)
        total = len(shapes) * len(streams) * (5 + 7 + 5) * (count + 1)
        bar = progress.add_task("", total=total)
        for shape in shapes:
            for tier in tiers:
                progress.update(bar, description=f"{shape} {tier}")
                found = measure(shape, tier, streams, count, lambda: progress.advance(bar))
                rows += [one async for one in found]
        rows.append(await lookup(count))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few streams and rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--no-save", action="store_true", help="leave results/ as it is")
    options = parser.parse_args()
    rows = asyncio.run(run(options))
    if not (options.quick or options.no_save):
        records.save("store", rows, **records.machine(*PACKAGES))
    if options.json:
        for one in rows:
            print(json.dumps(one))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
