"""The first token comes from the prefill node; the rest from a decode node, as if from one."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from kvstrata.engine import Model
from kvstrata.engine.sequence import RunningSequence
from kvstrata.engine.step_loop import StepLoop
from kvstrata.methods.framing import SealedBlock
from kvstrata.prefill_node import WorkerConfig
from kvstrata.protos.inference_pb2 import GenerateRequest
from tests.cluster.local_workers import Cluster, request_of, serving
from tests.prefill_node.nodes import Answer, prompt_of

LONG = prompt_of(420)  # six blocks and a rest: goes by a prefill node
WHOLE = prompt_of(384)  # six blocks
PRESETS = pytest.mark.parametrize("preset", ["balanced", "exact"])
SOON_S = 60.0


async def alone(config: WorkerConfig, model: Model, request: GenerateRequest) -> Answer:
    """Return what a decode node answers all by itself."""
    async with serving(config, model, config.store_address) as cluster:
        answer = await cluster.generate(request)
        assert cluster.workers.prefills == []
    return answer


@PRESETS
@pytest.mark.parametrize("prompt", [LONG, WHOLE], ids=["rest", "whole"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("dies", [False, True])
async def test_tokens_and_text_are_those_of_one_node_whether_the_prefill_node_dies_or_not(
    config: WorkerConfig,
    model: Model,
    cluster: Cluster,
    preset: str,
    prompt: Sequence[int],
    settings: dict[str, Any],
    dies: bool,
) -> None:
    request = request_of(prompt, preset=preset, max_tokens=12, **settings)
    wanted = await alone(config, model, request)
    cluster.workers.prefill_dies = dies
    answer = await cluster.generate(request)
    assert (answer.tokens, answer.text) == (wanted.tokens, wanted.text)
    assert answer.completion_tokens == 12
    assert [task.generated_ids for task in cluster.workers.decodes] == [tuple(wanted.tokens[:1])]
    assert answer.reasons == ({"prefill_worker_lost": 384} if dies else {})
    assert len(answer.cache.layer_bits) == model.spec.num_layers


@PRESETS
async def test_an_answer_of_one_token_is_complete_with_it(cluster: Cluster, preset: str) -> None:
    answer = await cluster.generate(request_of(LONG, preset=preset, max_tokens=1))
    assert (len(answer.tokens), answer.finish, answer.completion_tokens) == (1, "LENGTH", 1)
    # The decode node had nothing to do but to close; what is told is the prefill node's.
    assert (answer.cache.committed_blocks, answer.cache.bytes_fetched) == (6, 0)
    assert any(answer.cache.layer_bits)
    again = await cluster.generate(request_of(LONG, preset=preset))
    assert again.tokens[:1] == answer.tokens


async def test_a_stop_string_may_end_it_at_once(
    config: WorkerConfig, model: Model, cluster: Cluster
) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}
    for seed in range(40):  # a draw whose first token is a letter
        free = await alone(config, model, request_of(LONG, seed=seed, **settings))
        if free.text[0].isascii() and model.tokenizer.decode(free.tokens[:1]) == free.text[0]:
            break
    stopped = await cluster.generate(request_of(LONG, seed=seed, stop=[free.text[0]], **settings))
    assert (stopped.tokens, stopped.text, stopped.finish) == (free.tokens[:1], "", "STOP")


@PRESETS
async def test_a_client_that_leaves_after_the_first_token_frees_everything(
    cluster: Cluster, preset: str
) -> None:
    wanted = await cluster.generate(request_of(LONG, preset=preset))
    worker = cluster.workers._nodes.prefill._worker
    call = cluster.inference.Generate(request_of(prompt_of(420, 2), preset=preset, max_tokens=60))
    assert len((await call.read()).token_ids) == 1
    call.cancel()
    await cluster.idle()
    async with asyncio.timeout(SOON_S):
        while worker.steps.pool.arena.used_bytes:
            await asyncio.sleep(0.01)
    worker.steps.pool.check_integrity()
    assert (await cluster.generate(request_of(LONG, preset=preset))).tokens == wanted.tokens


async def test_a_lossless_first_token_waits_for_no_seal(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()
    seal = StepLoop.seal

    async def waiting(
        self: StepLoop, sequence: RunningSequence, first: int, last: int
    ) -> list[SealedBlock]:
        await go_on.wait()
        return await seal(self, sequence, first, last)

    monkeypatch.setattr(StepLoop, "seal", waiting)
    for prompt in (LONG, LONG[:200]):  # by a prefill node, and by a decode node alone
        go_on.clear()
        request = request_of(prompt, preset="exact", max_tokens=3)
        replies = aiter(cluster.inference.Generate(request))
        async with asyncio.timeout(SOON_S):
            assert len((await anext(replies)).token_ids) == 1
        go_on.set()
        assert sum([len(reply.token_ids) async for reply in replies]) == 2
