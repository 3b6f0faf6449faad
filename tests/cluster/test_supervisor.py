"""Whatever becomes of the stack or of its parent, no process and no folder is left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvstrata.cluster.supervisor import descendants, die_with_parent, temporary_folder

SUPERVISE = (
    "import sys; from kvstrata.cluster.supervisor import supervise; "
    "sys.exit(supervise(sys.argv[1], sys.argv[2:]))"
)


class Supervised:
    """A supervisor with a stack that runs."""

    def __init__(self, mode: str, folder: Path, module: str = "stack_double") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", SUPERVISE, module, mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # its own group, as under a terminal
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parent),
                "TMPDIR": str(folder),
            },
        )
        self.folder = folder

    def ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert Path(told["runtime"]).parent == self.folder
        assert Path(told["runtime"], "some", "file").exists()
        return told

    def end(self, timeout_s: float = 20.0) -> tuple[int, list[int]]:
        """Return the exit status and the signals that the stack was sent."""
        out, _ = self.process.communicate(timeout=timeout_s)
        told = [json.loads(line) for line in out.splitlines()]
        return self.process.returncode, [line["signal"] for line in told if "signal" in line]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvs", dir="/tmp") as name:
        yield Path(name)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_nothing_left(told: dict[str, Any], folder: Path, within_s: float = 0.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and (
        any(folder.iterdir()) or any(map(is_alive, told["pids"]))
    ):
        time.sleep(0.02)
    assert [pid for pid in told["pids"] if is_alive(pid)] == []
    assert list(folder.iterdir()) == []


def test_a_stack_that_crashes_leaves_nothing(folder: Path) -> None:
    supervised = Supervised("crash", folder)
    told = supervised.ready()
    assert supervised.end() == (3, [])
    assert_nothing_left(told, folder)


def test_a_stack_that_is_killed_leaves_nothing(folder: Path) -> None:
    supervised = Supervised("serve", folder)
    told = supervised.ready()
    os.kill(told["stack"], signal.SIGKILL)
    assert supervised.end() == (128 + signal.SIGKILL, [])
    assert_nothing_left(told, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_supervisor_reaches_the_stack_as_one_sigterm(
    folder: Path, number: signal.Signals
) -> None:
    supervised = Supervised("serve", folder)
    told = supervised.ready()
    supervised.process.send_signal(number)
    assert supervised.end() == (0, [signal.SIGTERM])
    assert_nothing_left(told, folder)


def test_ctrl_c_at_the_terminal_reaches_the_stack_once(folder: Path) -> None:
    supervised = Supervised("serve", folder)
    told = supervised.ready()
    os.killpg(supervised.process.pid, signal.SIGINT)  # what a terminal does
    time.sleep(0.01)
    os.killpg(supervised.process.pid, signal.SIGINT)
    assert supervised.end() == (0, [signal.SIGTERM])
    assert_nothing_left(told, folder)


def test_what_does_not_listen_is_ended_by_force(folder: Path) -> None:
    supervised = Supervised("deaf", folder)
    told = supervised.ready()
    supervised.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert supervised.end() == (0, [signal.SIGTERM])
    assert time.monotonic() - begin < 12
    assert_nothing_left(told, folder)


def test_a_stack_whose_supervisor_is_killed_ends_itself(folder: Path) -> None:
    supervised = Supervised("serve", folder)
    told = supervised.ready()
    supervised.process.kill()
    supervised.process.wait()
    assert_nothing_left(told, folder, within_s=10)
    assert supervised.end() == (-signal.SIGKILL, [signal.SIGTERM])


def test_a_stack_that_cannot_start_leaves_nothing(folder: Path) -> None:
    supervised = Supervised("serve", folder, module="no_such_module")
    assert supervised.end() == (1, [])
    assert list(folder.iterdir()) == []


def test_a_process_whose_parent_is_gone_already_ends() -> None:
    code = (
        "import sys, time; from kvstrata.cluster.supervisor import die_with_parent; "
        "die_with_parent(int(sys.argv[1])); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, "1"], timeout=240)
    assert done.returncode == -signal.SIGTERM
    assert callable(die_with_parent)


def test_descendants_come_parents_first() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE) as parent:
        deadline = time.monotonic() + 10
        while len(found := list(descendants(parent.pid))) < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(found) == 1
        below = list(descendants(os.getpid()))
        assert below.index(parent.pid) < below.index(found[0])
        assert parent.stdin is not None
        parent.stdin.write(b"\n")
        parent.stdin.close()
    assert list(descendants(parent.pid)) == []


@pytest.mark.parametrize(("usual", "chosen"), [("/tmp", None), ("/" + "long/" * 10, "/tmp")])
def test_the_runtime_folder_has_a_short_path(
    monkeypatch: pytest.MonkeyPatch, usual: str, chosen: str | None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", usual)
    assert temporary_folder() == chosen
