"""Ten thousand random operations, clients killed in the middle: in the end nothing is held."""

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.namespace import Namespace
from kvstrata.kvstore_service.server import RunningStore, start_store
from kvstrata.kvstore_service.tenants import read_tenants
from kvstrata.kvstore_service.testing import ManualClock, sample_block
from kvstrata.protos.errors import KVStrataError
from kvstrata.protos.identity import BlockHash, BlockKey, CacheScope, ScopeDigest
from tests.kvstore_service.tenancy import credentials, tenants_file

OPERATIONS = 10_000
ACTORS = 20
BASE, MID = 1, 2
TENANTS = {
    "alice": "quota_bytes = 60_000\nin_flight_bytes = 30_000",
    "bob": "requests_per_s = 5",
    "carol": "",
}
SCOPE = CacheScope(b"m" * 16, "float32", "leak/1").digest()
BLOCKS = [sample_block(SCOPE, number, strata={BASE: 800, MID: 400}) for number in range(60)]
# A process that puts and pins without end, until it is killed.
ENDLESS = """
import asyncio, sys
from tests.kvstore_service.test_leaks import BLOCKS, StoreClient, credentials, KVStrataError
async def main():
    client = StoreClient(sys.argv[1], credentials=credentials("carol"))
    async def source():
        while True:
            for block in BLOCKS:
                yield block
                await asyncio.sleep(0)
    putting = asyncio.create_task(client.put(source(), timeout_s=600))
    while True:
        await client.pin([key for key, _ in BLOCKS], 60)
        print("pinned", flush=True)
        await asyncio.sleep(0.05)
asyncio.run(main())
"""


class Actor:
    """A client that does something random, and is killed now and then."""

    def __init__(self, address: str, name: str, seed: int) -> None:
        self._address = address
        self._name = name
        self._random = random.Random(seed)
        self._client = self._connect()
        self.errors: set[str] = set()

    def _connect(self) -> StoreClient:
        return StoreClient(self._address, timeout_s=20, credentials=credentials(self._name))

    def _keys(self) -> list[BlockKey]:
        return [key for key, _ in self._random.sample(BLOCKS, self._random.randint(1, 3))]

    async def act(self) -> None:
        chosen = self._random.choice(
            [self._put, self._get, self._lookup, self._pin, self._unpin, self._delete]
        )
        running = asyncio.ensure_future(chosen())
        fate = self._random.random()
        if fate < 0.15:
            await asyncio.wait([running], timeout=self._random.random() * 0.01)
            running.cancel()
        if fate < 0.02:  # as when the process dies: the connection goes, whatever runs on it
            await self._client.close()
            self._client = self._connect()
        try:
            await running
        except KVStrataError as error:
            self.errors.add(type(error).__name__)
        except (asyncio.CancelledError, grpc.RpcError, grpc.aio.UsageError):
            pass

    async def _put(self) -> None:
        await self._client.put(self._random.sample(BLOCKS, self._random.randint(1, 2)))

    async def _get(self) -> None:
        hashes: list[BlockHash] = [key.block_hash for key in self._keys()]
        wait_ms = self._random.choice([0, 0, 0, 5])
        pieces = self._client.get(SCOPE, hashes, [BASE, MID], wait_ms=wait_ms)
        async with contextlib.aclosing(pieces):
            stop_after = self._random.choice([1, 3, 99, 99])
            count = 0
            async for _ in pieces:
                count += 1
                if count == stop_after:
                    break

    async def _lookup(self) -> None:
        await self._client.lookup(SCOPE, [key.block_hash for key in self._keys()])

    async def _pin(self) -> None:
        await self._client.pin(self._keys(), self._random.choice([0.5, 5, 60, 3600]))

    async def _unpin(self) -> None:
        await self._client.unpin(self._keys())

    async def _delete(self) -> None:
        await self._client.delete(self._keys()[:1])

    async def close(self) -> None:
        await self._client.close()


async def kill_one_process(address: str) -> None:
    """Start a client process and kill it while it puts and pins."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENDLESS, address, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(3):
        assert await process.stdout.readline() == b"pinned\n"
    process.send_signal(signal.SIGKILL)
    await process.wait()


async def settle(running: RunningStore) -> None:
    """Wait until the server has noticed that its clients are gone."""
    async with asyncio.timeout(10):
        while running.workload.in_flight or running.workload.in_flight_puts:
            await asyncio.sleep(0.01)


async def no_more_than(tasks: set[asyncio.Task[Any]]) -> None:
    """Wait until no other task is left than these, and gRPC's own wait for the next call."""

    def names_left() -> set[str]:
        return {task.get_coro().__qualname__ for task in asyncio.all_tasks() - tasks}

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(30):
            while not names_left() <= {"AioServer._request_call"}:
                await asyncio.sleep(0.01)
    assert names_left() <= {"AioServer._request_call"}


@pytest.mark.slow
async def test_nothing_is_held_after_ten_thousand_operations_of_clients_that_die(
    tmp_path: Path,
) -> None:
    path = tenants_file(tmp_path, **TENANTS)
    clock = ManualClock()
    config = StoreConfig(
        dram_bytes=200_000,
        tenants=path,
        limits=StoreLimits(max_block_bytes=20_000, max_in_flight_bytes=20_000),
    )
    before = asyncio.all_tasks()
    running = await start_store(config, clock)
    serving = asyncio.all_tasks()
    names = list(TENANTS)
    actors = [Actor(running.address, names[i % 3], seed=i) for i in range(ACTORS)]
    pinned_once = 0

    async def play(actor: Actor) -> None:
        nonlocal pinned_once
        for count in range(OPERATIONS // ACTORS):
            await actor.act()
            if count % 25 == 0:
                pinned_once = max(pinned_once, running.store.pins.usage()[1])
                clock.advance(1)

    try:
        await asyncio.gather(
            *map(play, actors), *(kill_one_process(running.address) for _ in range(2))
        )
        for actor in actors:
            await actor.close()
        await settle(running)
        assert pinned_once > 0
        clock.advance(config.limits.max_pin_ttl_ms / 1000 + 1)

        store = running.store
        assert store.pins.usage() == (0, 0)
        assert store.dram._pins.usage() == (0, 0)
        for tenant in read_tenants(path):
            usage = running.quotas.of(tenant)
            assert usage.in_flight_bytes == 0
            assert usage.stored_bytes == sum(usage._blocks.values())
            assert not tenant.quota_bytes or usage.stored_bytes <= tenant.quota_bytes
        assert (store.arrivals._writers, store.arrivals._waiters) == ({}, {})
        assert store._lower._flights == {}
        await store.dram.check_integrity()
        async with StoreClient(running.address, credentials=credentials("carol")) as client:
            whole_budget = sample_block(SCOPE, 99, strata={BASE: 19_000})
            assert (await client.put([whole_budget]))[0].outcome == "committed"
        counters = store.counters
        assert counters.get("puts_total", outcome="committed") > 100
        assert counters.get("refusals_total", reason="rate") > 0
        held = {key.scope for key in await store.dram.keys(10_000)}
        assert held <= {Namespace(name).scope(ScopeDigest(SCOPE)) for name in names}
        assert not {e for a in actors for e in a.errors} - {"ThrottledError", "UnavailableError"}
        await no_more_than(serving)
    finally:
        await running.stop(0.5)
    assert asyncio.all_tasks() == before
