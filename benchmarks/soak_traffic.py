"""The clients of a soak: they write, read, look up and delete, and record what they were told."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence

from soak_blocks import (
    BASE,
    FIRST_CHURN_STREAM,
    MID,
    SCOPE,
    STREAM_BLOCKS,
    Name,
    digest,
    key_of,
    make,
    stream_hashes,
)
from soak_history import Event, History

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.protos.errors import KVStrataError
from kvstrata.protos.identity import BlockKey

TIMEOUT_S = 6.0
LEASE_MS = 2000
STREAMS_PER_WRITER = 10
SHARED, SMALL = ("a", "b"), "c"
DURABILITIES = ("ssd", "ssd", "redis", "dram", "")


class Traffic:
    """All clients of one run.

    Args:
        addresses: Of each store.
        history: Where to record.
        seed: Chooses what each client does.

    Attributes:
        num_streams: How many streams are written again and again.
        names: Of every block that somebody may have put.
        stopping: Ends the clients.
    """

    def __init__(self, addresses: Mapping[str, str], history: History, seed: int) -> None:
        self._addresses = addresses
        self._history = history
        self._seed = seed
        self._versions: dict[int, int] = {}
        self.names: dict[BlockKey, str] = {}
        self._next_churn = FIRST_CHURN_STREAM
        self.num_streams = 0
        self.stopping = asyncio.Event()

    async def run(self, num_writers: int, num_readers: int) -> None:
        """Let the clients work until ``stopping`` is set."""
        self.num_streams = num_writers * STREAMS_PER_WRITER
        async with asyncio.TaskGroup() as group:
            for number in range(num_writers):
                group.create_task(self._client(f"w{number}", 0.7, self._write))
            for number in range(num_readers):
                group.create_task(self._client(f"r{number}", 0.25, self._read))

    async def _client(
        self,
        name: str,
        pause_s: float,
        act: Callable[[str, random.Random, Mapping[str, StoreClient]], Awaitable[None]],
    ) -> None:
        source = random.Random(f"{self._seed}/{name}")
        async with contextlib.AsyncExitStack() as stack:
            clients = {
                store: await stack.enter_async_context(StoreClient(address, TIMEOUT_S))
                for store, address in self._addresses.items()
            }
            while not self.stopping.is_set():
                await act(name, source, clients)
                with contextlib.suppress(TimeoutError):
                    pause = min(source.expovariate(1 / pause_s), 4 * pause_s)
                    await asyncio.wait_for(self.stopping.wait(), pause)

    async def _recorded(
        self, op: str, client: str, store: str, call: Callable[[Event], Awaitable[None]]
    ) -> None:
        event: Event = {"op": op, "client": client, "store": store, "timeout_s": TIMEOUT_S}
        event |= {"t0": self._history.now(), "error": None, "blocks": []}
        try:
            await call(event)
        except KVStrataError as error:
            event["error"] = type(error).__name__
            event["message"] = str(error)[:200]
        event["t1"] = self._history.now()
        self._history.add("op", **event)

    async def _write(
        self, name: str, source: random.Random, clients: Mapping[str, StoreClient]
    ) -> None:
        choice = source.random()
        if choice < 0.25:
            stream, self._next_churn = self._next_churn, self._next_churn + 1
            await self._put(name, source, SMALL, clients[SMALL], stream)
            return
        own = int(name[1:]) * STREAMS_PER_WRITER
        stream = own + source.randrange(STREAMS_PER_WRITER)
        if source.random() < 0.2:
            stream = source.randrange(self.num_streams)
        store = source.choice(SHARED)
        if choice < 0.32:
            await self._delete(name, source, store, clients[store], stream)
        else:
            await self._put(name, source, store, clients[store], stream)

    async def _put(
        self, name: str, source: random.Random, store: str, client: StoreClient, stream: int
    ) -> None:
        durability = source.choice(DURABILITIES)
        if store == SMALL and durability == "redis":
            durability = ""
        version = self._versions[stream] = self._versions.get(stream, -1) + 1
        names = [Name(stream, number) for number in range(source.randint(2, STREAM_BLOCKS))]
        self.names |= {key_of(n): str(n) for n in names}

        async def call(event: Event) -> None:
            event["durability"] = durability
            event["blocks"] = [
                {"name": str(n), "version": version, "outcome": "unknown", "tiers": []}
                for n in names
            ]
            blocks = [make(n, version) for n in names]
            outcomes = await client.put(blocks, durability=durability, timeout_s=TIMEOUT_S)
            for block, outcome in zip(event["blocks"], outcomes, strict=True):
                block |= {"outcome": outcome.outcome, "tiers": list(outcome.tiers)}
                if outcome.reason:
                    block["reason"] = outcome.reason[:200]

        await self._recorded("put", name, store, call)

    async def _delete(
        self, name: str, source: random.Random, store: str, client: StoreClient, stream: int
    ) -> None:
        async def call(event: Event) -> None:
            names = [Name(stream, number) for number in range(STREAM_BLOCKS)]
            event["blocks"] = [{"name": str(n)} for n in names]
            await client.delete([key_of(n) for n in names])

        await self._recorded("delete", name, store, call)

    async def _read(
        self, name: str, source: random.Random, clients: Mapping[str, StoreClient]
    ) -> None:
        if source.random() < 0.2:
            store = SMALL
            newest = self._next_churn - FIRST_CHURN_STREAM
            stream = self._next_churn - 1 - min(int(source.expovariate(0.05)), max(newest, 1) - 1)
        else:
            store = source.choice(SHARED)
            # A few streams are read much, most seldom.
            stream = int(self.num_streams * source.random() ** 2)
        await self.read_stream(name, source, store, clients[store], stream)

    async def read_stream(
        self, name: str, source: random.Random, store: str, client: StoreClient, stream: int
    ) -> None:
        """Look a stream up, sometimes with a lease, and read what was told, or all of it."""
        hashes = stream_hashes(stream)
        told = len(hashes)
        leased: list[Event] = []
        if source.random() < 0.5:
            lease_ms = source.choice([0, LEASE_MS])

            async def look(event: Event) -> None:
                nonlocal told
                found = await client.lookup(SCOPE, hashes, lease_s=lease_ms / 1000)
                told = len(found.blocks)
                event["told"], event["degraded"] = told, found.degraded
                if lease_ms and not found.degraded:
                    event["strata"] = [list(block.strata) for block in found.blocks]
                    leased.append(event)

            await self._recorded("lookup", name, store, look)
        if told:
            await self._get(name, source, store, client, stream, told, leased)

    async def _get(
        self,
        name: str,
        source: random.Random,
        store: str,
        client: StoreClient,
        stream: int,
        count: int,
        leased: Sequence[Event] = (),
    ) -> None:
        wait_ms = 500 if source.random() < 0.1 else 0
        strata = [BASE] if source.random() < 0.2 else [BASE, MID]

        async def call(event: Event) -> None:
            event["timeout_s"] = TIMEOUT_S + wait_ms / 1000
            blocks: list[Event] = [{"name": str(Name(stream, n))} for n in range(count)]
            event["blocks"] = blocks
            for lease in leased:
                event["leased_t0"] = lease["t0"]
                for block, told in zip(blocks, lease["strata"], strict=True):
                    block["leased"] = told
            pieces = client.get(
                SCOPE, stream_hashes(stream)[:count], strata, wait_ms=wait_ms, timeout_s=TIMEOUT_S
            )
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    block = blocks[piece.index]
                    if piece.frame is None:
                        block[str(piece.stratum)] = f"!{piece.miss}"
                    else:
                        block[str(piece.stratum)] = digest(piece.frame.payload)
                        block["tier"] = piece.tier

        await self._recorded("get", name, store, call)

    async def sweep(self, store: str) -> None:
        """Read every stream that is written again, once."""
        source = random.Random(f"{self._seed}/sweep")
        async with StoreClient(self._addresses[store], 30.0) as client:
            for stream in range(self.num_streams):
                await self._get("sweep", source, store, client, stream, STREAM_BLOCKS)
