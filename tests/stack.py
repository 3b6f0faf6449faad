"""The whole service in real processes, once for the run: ``kvstrata up`` on free ports."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from kvstrata.protos import admin_pb2, admin_pb2_grpc
from kvstrata.protos.service import CALL_METADATA

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 240


class Stack:
    """A running ``kvstrata up``.

    Attributes:
        address: Of the gateway.
        store: Of the store.
        redis_port: Of its Redis; None without one.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self._log = (folder / "up.log").open("w+b")
        self.temporary = Path(tempfile.mkdtemp(prefix="kvt-", dir="/tmp"))  # Ray needs it short
        self.process = subprocess.Popen(
            [BIN / "kvstrata", "up", "--listen", "127.0.0.1:0", *options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=folder,
            text=True,
            env=os.environ | {"TMPDIR": str(self.temporary)},
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT_S)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(f"kvstrata up ended: {self.log()}")
        told: dict[str, Any] = json.loads(line)
        self.address: str = told["address"]
        self.store: str = told["store"]
        self.redis_port: int | None = told["redis_port"]
        self._channels = [grpc.insecure_channel(a) for a in (self.address, self.store)]
        self.admin: Any = admin_pb2_grpc.AdminStub(self._channels[0])
        self.store_admin: Any = admin_pb2_grpc.AdminStub(self._channels[1])

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, *words: str) -> psutil.Process:
        """Return the one process whose command line holds all words; waits until it is there."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for process in self.processes():
                try:
                    line = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if all(word in line for word in words):
                    return process
            time.sleep(0.1)
        raise AssertionError(f"no process with {words}")

    def worker(self, kind: str) -> psutil.Process:
        return self.find("ServeReplica", f"kvstrata-{kind}")

    def counter(self, name: str, **labels: str) -> int:
        """Return the sum of all counters of that name with these labels, gateway's and store's."""
        reply = self.admin.Stats(admin_pb2.StatsRequest(), timeout=20, metadata=CALL_METADATA)
        return sum(
            int(c.value)
            for c in reply.counters
            if c.name == name and labels.items() <= dict(c.labels).items()
        )

    def evict(self, tier: str = "") -> None:
        request = admin_pb2.EvictRequest(tier=tier)
        self.admin.Evict(request, timeout=20, metadata=CALL_METADATA)

    def kvctl(self, *arguments: str) -> Any:
        command = [BIN / "kvctl", *arguments, "--json", "--address", self.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return json.loads(done.stdout)

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send a signal as Ctrl-C would, and return the exit status."""
        for channel in self._channels:
            channel.close()
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()
        return status

    def leftovers(self) -> Sequence[Path]:
        """Return what it left in its temporary folder, and remove that."""
        found = list(self.temporary.rglob("*"))
        shutil.rmtree(self.temporary, ignore_errors=True)
        return found


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The service with Redis; shared by all tests, which leave it working."""
    running = Stack(tmp_path_factory.mktemp("stack"))
    yield running
    assert running.stop() == 0
    assert running.leftovers() == []
