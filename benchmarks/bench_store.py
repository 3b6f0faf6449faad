"""How fast the store moves blocks: Put and Get over gRPC, per tier and number of streams.

    make bench-store                       # all; ARGS=--quick takes a minute
    make bench-store ARGS="--part redis"   # one part: other parts' results stay

Beside it, in the same run, the same bytes by memcpy, over a bare socket of the loopback, over bare
grpcio streaming and by redis-py; and, once ``make peers`` has installed them, the KV of the same
tokens through LMCache (redis) and Mooncake (dram), which move it as bf16. Every system takes its
turn in every round, so that noise hits all alike; a ratio is the median over rounds. Store, Redis
and peers are processes of their own. A block is random bytes as large as a ``balanced`` block of
the model; ``effective_gbps`` is the bf16 KV that it stands for. No system's time has the codec or
a copy to a model in it.
"""

import argparse
import asyncio
import contextlib
import json
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
import store_peers
from child_peer import ChildPeer, PeerError
from store_calls import (
    BASE,
    BLOCKS_PER_CALL,
    SCOPE,
    SHAPES,
    Gets,
    Puts,
    Shape,
    blocks_of,
    size_of,
    store,
    timed,
)
from store_marks import marks
from store_wires import GrpcPeer, Memcpy, RedisPeer, SocketPeer

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import RedisServer, sample_block
from kvstrata.protos.identity import BLOCK_TOKENS

TIERS = ("dram", "redis", "ssd", "object")
PARTS = (*TIERS, "lookup", "index")
STREAMS = (1, 4, 16, 32)
ROUNDS, QUICK_ROUNDS = 7, 3
LOOKUP_BLOCKS = 2048
INDEX_BLOCKS, QUICK_INDEX_BLOCKS = 10_000_000, 100_000
PACKAGES = ("grpcio", "redis", "hiredis", "protobuf", "numpy")


@dataclass(frozen=True)
class Entry:
    """One system in a contest.

    Attributes:
        system: Its name.
        call: Moves everything once; returns the seconds of it all, then those of its requests.
        num_bytes: What a call moves.
        kv_bytes: The bf16 KV that this stands for; 0 where it stands for none.
    """

    system: str
    call: Callable[[], Awaitable[list[float]]]
    num_bytes: int
    kv_bytes: int = 0


async def rounds(entries: Sequence[Entry], count: int, tick: Callable[[], None]) -> list[Any]:
    """Return, per entry, (seconds of each round, sorted seconds of all requests)."""
    walls: list[list[float]] = [[] for _ in entries]
    requests: list[list[float]] = [[] for _ in entries]
    for turn in range(count + 1):  # the first one warms up
        for place in range(len(entries)):
            number = (turn + place) % len(entries)
            wall, *each = await entries[number].call()
            if turn:
                walls[number].append(wall)
                requests[number] += each or [wall]
            tick()
    return [(wall, sorted(request)) for wall, request in zip(walls, requests, strict=True)]


def percentile(seconds: Sequence[float], part: float) -> float:
    return round(1e3 * seconds[min(len(seconds) - 1, int(len(seconds) * part))], 3)


def rows_of(entries: Sequence[Entry], found: Sequence[Any], **what: Any) -> list[dict[str, Any]]:
    """Return a row an entry; the first entry is the store."""
    rows = []
    for entry, (walls, requests) in zip(entries, found, strict=True):
        weigh = (lambda e: e.kv_bytes) if entry.kv_bytes else (lambda e: e.num_bytes)
        ratio = weigh(entry) / weigh(entries[0])
        pairs = zip(walls, found[0][0], strict=True)
        gbps = entry.num_bytes / statistics.median(walls) / 1e9
        rows.append(
            {
                "bench": "store",
                "system": entry.system,
                **what,
                "gbps": round(gbps, 4),
                "effective_gbps": round(gbps * entry.kv_bytes / entry.num_bytes, 3)
                if entry.kv_bytes
                else None,
                "of_kvstrata": round(statistics.median(ratio * b / a for a, b in pairs), 3),
                "p50_ms": percentile(requests, 0.5),
                "p99_ms": percentile(requests, 0.99),
            }
        )
    return rows


async def peers_of(tier: str, shape: Shape, count: int, stack: Any) -> list[Any]:
    """Return (name, peer) of the installed peers that compare with this tier, started."""
    installed = store_peers.versions()
    wanted: list[tuple[str, str, tuple[object, ...]]] = []
    if tier == "dram" and installed["mooncake"]:
        wanted.append(("mooncake", "peer_mooncake.py", (shape.bf16_bytes, count)))
    if tier == "redis" and installed["lmcache"]:
        kv = (shape.layers, shape.heads, shape.head_dim, count * BLOCK_TOKENS)
        for name, scheme in (("lmcache", "redis"), ("lmcache-resp", "resp")):
            port = stack.enter_context(RedisServer()).port
            wanted.append((name, "peer_lmcache.py", (f"{scheme}://127.0.0.1:{port}", *kv)))
    started = []
    for name, script, args in wanted:
        peer = ChildPeer(store_peers.ENVIRONMENT, script, *map(str, args))
        stack.callback(peer.close)
        try:
            await peer.start()
            started.append((name, peer))
        except PeerError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return started


async def measure(
    block: str, tier: str, streams: Sequence[int], count: int, tick: Callable[[], None]
) -> AsyncIterator[dict[str, Any]]:
    """Yield the rows of one tier and shape."""
    shape = SHAPES[block]
    blocks = blocks_of(shape, 64 if shape.base < 1 << 19 else 32)
    size, kv = size_of(blocks), shape.bf16_bytes * len(blocks)
    async with contextlib.AsyncExitStack() as stack:
        options, redis_url = ["--dram", str(2 * size)], ""
        if tier != "dram":  # too small to keep what is promoted
            options = ["--dram", str(size // len(blocks) + 4096)]
        if tier == "redis":
            redis_url = stack.enter_context(RedisServer()).url
        if tier == "ssd":
            options += ["--ssd-path", stack.enter_context(tempfile.TemporaryDirectory())]
        if tier == "object":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            options += ["--object-url", f"file://{folder}"]
        address = await stack.enter_async_context(store(*options, redis_url=redis_url))
        client = await stack.enter_async_context(StoreClient(address, timeout_s=60))
        calls = [
            size_of(blocks[i : i + BLOCKS_PER_CALL]) for i in range(0, len(blocks), BLOCKS_PER_CALL)
        ]
        wires: dict[str, Any] = {"grpcio": GrpcPeer(calls), "socket": SocketPeer(calls)}
        for wire in wires.values():
            stack.callback(wire.close)
        stack.push_async_callback(wires["grpcio"].aclose)
        wires["memcpy"] = Memcpy(size)
        if redis_url:
            values = [frame for _, frames in blocks for frame in frames.values()]
            wires["redis-py"] = RedisPeer(redis_url, values)
            stack.push_async_callback(wires["redis-py"].aclose)
        peers = await peers_of(tier, shape, len(blocks), stack)
        for parallel in streams:
            for op, ours in (("put", Puts), ("get", Gets)):
                entries = [Entry("kvstrata", ours(client, blocks, parallel).call, size, kv)]
                entries += [
                    Entry(wire, _WireCall(getattr(peer, op), parallel).call, size)
                    for wire, peer in wires.items()
                    if hasattr(peer, op)
                ]
                entries += [
                    Entry(name, _PeerCall(peer, op, parallel).call, peer.num_bytes, peer.num_bytes)
                    for name, peer in peers
                ]
                found = await rounds(entries, count, tick)
                what = {"op": op, "tier": tier, "streams": parallel, "block": block}
                for row in rows_of(entries, found, **what):
                    yield row


@dataclass(frozen=True)
class _WireCall:
    move: Callable[[int], Awaitable[object]]
    streams: int

    async def call(self) -> list[float]:
        return await timed(self.move(self.streams))


@dataclass(frozen=True)
class _PeerCall:
    peer: ChildPeer
    op: str
    streams: int

    async def call(self) -> list[float]:
        return await self.peer.call(self.op, self.streams)


def time_row(op: str, **found: Any) -> dict[str, Any]:
    """Return a row of something that moves no blocks."""
    empty = {"gbps": None, "effective_gbps": None, "of_kvstrata": None}
    what = {"op": op, "tier": "dram", "streams": 1, "block": None}
    return {"bench": "store", "system": "kvstrata", **what, **empty, **found}


async def lookup(count: int) -> dict[str, Any]:
    """Return the row of looking up the blocks of a prompt of 128k tokens."""
    blocks = [sample_block(SCOPE, n, strata={BASE: 400}) for n in range(LOOKUP_BLOCKS)]
    async with store("--dram", "64MiB") as address, StoreClient(address, timeout_s=60) as client:
        await client.put(blocks, timeout_s=120)
        hashes, seconds = [key.block_hash for key, _ in blocks], []
        for _ in range(count * 30):
            start = time.perf_counter()
            found = await client.lookup(SCOPE, hashes)
            seconds.append(time.perf_counter() - start)
            if len(found.blocks) != LOOKUP_BLOCKS:
                raise AssertionError("blocks are missing")
    seconds = sorted(seconds[count:])
    times = {"p50_ms": percentile(seconds, 0.5), "p99_ms": percentile(seconds, 0.99)}
    return time_row(f"lookup {LOOKUP_BLOCKS}", **times)


def index(count: int) -> dict[str, Any]:
    """Return the row of an index of so many blocks; see ``store_index.py``."""
    script = str(Path(__file__).parent / "store_index.py")
    command = [sys.executable, "-P", script, str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time_row("index", **json.loads(done.stdout))


def show(rows: Sequence[dict[str, Any]]) -> None:
    columns = [key for key in rows[0] if key != "bench"]
    table = Table(title="the store over gRPC, and the same KV otherwise")
    for key in columns:
        table.add_column(key)
    for one in rows:
        style = "bold" if one["system"] == "kvstrata" else None
        cells = ("-" if one[key] is None else str(one[key]) for key in columns)
        table.add_row(*cells, style=style)
    console = Console(width=140)
    console.print(table)
    for one in rows:
        if one["op"] == "index":
            console.print_json(data=one)
    for line in marks(rows):
        console.print(line)


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    count = QUICK_ROUNDS if options.quick else ROUNDS
    shapes = ["SmolLM2-135M"] if options.quick else list(SHAPES)
    streams = (1, 16) if options.quick else STREAMS
    parts = options.part or PARTS
    rows = []
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        bar = progress.add_task("", total=None)
        for tier in TIERS:
            for shape in shapes if tier in parts else ():
                progress.update(bar, description=f"{shape} {tier}")
                found = measure(shape, tier, streams, count, lambda: progress.advance(bar))
                rows += [one async for one in found]
        if "lookup" in parts:
            rows.append(await lookup(count))
        if "index" in parts:
            progress.update(bar, description="index")
            rows.append(index(QUICK_INDEX_BLOCKS if options.quick else INDEX_BLOCKS))
    return rows


def part_of(row: dict[str, Any]) -> str:
    return row["tier"] if row["op"] in ("put", "get") else row["op"].partition(" ")[0]


def save(rows: Sequence[dict[str, Any]], parts: Sequence[str]) -> None:
    """Write the results; if only ``parts`` were measured, beside what is known of the others."""
    facts = records.machine(*PACKAGES) | store_peers.versions()
    known = records.saved("store", facts) if parts else []
    if parts and not known and (records.FOLDER / "store.json").exists():
        print("rows of another machine, or of other versions, are left out", file=sys.stderr)
    kept = [one for one in known if part_of(one) not in parts]
    ordered = sorted([*kept, *rows], key=lambda one: PARTS.index(part_of(one)))
    records.save("store", ordered, **facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few streams and rounds")
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--no-save", action="store_true", help="leave results/ as it is")
    options = parser.parse_args()
    rows = asyncio.run(run(options))
    if not (options.quick or options.no_save):
        save(rows, options.part or [])
    if options.json:
        for one in rows:
            print(json.dumps(one))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
