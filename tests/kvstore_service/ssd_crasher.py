"""Processes that die while they change an ssd tier: one to be killed, one that kills itself."""

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos.identity import BlockKey, ScopeDigest

BASE, MID = 1, 2
LANES = 3
NUM_STEPS = 4
SCOPE = ScopeDigest(b"s" * 16)
CHANGES = ("open", "write", "fsync", "rename", "unlink", "truncate", "utime", "close")


def sample(number: int, seed: int) -> tuple[BlockKey, dict[int, bytes]]:
    return sample_block(SCOPE, number, seed=seed, strata={BASE: 20_000, MID: 9_000})


def make(path: str, capacity_bytes: int = 1 << 30) -> SsdTier:
    return SsdTier(path, capacity_bytes=capacity_bytes, max_stratum_bytes=1 << 20)


async def take_step(tier: SsdTier, number: int, step: int) -> None:
    """Put, drop MID, put another writing, drop MID."""
    key, frames = sample(number, step // 2)
    if step % 2 == 0:
        await tier.put(key, frames)
    else:
        await tier.drop(key, MID)


def state_after(number: int, num_steps: int) -> dict[int, bytes]:
    """Return the strata of a block after so many of its steps."""
    if num_steps == 0:
        return {}
    _, frames = sample(number, (num_steps - 1) // 2)
    return frames if num_steps % 2 else {BASE: frames[BASE]}


async def run_until_killed(path: str, first: int) -> None:
    """Print the number of a block after each of its steps."""
    tier = await make(path).open()
    os.write(1, b"open\n")

    async def lane(number: int) -> None:
        while True:
            for step in range(NUM_STEPS):
                await take_step(tier, number, step)
                os.write(1, b"%d\n" % number)
            number += LANES

    await asyncio.gather(*(lane(first + i) for i in range(LANES)))


async def run_short(path: str, report: Callable[[], None]) -> None:
    """Take a few steps of every kind, the last of which evicts."""
    tier = await make(path, 2 * 32_768).open()
    for step in range(NUM_STEPS):
        await take_step(tier, 0, step)
        report()
    await tier.put(*sample(1, 0))
    report()
    await tier.put(*sample(2, 0))
    report()
    await tier.delete([sample(1, 0)[0]])
    report()


STATES = [
    *({0: n} for n in range(NUM_STEPS + 1)),
    {0: NUM_STEPS, 1: 1},
    {1: 1, 2: 1},
    {2: 1},
]


def die_at(call: int) -> None:
    """End the process, without any cleaning up, right before that change of the file system."""
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os._exit(9)
            return real(*arguments, **options)

        return change

    for name in CHANGES:
        setattr(os, name, dying(getattr(os, name)))


async def is_whole(path: str, num_acknowledged: int) -> bool:
    """Return whether a new tier finds the state after the acknowledged steps, or one more."""
    tier = await make(path).open()
    await tier.check_integrity()
    found = {n: await tier.get(sample(n, 0)[0], [BASE, MID]) for n in range(3)}
    await tier.close()
    states = STATES[num_acknowledged : num_acknowledged + 2]
    wanted = [{n: state_after(n, state.get(n, 0)) for n in range(3)} for state in states]
    if num_acknowledged == 5:  # a victim goes before the block that needs its room comes
        wanted.append({**wanted[0], 0: {}})
    return found in wanted


def run_and_die(path: str, call: int, pipe: int) -> NoReturn:
    """Send a byte for each acknowledged step, and die at that call or at the end."""
    write = os.write

    def report() -> None:
        write(pipe, b".")

    die_at(call)
    asyncio.run(run_short(path, report))
    os._exit(0)


def die_everywhere(path: str) -> None:
    """Print the number of calls at which a process died and lost nothing."""
    call = 0
    while True:
        call += 1
        folder = f"{path}/{call}"
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            run_and_die(folder, call, writer)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as acknowledged:
            num_acknowledged = len(acknowledged.read())
        if os.waitstatus_to_exitcode(status) == 0:
            break
        if not asyncio.run(is_whole(folder, num_acknowledged)):
            sys.exit(f"lost after {num_acknowledged} steps, at call {call}")
    print(call - 1)


if __name__ == "__main__":
    os.fsync = lambda fd: None  # what a process wrote outlives it without; the calls are counted
    if len(sys.argv) == 3:
        asyncio.run(run_until_killed(sys.argv[1], int(sys.argv[2])))
    else:
        die_everywhere(sys.argv[1])
