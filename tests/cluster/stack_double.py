"""What ``test_supervisor`` has supervised: a stack that starts processes and ends as told.

Run as ``stack_double RUNTIME_DIR SUPERVISOR_PID MODE``; tells its pids in one JSON line, and each
SIGTERM in another.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from kvstrata.cluster.supervisor import die_with_parent

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
DEAF = [
    sys.executable,
    "-S",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print(flush=True); time.sleep(600)",
]
# Leaves its own child to whoever adopts it, as a daemon does.
PARENT = [
    sys.executable,
    "-S",
    "-c",
    "import subprocess, sys; "
    "p = subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=subprocess.DEVNULL); "
    "print(p.pid, flush=True)",
    *SLEEP,
]


def start_children(*, deaf: bool) -> list[subprocess.Popen[bytes]]:
    """Start one of our session, one of its own, and a deaf one if asked."""
    quiet = subprocess.DEVNULL
    children = [
        subprocess.Popen(SLEEP, stdout=quiet),
        subprocess.Popen(SLEEP, stdout=quiet, start_new_session=True),
    ]
    if deaf:
        children.append(subprocess.Popen(DEAF, stdout=subprocess.PIPE, start_new_session=True))
        children[-1].stdout.readline()  # type: ignore[union-attr]
    return children


def main(runtime: Path, supervisor: int, mode: str) -> int:
    asked: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        print(json.dumps({"signal": number}), flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    die_with_parent(supervisor)
    (runtime / "some").mkdir()
    (runtime / "some" / "file").write_text("x")
    children = start_children(deaf=mode == "deaf")
    orphan = int(subprocess.run(PARENT, stdout=subprocess.PIPE, check=True).stdout)
    pids = [os.getpid(), *(child.pid for child in children), orphan]
    print(json.dumps({"runtime": str(runtime), "stack": os.getpid(), "pids": pids}), flush=True)
    if mode == "crash":
        raise SystemExit(3)
    while not asked:
        time.sleep(0.02)
    if os.getppid() != supervisor:  # nobody cleans up after us
        for child in children:
            child.kill()
        os.kill(orphan, signal.SIGKILL)
        shutil.rmtree(runtime)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
