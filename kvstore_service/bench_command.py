"""The ``kvctl bench`` command: how fast a running store moves blocks, seen from here."""

import asyncio
import json
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos.credentials import ANONYMOUS
from kvstrata.protos.errors import InvalidRequestError
from kvstrata.protos.identity import BlockKey, CacheScope
from kvstrata.protos.sizes import parse_size

BASE = 1
BLOCKS_PER_CALL = 8  # of a Get
NAMES_PER_CALL = StoreLimits().max_hashes  # of a Lookup and a Delete
MAX_BYTES = 4 << 30
MAX_STREAMS, MAX_ROUNDS = 256, 1000
_LEAST_BYTES = 4096

Block = tuple[BlockKey, Mapping[int, bytes]]


@dataclass
class Measured:
    """One operation, round by round.

    Attributes:
        op: "put", "get" or "lookup".
        num_bytes: Moved a round.
        rounds_s: Seconds of each round.
        calls_s: Seconds of each call.
        failures: Blocks that were refused or missing, by reason.
    """

    op: str
    num_bytes: int
    rounds_s: list[float] = field(default_factory=list)
    calls_s: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """Count a block."""
        self.failures[reason] = self.failures.get(reason, 0) + 1

    def result(self) -> dict[str, Any]:
        """Return medians and percentiles."""
        calls = sorted(self.calls_s)
        return {
            "op": self.op,
            "gbps": round(self.num_bytes / statistics.median(self.rounds_s) / 1e9, 4),
            "p50_ms": round(1e3 * calls[len(calls) // 2], 3),
            "p99_ms": round(1e3 * calls[len(calls) * 99 // 100], 3),
            "failures": self.failures,
        }


class Bench:
    """Puts, gets, looks up and deletes the same blocks, round after round.

    Args:
        client: To the store.
        blocks: What to move; nobody else's.
        streams: Calls at a time.
    """

    def __init__(self, client: StoreClient, blocks: Sequence[Block], streams: int) -> None:
        self._client = client
        self._blocks = blocks
        self._streams = streams
        size = sum(len(frame) for _, frames in blocks for frame in frames.values())
        self.ops = [Measured("put", size), Measured("get", size), Measured("lookup", 0)]

    async def run(self, rounds: int) -> None:
        """Do ``rounds`` rounds; the blocks are deleted in the end, whatever happens."""
        put, get, lookup = self.ops
        shares = [self._blocks[i :: self._streams] for i in range(self._streams)]
        calls, names = self._parts(BLOCKS_PER_CALL), self._parts(NAMES_PER_CALL)
        try:
            for _ in range(rounds):
                await self._round(put, [share for share in shares if share], self._put)
                await self._round(get, calls, self._get)
                await self._round(lookup, names, self._lookup)
                await self._delete()
        finally:
            await self._delete()

    def _parts(self, count: int) -> list[Sequence[Block]]:
        """Return the blocks in parts of at most ``count``."""
        return [self._blocks[i : i + count] for i in range(0, len(self._blocks), count)]

    async def _round(
        self,
        op: Measured,
        parts: Sequence[Sequence[Block]],
        call: Callable[[Measured, Sequence[Block]], Awaitable[None]],
    ) -> None:
        waiting = iter(parts)

        async def stream() -> None:
            for part in waiting:
                start = time.perf_counter()
                await call(op, part)
                op.calls_s.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(self._streams)))
        op.rounds_s.append(time.perf_counter() - start)

    async def _put(self, op: Measured, blocks: Sequence[Block]) -> None:
        for outcome in await self._client.put(blocks):
            if outcome.outcome != "committed":
                op.fail(outcome.outcome)

    async def _get(self, op: Measured, blocks: Sequence[Block]) -> None:
        hashes = [key.block_hash for key, _ in blocks]
        async for found in self._client.get(blocks[0][0].scope, hashes, [BASE]):
            if found.frame is None:
                op.fail(found.miss)

    async def _lookup(self, op: Measured, blocks: Sequence[Block]) -> None:
        hashes = [key.block_hash for key, _ in blocks]
        found = await self._client.lookup(blocks[0][0].scope, hashes)
        for _ in range(len(blocks) - len(found.blocks)):
            op.fail("absent")

    async def _delete(self) -> None:
        for part in self._parts(NAMES_PER_CALL):
            await self._client.delete([key for key, _ in part])


def make_blocks(count: int, block_bytes: int) -> list[Block]:
    """Return the blocks of one prompt, of random bytes, in a scope that nobody uses."""
    scope = CacheScope(secrets.token_bytes(16), "bfloat16", "bench/1").digest()
    blocks: list[Block] = []
    for number in range(count):
        parent = blocks[-1][0].block_hash if blocks else None
        blocks.append(sample_block(scope, number, strata={BASE: block_bytes}, parent=parent))
    return blocks


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequestError(f"{name} is {value}", f"choose {least} to {most}")


def bench(
    ctx: typer.Context,
    blocks: Annotated[int, typer.Option(help="How many blocks, as one prompt.")] = 64,
    block_bytes: Annotated[str, typer.Option(help="Bytes of each, such as 206kB or 1MiB.")] = (
        "206kB"
    ),
    streams: Annotated[int, typer.Option(help="Calls at a time.")] = 4,
    rounds: Annotated[int, typer.Option(help="How often; medians are told.")] = 5,
    address: Annotated[
        str, typer.Option(envvar="KVSTRATA_ADDRESS", help="gRPC address of the store, host:port.")
    ] = "127.0.0.1:50051",
    timeout: Annotated[float, typer.Option(help="Time limit of a call in seconds.")] = 60.0,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with stable keys.")
    ] = False,
) -> None:
    """Measure Put, Get and Lookup of a running store with blocks of its own, deleted afterwards.

    Exits 1 where blocks were refused or went missing.

    Example: kvctl bench --address 127.0.0.1:7070 --streams 16 --json
    """
    size = parse_size(block_bytes)
    _check("--blocks", blocks, 1, MAX_BYTES // _LEAST_BYTES)
    _check("--block-bytes", size, _LEAST_BYTES, 64 << 20)
    _check("the sum of all bytes", blocks * size, 1, MAX_BYTES)
    _check("--streams", streams, 1, MAX_STREAMS)
    _check("--rounds", rounds, 1, MAX_ROUNDS)

    async def measure() -> list[Measured]:
        async with StoreClient(address, timeout, credentials=ctx.obj or ANONYMOUS) as client:
            job = Bench(client, made, streams)
            await job.run(rounds)
            return job.ops

    made = make_blocks(blocks, size)
    ops = asyncio.run(measure())
    results = [op.result() for op in ops]
    if json_output:
        facts = {"blocks": blocks, "block_bytes": size, "streams": streams, "rounds": rounds}
        typer.echo(json.dumps({"address": address, **facts, "results": results}))
    else:
        typer.echo(f"{blocks} blocks of {size} bytes, {streams} streams, {rounds} rounds")
        for found in results:
            failed = "".join(f", {n} {reason}" for reason, n in found["failures"].items())
            rate = f"{found['gbps']:8.3f} GB/s" if found["op"] != "lookup" else " " * 13
            times = f"p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms"
            typer.echo(f"{found['op']:<8}{rate}  {times} a call{failed}")
    if any(op.failures for op in ops):
        raise typer.Exit(1)
