"""SkipDecode in the step loop: fewer layers, the same tokens in any company (S4 to S8)."""

import asyncio

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.new_sequence import new_sequence
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.engine.sequence import RunningSequence
from kvstrata.engine.skipping_sequence import SkippingSequence
from kvstrata.engine.step_loop import StepLoop
from kvstrata.methods.presets import Method
from kvstrata.methods.skipdecode import SkipDecode
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.engine.test_paged_cache import KINDS, POOL_BYTES, methods, wide
from tests.engine.test_sequence import greedy, one_thread, prompt_of, tail
from tests.engine.test_step_loop import Client, gathered, model, small, steps

__all__ = ["methods", "model", "one_thread", "steps", "wide"]
COUNT = 40
SCHEDULE = SkipDecode(max_layers=3, min_layers=2, decay_tokens=12)
ALL_LAYERS = SkipDecode(3, 3)


def skipping(method: Method, schedule: SkipDecode = SCHEDULE) -> Method:
    return Method(method.codec, skip=schedule)


def started(
    model: Model, method: Method, prompt: list[int], pool: KVPool | None = None
) -> RunningSequence:
    """Return a sequence whose full blocks were computed, sealed and settled."""
    sequence = new_sequence(model, method, prompt, pool=pool)
    num_blocks = (len(prompt) - 1) // BLOCK_TOKENS
    for _ in sequence.compute(num_blocks * BLOCK_TOKENS):
        pass
    if num_blocks:
        sequence.settle(sequence.seal(0, num_blocks))
    return sequence


def alone(model: Model, method: Method, prompt: list[int], count: int = COUNT) -> list[int]:
    sequence = started(model, method, prompt)
    return greedy(sequence, tail(sequence), count)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pooled_sequence_skips_as_a_plain_one_does(
    model: Model, methods: dict[tuple[str, str], Method], kind: str
) -> None:
    method, prompt = skipping(methods["wide", kind]), prompt_of(120)
    pool = KVPool(model, POOL_BYTES)
    sequence = started(model, method, prompt, pool)
    assert isinstance(sequence, SkippingSequence)
    tokens, _, sealed = greedy(sequence, tail(sequence), COUNT)
    assert tokens == alone(model, method, prompt)
    assert sealed == []  # what layers lack is no block
    assert sequence.committable
    assert sequence.layer_executions == SCHEDULE.executions(COUNT)
    assert isinstance(sequence.cache, PagedCache)
    cached = pool.rows.lengths[sequence.cache.slot, :, 0] + sequence.cache.base
    assert (cached - 120).tolist() == list(SCHEDULE.num_cached(COUNT, 3))
    sequence.cache.close()
    pool.check_integrity()


@pytest.mark.parametrize("length", [64, 65, 128])
def test_a_prompts_last_block_is_stored_and_none_after_it(
    model: Model, methods: dict[tuple[str, str], Method], length: int
) -> None:
    method, prompt = skipping(methods["wide", "frame"]), prompt_of(length)
    sequence = started(model, method, prompt, KVPool(model, POOL_BYTES))
    _, sealed = sequence.extend(prompt[sequence.cache.length :])
    assert len(sealed) == (length % BLOCK_TOKENS == 0)
    assert greedy(sequence, torch.zeros(model.spec.vocab_size), 70)[2] == []


def test_all_layers_for_all_tokens_is_the_dense_model(
    model: Model, methods: dict[tuple[str, str], Method]
) -> None:
    method, prompt = methods["wide", "exact"], prompt_of(100)
    dense = started(model, method, prompt)
    skipped = started(model, skipping(method, ALL_LAYERS), prompt)
    assert greedy(skipped, tail(skipped), 20)[0] == greedy(dense, tail(dense), 20)[0]
    assert skipped.layer_executions == 3 * 20


async def test_any_company_gives_the_tokens_of_a_request_alone(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    """Schedules, places and codecs differ; some skip nothing."""
    prompts = [prompt_of(40 + 29 * i, seed=i) for i in range(6)]
    schedules = [SCHEDULE, None, SkipDecode(2, 2), SCHEDULE, ALL_LAYERS, SkipDecode(3, 2, 40)]
    kinds = [*KINDS, *KINDS]
    clients = []
    for i, (prompt, schedule) in enumerate(zip(prompts, schedules, strict=True)):
        method = Method(methods["wide", kinds[i]].codec, skip=schedule)
        clients.append(Client(steps, method, prompt, count=20 + 5 * i))
    wanted = [alone(model, c.method, c.prompt, c.count) for c in clients]
    assert await gathered(*clients) == wanted
    assert steps.counts.get("failed_passes") == steps.counts.get("parked") == 0


async def test_equal_requests_together_are_each_alone(
    model: Model, methods: dict[tuple[str, str], Method], steps: StepLoop
) -> None:
    method, prompt = skipping(methods["wide", "pre"]), prompt_of(90)
    clients = [Client(steps, method, prompt, count=COUNT) for _ in range(2)]
    wanted = alone(model, method, prompt)
    assert await gathered(*clients) == [wanted, wanted]


@pytest.mark.parametrize("kind", ["exact", "frame"])
async def test_parked_ones_run_what_they_had_by_the_same_schedule(
    model: Model, methods: dict[tuple[str, str], Method], kind: str
) -> None:
    method = skipping(methods["wide", kind])
    prompts = [prompt_of(60, seed=i) for i in range(3)]
    wanted = [alone(model, method, prompt, 110) for prompt in prompts]
    steps = StepLoop(model, small(model, 400))
    clients = [Client(steps, method, prompt, count=110) for prompt in prompts]
    try:
        assert await gathered(*clients) == wanted
    finally:
        await asyncio.to_thread(steps.stop)
    assert steps.counts.get("parked") > 0
    assert steps.pool.arena.used_bytes == 0
