"""A peer as a child process in an environment of its own, whose packages are not ours.

It reads one line a task and answers each with one JSON object.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START_S, CALL_S = 120.0, 60.0


def version_of(environment: Path, package: str) -> str | None:
    """Return the version of a package, named as its wheel is, in an environment; None if absent."""
    for folder in environment.glob(f"lib/python3*/site-packages/{package}-*.dist-info"):
        return folder.name.removesuffix(".dist-info").rpartition("-")[2]
    return None


class PeerError(Exception):
    """A peer did not start or did not do what it was told, and what it said."""


class ChildPeer:
    """One peer that runs.

    Args:
        environment: The virtual environment.
        script: The child's program, in this folder.
        *args: Its arguments.
    """

    def __init__(self, environment: Path, script: str, *args: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        libraries = ":".join(str(folder) for folder in environment.glob("apt/**/lib/*-linux-gnu"))
        self._process = subprocess.Popen(
            [str(environment / "bin/python"), "-P", str(HERE / script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=environment,  # our rooms must not shadow packages of theirs, in children either
            env=os.environ | {"LD_LIBRARY_PATH": libraries, "PYTHONSAFEPATH": "1"},
        )
        self.num_bytes = 0

    async def start(self, timeout_s: float = START_S) -> dict[str, Any]:
        """Wait until it serves, and return what it says then; ``bytes`` are those of a call."""
        ready = await self._reply(timeout_s)
        self.num_bytes = int(ready.get("bytes", 0))
        return ready

    async def call(self, op: str, streams: int) -> list[float]:
        """Put or get everything once; return its seconds."""
        return [float((await self.ask(f"{op} {streams}"))["seconds"])]

    async def ask(self, line: str, timeout_s: float = CALL_S) -> dict[str, Any]:
        """Return its answer to a line.

        Raises:
            PeerError: It died, or said nothing in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError("died: " + self._last_words()) from None
        return await self._reply(timeout_s)

    async def _reply(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        reading = asyncio.create_task(asyncio.to_thread(self._process.stdout.readline))
        done, _ = await asyncio.wait([reading], timeout=timeout_s)
        if not done:
            self._process.kill()  # ends the reading, too
        line = await reading
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError:
            what = "died" if done else f"said nothing for {timeout_s:.0f} s"
            raise PeerError(f"{what}: {line}{self._last_words()}") from None
        return reply

    def _last_words(self) -> str:
        self._log.seek(0)
        return " | ".join(self._log.read().splitlines()[-8:])[-800:]

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
