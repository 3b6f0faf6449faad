"""The store and Redis as child processes of the local stack."""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from kvstrata.kvstore_service.redis_binary import find_redis_server, free_port
from kvstrata.protos.credentials import ClientCredentials
from kvstrata.protos.errors import ConfigurationError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
RESTART_PAUSE_S = 0.5

logger = logging.getLogger(__name__)


class Child:
    """A child process that is started again when it ends unasked.

    Attributes:
        name: For logs.
        process: The one that runs now.
    """

    def __init__(self, name: str, start: Callable[[], Awaitable[Process]]) -> None:
        self.name = name
        self._start = start
        self._watching: asyncio.Task[None] | None = None
        self.process: Process | None = None

    @property
    def pid(self) -> int:
        """The process id of the one that runs now."""
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        """Start it, and from then on again whenever it ends, until ``stop``.

        Raises:
            ConfigurationError: It did not come up the first time.
        """
        self.process = await self._start()
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End it: politely, then by force. Idempotent."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self.process is not None:
            await end(self.process)

    async def _watch(self) -> None:
        while self.process is not None:
            status = await self.process.wait()
            extra = {"child": self.name, "status": status}
            logger.warning("process ended; starting it again", extra=extra)
            await asyncio.sleep(RESTART_PAUSE_S)
            try:
                self.process = await self._start()
            except Exception:  # whatever it is, the service goes on without it and tries again
                extra = {"child": self.name}
                logger.exception("process did not come up; trying once more", extra=extra)


async def end(process: Process) -> None:
    """End a process: politely, then by force."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def start_redis(runtime: Path, max_bytes: int) -> tuple[Child, str]:
    """Start Redis on a free loopback port, without persistence; return it and its URL."""
    folder = runtime / "redis"
    folder.mkdir()
    port = free_port()
    log = folder / "redis.log"

    async def start() -> Process:
        process = await asyncio.create_subprocess_exec(
            str(find_redis_server()),
            *("--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)),
            *("--save", "", "--appendonly", "no", "--logfile", str(log)),
            *("--maxmemory", str(max_bytes + max_bytes // 4), "--maxmemory-policy", "allkeys-lru"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
        )
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return process
            await asyncio.sleep(0.02)
        await end(process)
        raise ConfigurationError(f"Redis did not start: {tail(log)}", "see its message")

    child = Child("redis", start)
    await child.start()
    return child, f"redis://127.0.0.1:{port}/0"


def service_tenant(runtime: Path) -> tuple[str, ClientCredentials]:
    """Return a file with one tenant of a random token, for our own store, and what to show it."""
    token = secrets.token_hex(32)
    path = runtime / "store-tenants.toml"
    path.touch(mode=0o600)
    path.write_text(
        f'[tenants.stack]\ntoken_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
        f'salt_seed = "{secrets.token_hex(32)}"\nadmin = true\n'
    )
    return str(path), ClientCredentials(token=token)


async def start_store(
    runtime: Path, options: Sequence[str], redis_url: str | None
) -> tuple[Child, dict[str, str]]:
    """Start the store on a free loopback port; return it and the addresses that it tells.

    Started again, it listens where it did the first time.

    Args:
        runtime: Folder of its log.
        options: Further options of its command.
        redis_url: Of its shared tier; none without it.
    """
    listen = {"address": "127.0.0.1:0"}
    log = runtime / "store.log"

    async def start() -> Process:
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "kvstrata.kvstore_service"),
                *("--listen", listen["address"], *options),
                *(
                    ("--metrics-listen", listen["metrics_address"])
                    if "metrics_address" in listen
                    else ()
                ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment(redis_url),
            )
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        except TimeoutError:
            line = b""
        if not line:
            await end(process)
            raise ConfigurationError(f"the store did not start: {tail(log)}", "see its message")
        listen.update((k, str(v)) for k, v in json.loads(line).items() if k.endswith("address"))
        return process

    child = Child("store", start)
    await child.start()
    return child, listen


def check_listen(listen: str) -> None:
    """Raise ``ConfigurationError`` if nothing can listen there, before much is started."""
    host, _, port = listen.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen at {listen}: {error.strerror}",
                "choose a free port (0 takes any) and a local address",
            ) from error


def tail(log: Path) -> str:
    """Return the end of a log file."""
    return log.read_text(errors="replace")[-2000:].strip() if log.exists() else "no log"


def environment(redis_url: str | None) -> dict[str, str]:
    """Return our environment with exactly this Redis URL in it."""
    others = {k: v for k, v in os.environ.items() if k != "KVSTRATA_REDIS_URL"}
    return others | ({"KVSTRATA_REDIS_URL": redis_url} if redis_url else {})
