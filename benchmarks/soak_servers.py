"""The processes of a soak: stores on small disks of their own, one Redis, proxies between them."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from soak_proxy import Proxy

from kvstrata.kvstore_service.redis_binary import free_port
from kvstrata.kvstore_service.testing import RedisServer

START_S = 60
MIB = 1 << 20


class Disk:
    """A file system of a few MiB that can be filled, in a mount namespace of its own.

    Where the kernel lets nobody make one, a plain folder, which cannot be filled.
    """

    def __init__(self, num_bytes: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="kvstrata-soak-"))
        self._holder: subprocess.Popen[bytes] | None = None
        inside = f"mount -t tmpfs -o size={num_bytes} tmpfs {self._folder} && echo ok && exec cat"
        if shutil.which("unshare") and shutil.which("nsenter"):
            holder = subprocess.Popen(
                ["unshare", "-rm", "sh", "-c", inside],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert holder.stdout is not None
            if holder.stdout.readline() == b"ok\n":
                self._holder = holder
            else:
                holder.wait()

    @property
    def can_be_filled(self) -> bool:
        """Whether it is a file system of its own."""
        return self._holder is not None

    @property
    def inside(self) -> list[str]:
        """What to put before a command that is to see the disk."""
        if self._holder is None:
            return []
        return ["nsenter", "-t", str(self._holder.pid), "-U", "-m", "--preserve-credentials"]

    @property
    def store_path(self) -> str:
        """Where a store inside finds its folder."""
        return str(self._folder / "ssd")

    @property
    def _root(self) -> Path:
        """The disk, as seen from outside."""
        if self._holder is None:
            return self._folder
        return Path(f"/proc/{self._holder.pid}/root{self._folder}")

    @property
    def store_folder(self) -> Path:
        """The store's folder, as seen from outside."""
        return self._root / "ssd"

    def fill(self) -> None:
        """Take every free byte."""
        with (self._root / "filler").open("wb") as file:
            free = os.statvfs(self._root).f_bavail * os.statvfs(self._root).f_frsize
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, free))

    def free(self) -> None:
        """Give back what ``fill`` took."""
        (self._root / "filler").unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """Return the files of blocks; some may be gone when they are opened."""
        with contextlib.suppress(OSError):
            return sorted(self.store_folder.glob("[0-9a-f][0-9a-f]/*"))
        return []

    def used_bytes(self) -> int:
        """Return the bytes that the store's files take on the disk."""
        total = 0
        for path in self.files():
            with contextlib.suppress(OSError):
                total += path.stat().st_blocks * 512
        return total

    def close(self) -> None:
        """Give the disk back, and all on it."""
        if self._holder is not None:
            assert self._holder.stdin is not None
            assert self._holder.stdout is not None
            self._holder.stdin.close()
            self._holder.stdout.close()
            self._holder.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass
class StoreProcess:
    """A store that can be killed and started again on the same port and disk.

    Attributes:
        name: In the history.
        disk: Where its ssd tier is.
        log: Where its messages go.
        options: Of the command line.
        front: Between clients and it.
        back: Between it and Redis, if it has one.
    """

    name: str
    disk: Disk
    log: IO[bytes]
    options: list[str]
    front: Proxy
    back: Proxy | None
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    async def start(self) -> None:
        """Start it, and return when it serves."""
        command = [
            *self.disk.inside,
            *(sys.executable, "-P", "-m", "kvstrata.kvstore_service"),
            *("--listen", f"127.0.0.1:{self.port}", "--ssd-path", self.disk.store_path),
            *("--log-level", "WARNING", "--drain-s", "5"),
            *self.options,
        ]
        environment = dict(os.environ)
        if self.back is not None:
            environment["KVSTRATA_REDIS_URL"] = f"redis://{self.back.address}/0"
        self.starts += 1
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, env=environment
        )
        line = await asyncio.wait_for(asyncio.to_thread(self._read_line), START_S)
        if not line:
            raise RuntimeError(f"store {self.name} did not start, see {self.log.name}")
        assert json.loads(line)["event"] == "ready"
        self.front.target_port = self.port

    def _read_line(self) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self) -> None:
        """End it at once, as a crash would. Idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    async def stop(self) -> int:
        """Stop it as an operator would, and return its exit code."""
        assert self.process is not None
        self.process.terminate()
        return await asyncio.to_thread(self.process.wait, START_S)

    def rss_bytes(self) -> int:
        """Return its resident memory; 0 while it is not there."""
        try:
            text = Path(f"/proc/{self.process.pid if self.process else 0}/status").read_text()
        except OSError:
            return 0
        lines = [line for line in text.splitlines() if line.startswith("VmRSS:")]
        return int(lines[0].split()[1]) * 1024 if lines else 0


@dataclass(frozen=True)
class Sizes:
    """Bounds of the tiers, in bytes. Streams that are written again fit in redis and ssd."""

    dram: int = 6 * MIB
    redis: int = 96 * MIB
    ssd: int = 64 * MIB
    disk: int = 80 * MIB
    small_dram: int = 3 * MIB
    small_ssd: int = 8 * MIB


class Arena:
    """All processes of one soak: stores ``a`` and ``b`` share a Redis, ``c`` is small and alone."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes = sizes
        self.folder = folder
        self.redis = RedisServer()
        self.redis_is_up = False
        self.stores: dict[str, StoreProcess] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Arena"]:
        """Start everything; at the end nothing is left."""
        shared = ["--dram", str(self.sizes.dram), "--ssd", str(self.sizes.ssd)]
        shared += ["--redis-bytes", str(self.sizes.redis)]
        alone = ["--dram", str(self.sizes.small_dram), "--ssd", str(self.sizes.small_ssd)]
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self.redis)
            self.redis_is_up = True
            for name, options in (("a", shared), ("b", shared), ("c", alone)):
                disk = Disk(self.sizes.disk)
                stack.callback(disk.close)
                log = stack.enter_context((self.folder / f"store-{name}.log").open("ab"))
                front = await stack.enter_async_context(Proxy())
                back = None
                if name != "c":
                    back = await stack.enter_async_context(Proxy(self.redis.port))
                store = StoreProcess(name, disk, log, options, front, back)
                stack.callback(store.kill)
                await store.start()
                self.stores[name] = store
            yield self
