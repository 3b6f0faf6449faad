"""A store process that is told to stop: it drains, exits in time, keeps what it acknowledged."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import RedisServer, sample_block
from kvstrata.protos.errors import KVStrataError, UnavailableError
from kvstrata.protos.identity import BlockKey, ScopeDigest
from kvstrata.protos.service import open_channel

BASE = 1
SLACK_S = 45.0  # what a busy machine may take on top


def start(folder: Path, *options: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    command = [
        *(sys.executable, "-P", "-m", "kvstrata.kvstore_service", "--log-format", "json"),
        *("--ssd-path", str(folder / "ssd"), *options),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["address"]


async def ended(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Return the log of a process that has ended by itself, well."""
    _, err = await asyncio.to_thread(process.communicate, timeout=90)
    assert process.returncode == 0, err
    return [json.loads(line) for line in err.splitlines() if line.startswith("{")]


async def blocks(source: list[Any], gate: asyncio.Event) -> Any:
    """Yield blocks, the second of them once ``gate`` is open."""
    yield source[0]
    await gate.wait()
    yield source[1]


async def test_waiting_readers_are_told_and_a_put_that_runs_is_finished(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    process, address = start(tmp_path, "--drain-s", "30")
    source = [sample_block(scope, n) for n in range(2)]
    absent = sample_block(scope, 9)[0].block_hash
    async with StoreClient(address, timeout_s=90) as client, open_channel(address) as channel:

        async def wait() -> list[str]:
            pieces = client.get(scope, [absent], [BASE], wait_ms=30_000, timeout_s=60)
            return [piece.miss async for piece in pieces]

        gate = asyncio.Event()
        putting = asyncio.create_task(client.put(blocks(source, gate)))
        waiting = asyncio.create_task(wait())
        health: Any = health_pb2_grpc.HealthStub(channel)
        async with asyncio.timeout(SLACK_S):
            while not (await client.lookup(scope, [source[0][0].block_hash])).blocks:
                await asyncio.sleep(0.01)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="kvstrata.v1.KVStore"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(waiting, SLACK_S) == ["draining"]
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        gate.set()
        with pytest.raises(KVStrataError, match="draining"):
            await putting  # its second block was new work
    log = await ended(process)
    assert time.monotonic() - begin < 30 + SLACK_S
    assert [line["event"] for line in log][-2:] == ["store drains", "store stopped"]
    await found_again(tmp_path, scope, source[0][0])


async def found_again(folder: Path, scope: ScopeDigest, key: BlockKey) -> None:
    """Check that a new process finds what the old one had acknowledged."""
    process, address = start(folder)
    async with StoreClient(address, timeout_s=60) as client:
        assert (await client.lookup(scope, [key.block_hash])).blocks[0].tier == "ssd"
    process.send_signal(signal.SIGTERM)
    await ended(process)


async def test_a_call_that_never_ends_is_cut_when_the_time_is_over(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    process, address = start(tmp_path, "--drain-s", "0.5")
    source = [sample_block(scope, n) for n in range(2)]
    async with StoreClient(address, timeout_s=90) as client:
        putting = asyncio.create_task(client.put(blocks(source, asyncio.Event())))
        async with asyncio.timeout(SLACK_S):
            while not (await client.lookup(scope, [source[0][0].block_hash])).blocks:
                await asyncio.sleep(0.01)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(putting, 30 + SLACK_S)
    await ended(process)
    assert time.monotonic() - begin < 0.5 + SLACK_S


async def test_what_was_acknowledged_at_dram_is_written_before_the_end(
    tmp_path: Path, scope: ScopeDigest
) -> None:
    process, address = start(tmp_path, "--drain-s", "30")
    key, frames = sample_block(scope)
    async with StoreClient(address, timeout_s=60) as client:
        await client.put([(key, frames)], durability="dram")
        process.send_signal(signal.SIGTERM)
    await ended(process)
    await found_again(tmp_path, scope, key)


async def test_a_redis_that_hangs_holds_up_no_end(
    tmp_path: Path, own_redis: RedisServer, scope: ScopeDigest
) -> None:
    process, address = start(tmp_path, "--drain-s", "1", KVSTRATA_REDIS_URL=own_redis.url)
    own_redis.pause()
    try:
        async with StoreClient(address, timeout_s=60) as client:
            await client.put([sample_block(scope)], durability="dram")
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
        log = await ended(process)
        assert time.monotonic() - begin < 1 + SLACK_S
        lost = [line for line in log if line["event"] == "blocks never reached a tier"]
        assert [(line["tier"], line["blocks"]) for line in lost] == [("redis", 1)]
    finally:
        own_redis.resume()
