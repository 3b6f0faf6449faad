"""A process that dies while it puts, replaces and drops loses nothing that it acknowledged."""

import importlib.util
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from kvstrata.kvstore_service.commit_rule import open_verified
from kvstrata.kvstore_service.ssd_tier import SsdTier

ROUNDS = 3
CRASHER = Path(__file__).with_name("ssd_crasher.py")

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def crasher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ssd_crasher", CRASHER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_and_kill(folder: Path, first: int, after_s: float) -> Counter[int]:
    """Return how many steps were acknowledged for each block before the kill."""
    command = [sys.executable, "-P", str(CRASHER), str(folder), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "open\n"
            time.sleep(after_s)
        finally:
            child.kill()
        lines = child.stdout.read().splitlines()
        child.wait(10)
    return Counter(int(line) for line in lines)


async def test_what_was_acknowledged_before_a_kill_is_whole(
    tmp_path: Path, crasher: ModuleType
) -> None:
    folder = tmp_path / "ssd"
    acknowledged: Counter[int] = Counter()
    for _ in range(ROUNDS):
        first = max(acknowledged, default=0) + crasher.LANES
        acknowledged += run_and_kill(folder, first, random.uniform(0.05, 0.4))
        tier: SsdTier = await crasher.make(str(folder)).open()
        await tier.check_integrity()
        for key in await tier.keys(1 << 20):
            for stratum, frame in (await tier.get(key, [1, 2])).items():
                open_verified(key, stratum, frame)
        for number, num_steps in acknowledged.items():
            found = await tier.get(crasher.sample(number, 0)[0], [1, 2])
            under_way = min(num_steps + 1, crasher.NUM_STEPS)
            assert found in [crasher.state_after(number, n) for n in (num_steps, under_way)]
        await tier.close()
    assert acknowledged


def test_a_death_at_any_step_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Every change of the file system in turn is the one that never happens."""
    command = [sys.executable, "-P", str(CRASHER), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 60
