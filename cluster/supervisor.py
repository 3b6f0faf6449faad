"""A parent that leaves nothing behind.

``kvstrata up`` is two processes: this small one, and the stack it starts. Whatever the stack starts
and leaves behind when it ends, crashed or not, is adopted by this process (Linux child subreaper),
ended by pid, and its runtime folder is removed. If this process itself is killed, the kernel tells
the stack (parent-death signal), which then ends its children and the folder. Standard library only.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

GRACE_S = 25.0  # for the stack to end by itself
CHILD_GRACE_S = 3.0  # for what it left behind
MAX_TEMPORARY_PATH = 40  # Ray's socket paths below it must fit 107 bytes

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """Call Linux ``prctl``; raises OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def die_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM to this process when ``parent``, which started it, dies."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be found."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def supervise(module: str, arguments: Sequence[str]) -> int:
    """Run ``python -m module RUNTIME_DIR SUPERVISOR_PID arguments...`` and clean up after it.

    SIGINT, SIGTERM and SIGHUP reach the stack as one SIGTERM.

    Returns:
        The stack's exit status; 128 + n if signal n ended it unasked.
    """
    adopt_orphans()
    runtime = Path(tempfile.mkdtemp(prefix="kvs-", dir=temporary_folder()))
    stack: subprocess.Popen[bytes] | None = None
    asked_at: list[float] = []

    def forward(_number: int, _frame: FrameType | None) -> None:
        if stack is not None and not asked_at:
            stack.terminate()
        asked_at.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    try:
        # Its own process group: Ctrl-C at the terminal reaches it once, through `forward`.
        stack = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(runtime), str(os.getpid()), *arguments],
            process_group=0,
        )
        if asked_at:
            stack.terminate()
        while stack.poll() is None:
            time.sleep(0.05)
            if asked_at and time.monotonic() - asked_at[0] > GRACE_S:
                stack.kill()
        status = stack.returncode
    finally:
        end_descendants()
        shutil.rmtree(runtime, ignore_errors=True)
    return status if status >= 0 else 128 - status


def temporary_folder() -> str | None:
    """Return a temporary folder, its path short enough for Unix sockets; None is the usual."""
    return "/tmp" if len(tempfile.gettempdir()) > MAX_TEMPORARY_PATH else None


def end_descendants() -> None:
    """End every descendant of this process: politely, then by force; returns when none is left."""
    deadline = time.monotonic() + CHILD_GRACE_S
    asked: set[int] = set()
    while children := list(descendants(os.getpid())):
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    os.kill(pid, signal.SIGTERM)
                    asked.add(pid)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def descendants(root: int) -> Iterator[int]:
    """Yield the pids below ``root`` in the process tree, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                # pid (name) state ppid ...; the name may hold anything, so split after it
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    pending = [root]
    while pending:
        found = children.get(pending.pop(), [])
        yield from found
        pending += found
