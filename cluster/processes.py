"""The store and Redis as child processes of the local stack."""

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

from kvstrata.kvstore_service.redis_binary import find_redis_server, free_port
from kvstrata.protos.errors import ConfigurationError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0


class Child:
    """A child process with a name, started for us and ended by us."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    async def stop(self) -> None:
        """End it: politely, then by force."""
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


async def start_redis(runtime: Path, max_bytes: int) -> tuple[Child, str]:
    """Start Redis on a free loopback port, without persistence; return it and its URL."""
    folder = runtime / "redis"
    folder.mkdir()
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        str(find_redis_server()),
        *("--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)),
        *("--save", "", "--appendonly", "no", "--logfile", str(folder / "redis.log")),
        *("--maxmemory", str(max_bytes + max_bytes // 4), "--maxmemory-policy", "allkeys-lru"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
    )
    child = Child("redis", process)
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while True:
        if process.returncode is not None:
            log = (folder / "redis.log").read_text()[-2000:]
            raise ConfigurationError(f"Redis ended at once: {log}", "see its message")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return child, f"redis://127.0.0.1:{port}/0"
        if asyncio.get_running_loop().time() > deadline:
            raise ConfigurationError("Redis did not answer in time", "look at the machine's load")
        await asyncio.sleep(0.02)


async def start_store(
    runtime: Path, *, dram_bytes: int, redis_url: str | None, redis_bytes: int, ttl_s: float
) -> tuple[Child, str]:
    """Start the store on a free loopback port; return it and its address."""
    with (runtime / "store.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "kvstrata.kvstore_service"),
            *("--listen", "127.0.0.1:0", "--dram", str(dram_bytes)),
            *("--redis-bytes", str(redis_bytes), "--ttl-s", str(ttl_s)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=environment(redis_url),
        )
    child = Child("store", process)
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
    except TimeoutError:
        line = b""
    if not line:
        await child.stop()
        reason = (runtime / "store.log").read_text()[-2000:].strip()
        raise ConfigurationError(f"the store did not start: {reason}", "see its message")
    return child, str(json.loads(line)["address"])


def environment(redis_url: str | None) -> dict[str, str]:
    """Return our environment with exactly this Redis URL in it."""
    others = {k: v for k, v in os.environ.items() if k != "KVSTRATA_REDIS_URL"}
    return others | ({"KVSTRATA_REDIS_URL": redis_url} if redis_url else {})
