"""The step loop: many sequences at once, each as if alone; who waits, who is parked, what fails."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.batch import Span
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.seat import Compute, ParkedError, Seat
from kvstrata.engine.sequence import RunningSequence
from kvstrata.engine.step_loop import SEAL_NICE, StepLoop
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import Method
from kvstrata.protos.errors import CapacityError, DeadlineError, DrainingError
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.engine.test_paged_cache import KINDS, methods, start, wide
from tests.engine.test_sequence import greedy, one_thread, opened, prompt_of, tail

__all__ = ["methods", "one_thread", "wide"]
COUNT = 30
SOON_S = 60.0


@pytest.fixture
def model(wide: dict[str, Model]) -> Model:
    return wide["wide"]


@pytest.fixture
async def steps(model: Model) -> AsyncIterator[StepLoop]:
    made = StepLoop(model, KVPool(model, 8 << 20))
    yield made
    await asyncio.to_thread(made.stop)
    made.pool.check_integrity()
    assert made.pool.arena.used_bytes == 0


def small(model: Model, num_rows: int) -> KVPool:
    """A pool for so many uncompressed tokens."""
    spec = model.spec
    return KVPool(model, num_rows * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4)


def alone(model: Model, method: Method, prompt: list[int], count: int = COUNT) -> list[int]:
    sequence, _ = start(model, method, prompt, None)
    return greedy(sequence, tail(sequence), count)[0]


class Client:
    """Generates greedily, through parking, and keeps what it was told."""

    def __init__(
        self, steps: StepLoop, method: Method, prompt: list[int], count: int = COUNT, **how: object
    ) -> None:
        self.steps, self.method, self.prompt, self.count, self.how = (
            steps, method, prompt, count, how,
        )  # fmt: skip
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.blocks: dict[int, SealedBlock] = {}
        self.parked = 0
        self.order = steps.next_order()

    def choose(self, logits: torch.Tensor) -> int | None:
        self.tokens.append(int(logits.argmax()))
        self.times.append(time.perf_counter())
        return self.tokens[-1] if len(self.tokens) < self.count else None

    def sealed(self, blocks: Sequence[SealedBlock]) -> None:
        self.blocks |= {b.identity.first_position // BLOCK_TOKENS: b for b in blocks}

    async def run(self) -> list[int]:
        while True:
            try:
                await self._run()
                return self.tokens
            except ParkedError:
                self.parked += 1

    async def _run(self) -> None:
        known, steps = [*self.prompt, *self.tokens], self.steps
        sequence = await steps.open(
            self.method,
            known,
            num_prompt=len(self.prompt),
            order=self.order,
            **self.how,  # type: ignore[arg-type]
        )
        try:
            stored = [self.blocks[i] for i in range(len(self.blocks))]
            if stored:
                await steps.load(sequence, opened(stored, self.method.wanted))
            until = (len(self.prompt) - 1) // BLOCK_TOKENS
            first = sequence.num_blocks_held
            if first < until:
                async for _ in steps.compute(sequence, until * BLOCK_TOKENS):
                    pass
                blocks = await steps.seal(sequence, first, until)
                self.sealed(blocks)
                await steps.settle(sequence, blocks)
            await steps.generate(sequence, self.choose, self.sealed)
        finally:
            await steps.close(sequence)


async def gathered(*clients: Client) -> list[list[int]]:
    async with asyncio.timeout(SOON_S):
        return await asyncio.gather(*(client.run() for client in clients))


async def test_requests_of_all_methods_get_their_own_tokens(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    clients = [
        Client(steps, methods["wide", kind], prompt_of(40 + 37 * i, seed=i))
        for i, kind in enumerate(KINDS)
    ]
    wanted = [alone(model, client.method, client.prompt) for client in clients]
    assert await gathered(*clients) == wanted
    counts = steps.counts
    assert counts.get("generated_tokens") >= len(clients) * (COUNT - 1) - len(clients)
    assert counts.get("passes") < counts.get("generated_tokens") + 40
    assert counts.get("parked") == 0


async def test_they_join_and_leave_at_any_time(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    clients = [
        Client(steps, methods["wide", kind], prompt_of(90, seed=i), count=10 + 9 * i)
        for i, kind in enumerate(KINDS)
    ]

    async def late(client: Client, delay: int) -> list[int]:
        async with asyncio.timeout(SOON_S):
            while delay > len(clients[0].tokens):
                await asyncio.sleep(0.001)
            return await client.run()

    got = await asyncio.gather(*(late(client, 3 * i) for i, client in enumerate(clients)))
    assert got == [alone(model, c.method, c.prompt, c.count) for c in clients]


@pytest.mark.parametrize("kind", KINDS)
async def test_parked_sequences_go_on_from_their_blocks(
    model: Model, methods: dict[tuple[str, str], Method], kind: str
) -> None:
    """A pool for about one and a half of three sequences."""
    method = methods["wide", kind]
    prompts = [prompt_of(100, seed=i) for i in range(3)]
    wanted = [alone(model, method, prompt, 60) for prompt in prompts]
    steps = StepLoop(model, small(model, 400))
    clients = [Client(steps, method, prompt, count=60) for prompt in prompts]
    try:
        assert await gathered(*clients) == wanted
    finally:
        await asyncio.to_thread(steps.stop)
    assert steps.pool.arena.used_bytes == 0
    assert steps.counts.get("parked") == sum(client.parked for client in clients)


@pytest.mark.parametrize("kind", ["exact", "fallback"])
async def test_memory_that_ends_in_mid_run_parks_who_came_last(
    model: Model, methods: dict[tuple[str, str], Method], kind: str
) -> None:
    """All fit at first; as they grow, the last one must go, and comes back."""
    method = methods["wide", kind]
    prompts = [prompt_of(30, seed=i) for i in range(3)]
    wanted = [alone(model, method, prompt, 150) for prompt in prompts]
    steps = StepLoop(model, small(model, 450))
    clients = [Client(steps, method, prompt, count=150) for prompt in prompts]
    try:
        assert await gathered(*clients) == wanted
    finally:
        await asyncio.to_thread(steps.stop)
    assert clients[2].parked >= 1
    assert clients[0].parked == 0 or kind == "fallback"  # it may meet one whose memory is read
    assert steps.counts.get("parked") == sum(client.parked for client in clients)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_takes_nearly_all_of_the_memory_fits_again_when_parked(
    model: Model, methods: dict[tuple[str, str], Method], kind: str
) -> None:
    """Far more than half of the pool, in both forms that rows have."""
    steps = StepLoop(model, small(model, 140 if kind == "frame" else 192))
    client = Client(steps, methods["wide", kind], prompt_of(60), count=130)
    wanted = alone(model, client.method, client.prompt, client.count)
    choose = client.choose

    def choose_and_park(logits: torch.Tensor) -> int | None:
        """Lose the memory before the next pass."""
        if len(client.tokens) == client.count - 5:
            (seat,) = steps._stepper._seats.values()
            steps._post(lambda: steps._stepper._park(seat))
        return choose(logits)

    client.choose = choose_and_park  # type: ignore[method-assign]
    try:
        assert await gathered(client) == [wanted]
    finally:
        await asyncio.to_thread(steps.stop)
    assert client.parked == 1
    steps.pool.check_integrity()
    assert steps.pool.arena.used_bytes == 0


@pytest.mark.parametrize("until", [64, 128, 192])
def test_a_prompt_is_never_computed_by_single_tokens(
    model: Model, methods: dict[tuple[str, str], Method], until: int
) -> None:
    method = methods["wide", "frame"]
    for limit in range(1, 70):
        sequence = RunningSequence(model, method, prompt_of(200))
        seat = Seat(method, sequence.token_ids, 0, "", 0.0, b"", 200, 1, sequence=sequence)
        seat.job = Compute(until, until, lambda: None)
        while sequence.cache.length < until:
            span = seat.next_span(limit)
            if span is None:
                assert limit < 3
                break
            assert 1 < len(span.token_ids) <= limit
            sequence.cache.length += len(span.token_ids)


async def test_a_pool_too_small_for_one_prompt_refuses_it(
    model: Model, methods: dict[tuple[str, str], Method]
) -> None:
    steps = StepLoop(model, small(model, 100))
    try:
        with pytest.raises(CapacityError, match="larger pool"):
            await Client(steps, methods["wide", "exact"], prompt_of(200)).run()
    finally:
        await asyncio.to_thread(steps.stop)


async def test_a_generation_that_outgrows_the_pool_is_told_so(
    model: Model, methods: dict[tuple[str, str], Method]
) -> None:
    steps = StepLoop(model, small(model, 100))
    client = Client(steps, methods["wide", "exact"], prompt_of(10), count=200)
    try:
        with pytest.raises(CapacityError, match="and no more"):
            async with asyncio.timeout(SOON_S):
                await client.run()
    finally:
        await asyncio.to_thread(steps.stop)
    assert len(client.tokens) > 60
    assert steps.pool.arena.used_bytes == 0


async def test_a_deadline_ends_whoever_waits_or_runs(
    model: Model, methods: dict[tuple[str, str], Method]
) -> None:
    method = methods["wide", "exact"]
    steps = StepLoop(model, small(model, 400))
    try:
        holder = await steps.open(method, prompt_of(150))
        with pytest.raises(DeadlineError, match="waited for memory"):
            await steps.open(method, prompt_of(150), deadline_unix_s=time.time() + 0.1)
        await steps.close(holder)
        late = Client(steps, method, prompt_of(20), 10**6, deadline_unix_s=time.time() + 0.5)
        late.choose = lambda _: time.sleep(0.02) or 5  # type: ignore[method-assign, func-returns-value]
        with pytest.raises(DeadlineError, match="mid-run"):
            await late.run()
    finally:
        await asyncio.to_thread(steps.stop)
    assert steps.counts.get("expired") == 2
    assert steps.pool.arena.used_bytes == 0


async def test_cancelling_at_any_time_frees_everything(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    for i in range(12):
        client = Client(steps, methods["wide", KINDS[i % 4]], prompt_of(150, seed=i), count=10**6)
        client.choose = lambda _: 5  # type: ignore[method-assign]
        task = asyncio.create_task(client.run())
        await asyncio.sleep(0.003 * i)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(60):  # what is being sealed is given back when that has ended
        while await steps.call(lambda: steps.pool.arena.used_bytes):
            await asyncio.sleep(0.01)
    assert steps.pool.num_free_slots == 64


@pytest.fixture
def poisoned(model: Model, monkeypatch: pytest.MonkeyPatch) -> int:
    """A token that no pass survives."""
    forward = model.forward_batch

    def fail(spans: Sequence[Span]) -> torch.Tensor:
        if any(7 in span.token_ids for span in spans):
            raise ArithmeticError("seven")
        return forward(spans)

    monkeypatch.setattr(model, "forward_batch", fail)
    return 7


async def test_a_pass_that_fails_takes_down_nobody_but_its_cause(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop, poisoned: int
) -> None:
    method = methods["wide", "exact"]
    good = [token if token != poisoned else 8 for token in prompt_of(50)]
    client, culprit = Client(steps, method, good), Client(steps, method, [poisoned, 5])
    client.choose = lambda _: None if len(client.times) > 30 else client.times.append(0) or 5  # type: ignore
    async with asyncio.timeout(SOON_S):
        outcomes = await asyncio.gather(client.run(), culprit.run(), return_exceptions=True)
    assert not isinstance(outcomes[0], BaseException)
    assert isinstance(outcomes[1], ArithmeticError)
    assert steps.counts.get("failed_passes") >= 1


async def test_a_choice_that_fails_ends_its_own_request_only(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    method = methods["wide", "frame"]
    client, culprit = Client(steps, method, prompt_of(70)), Client(steps, method, prompt_of(71))

    def choose(_: torch.Tensor) -> int:
        raise ValueError("cannot sample")

    culprit.choose = choose  # type: ignore[method-assign]
    async with asyncio.timeout(SOON_S):
        outcomes = await asyncio.gather(client.run(), culprit.run(), return_exceptions=True)
    assert outcomes[0] == alone(model, method, client.prompt)
    assert isinstance(outcomes[1], ValueError)


async def test_stopping_tells_whoever_waits(
    model: Model, methods: dict[tuple[str, str], Method]
) -> None:
    steps = StepLoop(model, KVPool(model, 8 << 20))
    client = Client(steps, methods["wide", "exact"], prompt_of(20), count=10**6)
    client.choose = lambda _: 5  # type: ignore[method-assign]
    task = asyncio.create_task(client._run())
    while steps.counts.get("passes") < 3:
        await asyncio.sleep(0.01)
    stopping = asyncio.create_task(asyncio.to_thread(steps.stop))
    with pytest.raises(DrainingError):
        await task
    await stopping


async def test_streams_go_on_while_prompts_are_computed(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    """Every pass takes the generating sequence along, however long the prompt beside it."""
    method = methods["wide", "frame"]
    stream = Client(steps, method, prompt_of(20), count=60)
    task = asyncio.create_task(stream.run())
    while len(stream.tokens) < 3:
        await asyncio.sleep(0.001)
    passes, tokens = steps.counts.get("passes"), len(stream.tokens)
    prompt = Client(steps, method, prompt_of(200, seed=3), count=1)
    await prompt.run()
    passed = steps.counts.get("passes") - passes
    assert len(stream.tokens) - tokens >= min(passed, 60 - tokens) - 2
    await task


async def test_no_tenant_waits_for_another_ones_queue(
    model: Model, methods: dict[tuple[str, str], Method]
) -> None:
    """One tenant sends eight requests, then another one sends one, which is served second."""
    method = methods["wide", "exact"]
    steps = StepLoop(model, small(model, 500))
    ended: list[str] = []

    async def run(tenant: str, seed: int) -> None:
        await Client(steps, method, prompt_of(150, seed), count=2, tenant=tenant).run()
        ended.append(tenant)

    try:
        many = [asyncio.create_task(run("many", seed)) for seed in range(8)]
        while steps.counts.get("passes") < 1:
            await asyncio.sleep(0.001)
        await run("one", 9)
        assert ended.count("many") <= 2
        await asyncio.gather(*many)
    finally:
        await asyncio.to_thread(steps.stop)


async def test_a_sequence_can_be_used_by_hand_between_passes(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    prompt = prompt_of(100)
    sequence = await steps.open(methods["wide", "frame"], prompt)
    assert isinstance(sequence, RunningSequence)
    with pytest.raises(ZeroDivisionError):
        await steps.call(lambda: 1 // 0)
    logits, _ = await steps.call(sequence.extend, prompt)
    plain = RunningSequence(model, methods["wide", "frame"], prompt)
    torch.testing.assert_close(logits, plain.extend(prompt)[0], rtol=2e-3, atol=2e-3)
    await steps.close(sequence)
    await steps.close(sequence)


class SlowSeal:
    """Lets the sealing of a sequence last until it is told to end."""

    def __init__(self, sequence: RunningSequence, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_end = threading.Event()
        self.begun = threading.Event()
        seal = sequence.seal

        def slow(first: int, last: int) -> list[SealedBlock]:
            self.begun.set()
            assert self.may_end.wait(SOON_S)
            return seal(first, last)

        monkeypatch.setattr(sequence, "seal", slow)


async def test_memory_of_one_who_left_while_it_was_sealed_is_waited_for(
    model: Model, methods: dict[tuple[str, str], Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has a place any more, but the memory is not free yet: that is no small pool."""
    method = methods["wide", "exact"]
    steps = StepLoop(model, small(model, 300))
    try:
        first = await steps.open(method, prompt_of(150))
        async for _ in steps.compute(first, 128):
            pass
        slow = SlowSeal(first, monkeypatch)
        sealing = asyncio.create_task(steps.seal(first, 0, 2))
        assert await asyncio.to_thread(slow.begun.wait, SOON_S)
        sealing.cancel()
        await steps.close(first)
        client = Client(steps, method, prompt_of(150, seed=1), count=2)
        other = asyncio.create_task(client.run())
        await asyncio.sleep(0.2)
        assert await steps.call(lambda: len(steps._stepper._waiting)) == 1
        slow.may_end.set()
        async with asyncio.timeout(SOON_S):
            assert await other == alone(model, method, client.prompt, 2)
    finally:
        slow.may_end.set()
        await asyncio.to_thread(steps.stop)
    assert steps.pool.arena.used_bytes == 0


async def test_a_cancelled_seal_lets_go_of_everything(
    model: Model,
    methods: dict[tuple[str, str], Method],
    steps: StepLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the cancel comes before the owner has heard that sealing began."""
    for _ in range(3):
        sequence = await steps.open(methods["wide", "exact"], prompt_of(100))
        async for _ in steps.compute(sequence, 64):
            pass
        slow = SlowSeal(sequence, monkeypatch)
        sealing = asyncio.create_task(steps.seal(sequence, 0, 1))
        await asyncio.sleep(0)  # it asks the loop's thread
        assert slow.begun.wait(SOON_S)  # which began, while this thread heard nothing of it
        sealing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sealing
        await steps.close(sequence)
        slow.may_end.set()
        async with asyncio.timeout(SOON_S):
            while await steps.call(lambda: steps.pool.arena.used_bytes):
                await asyncio.sleep(0.01)
    assert steps.pool.num_free_slots == 64
    assert steps.pool.arena._num_still == 0


async def test_a_pass_that_fails_counts_no_saliency(
    model: Model,
    methods: dict[tuple[str, str], Method],
    steps: StepLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers that ran before it failed have counted, and count again when each runs alone."""
    forward, failures = model.forward_batch, []

    def fail(spans: Sequence[Span]) -> torch.Tensor:
        if len(spans) > 1 and len(failures) < 5:
            failures.append(len(spans))
            steps.pool.saliency += 1.0
            raise ArithmeticError("in the last layer")
        return forward(spans)

    monkeypatch.setattr(model, "forward_batch", fail)
    method = methods["wide", "frame"]
    clients = [Client(steps, method, prompt_of(30, seed=i), count=60) for i in range(2)]
    got = await gathered(*clients)
    monkeypatch.undo()
    assert len(failures) == 5
    for client, tokens in zip(clients, got, strict=True):
        assert tokens == alone(model, method, client.prompt, 60)
        plain = Client(steps, method, client.prompt, count=60)
        await plain.run()
        assert client.blocks.keys() == plain.blocks.keys()
        for number, block in client.blocks.items():
            assert block.frames == plain.blocks[number].frames


async def test_sealing_gives_way_to_passes(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    sequence = await steps.open(methods["wide", "fallback"], prompt_of(100))
    async for _ in steps.compute(sequence, BLOCK_TOKENS):
        pass
    assert len(await steps.seal(sequence, 0, 1)) == 1
    await steps.close(sequence)
    sealing, running = steps._sealer.submit(nice).result(SOON_S), await steps.call(nice)
    assert sealing - running == (min(SEAL_NICE, 19 - running) if sys.platform == "linux" else 0)


async def test_on_a_gpu_whose_memory_others_took_a_sequence_beside_the_pool_waits_for_it(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    class Gpu:
        free = 0

        def free_bytes(self) -> int | None:
            return self.free

    pooled, prompt = methods["wide", "pre"], prompt_of(100)
    method = replace(pooled, pipeline=Pipeline.of(H2O(heavy=0.5, recent=0.5)))
    gpu = Gpu()
    steps.pool.gpu = gpu  # type: ignore[assignment]
    first = await steps.open(method, prompt)  # nobody else is there to give it back
    third = await asyncio.wait_for(steps.open(pooled, prompt), SOON_S)
    waiting = asyncio.create_task(steps.open(method, prompt))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    gpu.free = 1 << 20
    second = await asyncio.wait_for(waiting, SOON_S)
    gpu.free = 0
    with pytest.raises(DeadlineError, match="waited for memory"):
        await steps.open(method, prompt, deadline_unix_s=time.time() + 0.2)
    for sequence in (first, second, third):
        await steps.close(sequence)
