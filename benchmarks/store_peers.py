"""LMCache and Mooncake for ``bench_store.py``: each a child process in their own environment.

``make peers`` installs them in ``.venv-peers``; their versions of other packages are not ours. A
child (``peer_lmcache.py``, ``peer_mooncake.py``) knows nothing of ours. It is told "put 4" or "get
4", four being the threads to use, does it with all KV of the blocks once, and answers seconds.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = Path(os.environ.get("KVSTRATA_PEERS", HERE.parent / ".venv-peers"))
START_S, CALL_S = 120.0, 60.0


def versions() -> dict[str, str | None]:
    """Return the versions of the peers that are installed; None for those that are not."""
    names = {"lmcache": "lmcache", "mooncake": "mooncake_transfer_engine_non_cuda"}
    found: dict[str, str | None] = dict.fromkeys(names)
    for name, package in names.items():
        for folder in ENVIRONMENT.glob(f"lib/python3*/site-packages/{package}-*.dist-info"):
            found[name] = folder.name.removesuffix(".dist-info").rpartition("-")[2]
    return found


class PeerError(Exception):
    """A peer did not start or did not do what it was told, and what it said."""


class ChildPeer:
    """One peer that runs.

    Args:
        script: The child's program.
        *args: Its arguments.
    """

    def __init__(self, script: str, *args: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        libraries = ":".join(str(folder) for folder in ENVIRONMENT.glob("apt/**/lib/*-linux-gnu"))
        self._process = subprocess.Popen(
            [str(ENVIRONMENT / "bin/python"), "-P", str(HERE / script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"LD_LIBRARY_PATH": libraries},
        )
        self.num_bytes = 0

    async def start(self) -> None:
        """Wait until it serves; learn how many bytes it moves a call."""
        self.num_bytes = int((await self._reply(START_S))["bytes"])

    async def call(self, op: str, streams: int) -> list[float]:
        """Put or get everything once; return its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{op} {streams}\n")
        self._process.stdin.flush()
        return [float((await self._reply(CALL_S))["seconds"])]

    async def _reply(self, timeout_s: float) -> dict[str, float]:
        assert self._process.stdout is not None
        reading = asyncio.create_task(asyncio.to_thread(self._process.stdout.readline))
        done, _ = await asyncio.wait([reading], timeout=timeout_s)
        if not done:
            self._process.kill()  # ends the reading, too
        line = await reading
        try:
            reply: dict[str, float] = json.loads(line)
        except ValueError:
            self._log.seek(0)
            last = self._log.read().splitlines()[-8:]
            what = "died" if done else f"said nothing for {timeout_s:.0f} s"
            raise PeerError(f"{what}: " + " | ".join([line, *last])[-800:]) from None
        return reply

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
