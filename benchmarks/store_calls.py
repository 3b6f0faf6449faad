"""A store in a process of its own, blocks as large as a model's, and reading and writing them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from store_wires import over_streams

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos.identity import BLOCK_TOKENS, BlockKey, CacheScope

BLOCKS_PER_CALL = 8
BASE, MID = 1, 2
SCOPE = CacheScope(b"bench" + bytes(11), "bfloat16", "sample/1").digest()


@dataclass(frozen=True)
class Shape:
    """A model's KV, and what ``balanced`` makes of a block of it (make bench-codec).

    Attributes:
        layers: How many of them; so many segments a stratum has.
        heads: KV heads.
        head_dim: Elements of a head.
        base: Bytes of BASE.
        mid: Bytes of MID.
    """

    layers: int
    heads: int
    head_dim: int
    base: int
    mid: int

    @property
    def bf16_bytes(self) -> int:
        """Bytes of a block's KV as bf16."""
        return 2 * 2 * self.layers * self.heads * self.head_dim * BLOCK_TOKENS


SHAPES = {
    "SmolLM2-135M": Shape(30, 3, 64, 186_000, 20_000),
    "Llama-3-8B": Shape(32, 8, 128, 1_060_000, 115_000),
}

Block = tuple[BlockKey, dict[int, bytes]]


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


def blocks_of(shape: Shape, count: int) -> list[Block]:
    sizes = {BASE: shape.base, MID: shape.mid}
    return [
        sample_block(SCOPE, number, strata=sizes, num_layers=shape.layers)
        for number in range(count)
    ]


def size_of(blocks: Sequence[Block]) -> int:
    return sum(len(frame) for _, frames in blocks for frame in frames.values())


async def timed(awaitable: Awaitable[object]) -> list[float]:
    start = time.perf_counter()
    await awaitable
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
        """Read everything once; return the seconds of it all and of each request."""
        seconds: list[float] = []

        async def read(hashes: Sequence[Any]) -> None:
            start = time.perf_counter()
            async for found in self._client.get(SCOPE, hashes, [BASE, MID], timeout_s=120):
                if found.frame is None:
                    raise AssertionError(f"a miss: {found.miss}")
            seconds.append(time.perf_counter() - start)

        return [*await timed(over_streams(self._calls, self._streams, read)), *seconds]


class Puts:
    """Deletes, untimed, then writes all blocks over ``streams`` streams."""

    def __init__(self, client: StoreClient, blocks: Sequence[Block], streams: int) -> None:
        self._client = client
        self._keys = [key for key, _ in blocks]
        self._shares = [blocks[i::streams] for i in range(streams) if blocks[i::streams]]

    async def call(self) -> list[float]:
        """Write everything once; return the seconds of it all and of each stream."""
        await self._client.delete(self._keys)
        seconds: list[float] = []

        async def write(share: Sequence[Block]) -> None:
            start = time.perf_counter()
            for outcome in await self._client.put(share, timeout_s=120):
                if outcome.outcome != "committed":
                    raise AssertionError(f"{outcome.outcome}: {outcome.reason}")
            seconds.append(time.perf_counter() - start)

        writing = over_streams(self._shares, len(self._shares), write)
        return [*await timed(writing), *seconds]
