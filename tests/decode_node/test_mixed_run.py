"""A mixed load on two nodes whose memory is too small for it: no token is lost, doubled or wrong.

``KVSTRATA_MIXED_S=3600`` makes it the run of an hour; then memory must not grow either.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import psutil
import pytest

from kvstrata.engine import Model
from kvstrata.engine.sequence import RunningSequence
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import Method
from kvstrata.prefill_node import Task, WorkerConfig
from kvstrata.protos.errors import CapacityError, DeadlineError
from kvstrata.protos.inference_pb2 import GenerateReply
from tests.prefill_node.nodes import (
    BALANCED,
    EXACT,
    Nodes,
    answer_of,
    prefilled,
    prompt_of,
    running,
    task_of,
)

SECONDS = float(os.environ.get("KVSTRATA_MIXED_S", "1"))
IS_LONG = SECONDS >= 60
CLIENTS = 6
LEAST = 4  # requests of each client
PARK_S = 45.0  # clients go on so much longer until one request at least was parked
ROWS = 1000  # tokens that the pool of a node holds; six clients want up to about 2,400
BYTES_A_ROW = 2 * 3 * 2 * 8 * 4  # K and V of three layers of two heads of 8 floats
PREFIXES = [prompt_of(64 * (1 + n % 2), seed=n) for n in range(4)]
EVICTING = Method(EXACT.codec, pipeline=Pipeline.of(H2O(heavy=0.3, recent=0.3)))
METHODS = {"exact": EXACT, "fallback": BALANCED, "h2o": EVICTING}
GROWTH_BYTES = 48 << 20  # of a process in a long run, once all of it is warm

pytestmark = pytest.mark.timeout(120 + 2 * SECONDS)


@dataclass
class Run:
    """What all clients share.

    Attributes:
        outcomes: How many requests ended how.
    """

    model: Model
    nodes: Nodes
    outcomes: Counter[str] = field(default_factory=Counter)
    expected: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @property
    def num_parked(self) -> int:
        """How many requests of the decode node have lost their memory."""
        return self.nodes.decode._worker.steps.counts.get("parked")

    def alone(self, prompt: tuple[int, ...], count: int) -> list[int]:
        """Return what the model alone generates; a longer answer serves shorter ones too."""
        known = self.expected.get(prompt, [])
        if len(known) < count:
            sequence = RunningSequence(self.model, EXACT, prompt)
            logits, _ = sequence.extend(prompt)
            known = [int(logits.argmax())]
            while len(known) < count:
                known.append(int(sequence.extend(known[-1:])[0].argmax()))
            self.expected[prompt] = known
        return known[:count]


def draw_task(draw: random.Random) -> tuple[str, Task]:
    name = draw.choices([*METHODS], [3, 2, 1])[0]
    prefix = draw.choice(PREFIXES)
    prompt = prefix + prompt_of(draw.choice((1, 17, 70)), seed=draw.randrange(12))
    late = draw.random() < 0.05
    return name, task_of(
        prompt,
        METHODS[name],
        max_tokens=draw.choice((1, 20, 150)),
        timeout_s=draw.choice((0.0, 0.05)) if late else 60.0,
        expected_blocks=draw.choice((0, 1, 3)),
    )


async def client(run: Run, draw: random.Random, until: float) -> None:
    num_done = 0
    while (
        time.monotonic() < until
        or num_done < LEAST
        or (not run.num_parked and time.monotonic() < until + PARK_S)
    ):
        num_done += 1
        name, task = draw_task(draw)
        try:
            if draw.random() < 0.4:
                await prefilled(run.nodes.prefill, task)
            leave_after = draw.randrange(1, 30) if draw.random() < 0.1 else 0
            replies: list[GenerateReply] = []
            async with contextlib.aclosing(run.nodes.decode.generate(task)) as stream:
                async for reply in stream:
                    replies.append(GenerateReply.FromString(reply))
                    if len(replies) == leave_after:
                        break
        except DeadlineError:
            run.outcomes["late"] += 1
            assert task.deadline_unix_s < time.time()
            continue
        tokens = [token for reply in replies for token in reply.token_ids]
        if not replies[-1].finish_reason:
            run.outcomes["left"] += 1
        else:
            answer = answer_of(replies)
            assert len(tokens) == answer.completion_tokens == task.sampling.max_tokens
            run.outcomes[name] += 1
        if name == "exact":
            assert tokens == run.alone(task.prompt_ids, task.sampling.max_tokens)[: len(tokens)]


async def measure_growth(until: float) -> int:
    """Return how many bytes the process has gained since a third of the run."""
    process = psutil.Process()
    await asyncio.sleep((until - time.monotonic()) / 3)
    before = process.memory_info().rss
    await asyncio.sleep(max(0.0, until - time.monotonic()))
    return int(process.memory_info().rss - before)


async def test_a_mixed_load_loses_and_doubles_no_token(config: WorkerConfig, model: Model) -> None:
    small = replace(config, pool_bytes=ROWS * BYTES_A_ROW)
    async with LocalStore() as store, running(small, store.address) as nodes:
        run = Run(model, nodes)
        with pytest.raises(CapacityError):
            await prefilled(nodes.prefill, task_of(prompt_of(500, seed=99) * 2, EXACT))
        until = time.monotonic() + SECONDS
        growth = asyncio.create_task(measure_growth(until))
        await asyncio.gather(*(client(run, random.Random(n), until) for n in range(CLIENTS)))
        pools = [node._worker.steps.pool for node in (nodes.prefill, nodes.decode)]
        parked = run.num_parked
        async with asyncio.timeout(60):  # those who left are put away by the loop
            while any(pool.arena.used_bytes for pool in pools):
                await asyncio.sleep(0.01)
        for pool in pools:
            pool.check_integrity()
        assert parked > 0
        assert min(run.outcomes[name] for name in METHODS) > 0
        if IS_LONG:
            print(dict(run.outcomes), f"parked {parked}, grown by {await growth} bytes")
            assert await growth < GROWTH_BYTES
        growth.cancel()
