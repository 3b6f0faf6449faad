"""Redis and the store as children: what ends unasked is started again."""

import asyncio
import sys

import psutil
import pytest

from kvstrata.cluster.processes import Child


async def sleeper() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=-1)


async def test_a_child_that_is_killed_is_started_again_and_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    child = Child("sleeper", sleeper)
    await child.start()
    try:
        for _ in range(2):
            killed = child.pid
            psutil.Process(killed).kill()
            async with asyncio.timeout(60):
                while child.pid == killed:
                    await asyncio.sleep(0.02)
            assert psutil.pid_exists(child.pid)
    finally:
        await child.stop()
    assert not psutil.pid_exists(child.pid)
    ended = [r for r in caplog.records if r.message == "process ended; starting it again"]
    assert [(r.__dict__["child"], r.__dict__["status"]) for r in ended] == [("sleeper", -9)] * 2


async def test_a_child_that_does_not_come_up_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outcomes = iter([sleeper, None, sleeper])

    async def start() -> asyncio.subprocess.Process:
        made = next(outcomes)
        if made is None:
            raise OSError("not this time")
        return await made()

    child = Child("sleeper", start)
    await child.start()
    try:
        killed = child.pid
        psutil.Process(killed).kill()
        async with asyncio.timeout(60):
            while child.pid == killed:
                await asyncio.sleep(0.02)
    finally:
        await child.stop()
    assert "process did not come up; trying once more" in caplog.messages
