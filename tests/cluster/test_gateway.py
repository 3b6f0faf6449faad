"""The whole path of a request, and what becomes of it when something on the way fails."""

import asyncio
from collections.abc import AsyncGenerator

import grpc
import pytest

from kvstrata.cluster import admission
from kvstrata.cluster.gateway import MAX_REPLAYS
from kvstrata.cluster.gateway_server import start_gateway
from kvstrata.cluster.workers import WorkerLostError
from kvstrata.engine import Model
from kvstrata.engine.sequence import RunningSequence
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.redis_binary import free_port
from kvstrata.kvstore_service.testing import LocalStore, RedisServer
from kvstrata.methods.presets import PRESETS
from kvstrata.methods.skipdecode import SkipDecode
from kvstrata.prefill_node import Task, WorkerConfig
from kvstrata.protos import admin_pb2
from kvstrata.protos.errors import (
    CapacityError,
    ConfigurationError,
    DeadlineError,
    UnavailableError,
)
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.inference_pb2 import (
    ChatMessage,
    ChatMessages,
    GenerateReply,
    GenerateRequest,
    GetModelRequest,
    Sampling,
    SkipDecodeSettings,
)
from tests.cluster.local_workers import Cluster, error_of, has_details, request_of, serving
from tests.prefill_node.nodes import MAX_POSITIONS, VOCAB_SIZE, prompt_of

SHORT = prompt_of(200)  # three blocks: goes straight to a decode node
LONG = prompt_of(420)  # six blocks: goes by a prefill node
PRESET = pytest.mark.parametrize("preset", ["balanced", "exact"])


@PRESET
@pytest.mark.parametrize(("prompt", "blocks", "prefills"), [(SHORT, 3, 0), (LONG, 6, 1)])
async def test_the_second_request_is_served_from_the_store(
    cluster: Cluster, preset: str, prompt: tuple[int, ...], blocks: int, prefills: int
) -> None:
    cold = await cluster.generate(request_of(prompt, preset=preset))
    assert len(cluster.workers.prefills) == prefills
    warm = await cluster.generate(request_of(prompt, preset=preset))
    assert len(cluster.workers.prefills) == prefills
    assert warm.tokens == cold.tokens
    assert (cold.reasons, warm.reasons) == ({}, {})
    assert (cold.cache.cached_tokens, warm.cache.cached_tokens) == (0, blocks * 64)
    assert cold.cache.shareable_tokens == warm.cache.shareable_tokens == blocks * 64
    assert (cold.cache.committed_blocks, warm.cache.committed_blocks) == (blocks, 0)
    assert (cold.cache.tier, warm.cache.tier) == ("", "dram")
    assert warm.cache.bytes_fetched == cold.cache.bytes_published > 0
    nodes = {stage.node for stage in cold.cache.stages}
    assert nodes == ({"gateway", "prefill", "decode"} if prefills else {"gateway", "decode"})
    counters = await cluster.counters()
    assert counters["prompt_tokens_total",] == 2 * len(prompt)
    assert counters["cached_tokens_total",] == blocks * 64
    assert counters["requests_total", "ok"] == 2


async def test_a_shared_prefix_is_served_to_another_prompt(cluster: Cluster) -> None:
    await cluster.generate(request_of(SHORT))
    answer = await cluster.generate(request_of(SHORT[:150] + prompt_of(50, seed=2)))
    assert answer.cache.cached_tokens == 128
    assert answer.cache.committed_blocks == 1


@pytest.mark.parametrize("preset", ["", "balanced"])
async def test_text_and_chat_are_answered(cluster: Cluster, preset: str) -> None:
    sampling = Sampling(max_tokens=3, ignore_eos=True)
    text = await cluster.generate(
        GenerateRequest(text="Hello, \u4f60\u597d", preset=preset, sampling=sampling)
    )
    messages = ChatMessages(messages=[ChatMessage(role="user", content="Hello")])
    chat = await cluster.generate(GenerateRequest(messages=messages, sampling=sampling))
    assert (text.prompt_tokens, chat.prompt_tokens) == (13, len("user: Hello\n"))
    assert len(text.tokens) == len(chat.tokens) == 3


async def test_the_farthest_tier_of_all_nodes_is_told(config: WorkerConfig, model: Model) -> None:
    with RedisServer() as redis:
        async with (
            LocalStore(redis_url=redis.url) as store,
            serving(config, model, store.address) as cluster,
        ):
            await cluster.generate(request_of(LONG[:70]))
            await cluster.admin.Evict(admin_pb2.EvictRequest(tier="dram"))
            answer = await cluster.generate(request_of(LONG))
    # The prefill node brought the one cached block from Redis; the decode node found it in dram.
    assert len(cluster.workers.prefills) == 1
    assert (answer.cache.cached_tokens, answer.cache.tier) == (64, "redis")


async def test_the_longest_prompt_gets_one_token(cluster: Cluster) -> None:
    answer = await cluster.generate(request_of(prompt_of(MAX_POSITIONS - 1), max_tokens=100))
    assert (len(answer.tokens), answer.finish) == (1, "LENGTH")


async def test_the_model_is_told(cluster: Cluster, model: Model) -> None:
    reply = await cluster.inference.GetModel(GetModelRequest())
    assert (reply.name, reply.fingerprint) == (model.name, model.fingerprint)
    assert (reply.max_positions, reply.vocab_size) == (MAX_POSITIONS, VOCAB_SIZE)
    assert (list(reply.presets), reply.block_tokens) == (sorted(PRESETS), 64)


@pytest.mark.parametrize(
    ("dies_at", "temperature"), [(0, 0.0), (1, 1.0), (5, 1.0), (70, 0.0), (80, 1.0)]
)
async def test_no_token_is_lost_or_repeated_when_the_worker_dies(
    cluster: Cluster, dies_at: int, temperature: float
) -> None:
    request = request_of(SHORT, max_tokens=80, temperature=temperature, seed=3)
    whole = await cluster.generate(request)
    cluster.workers.dies_at = [dies_at]
    answer = await cluster.generate(request)
    assert (answer.tokens, answer.text) == (whole.tokens, whole.text)
    assert answer.completion_tokens == 80
    assert answer.cache.replays == 1
    assert answer.reasons == {"decode_worker_lost": dies_at}
    assert (await cluster.counters())["recomputes_total", "decode_worker_lost"] == 1


async def test_a_drawn_seed_is_kept_over_a_replay(cluster: Cluster) -> None:
    cluster.workers.dies_at = [4]
    answer = await cluster.generate(request_of(SHORT, max_tokens=12, temperature=2.0))
    first, second = cluster.workers.decodes
    assert first.sampling == second.sampling
    assert first.sampling.seed is not None
    assert second.generated_ids == tuple(answer.tokens[:4])


async def test_workers_that_die_again_and_again_lose_no_token_either(cluster: Cluster) -> None:
    whole = await cluster.generate(request_of(SHORT, max_tokens=20))
    cluster.workers.dies_at = [3, 0, 2, 1]
    answer = await cluster.generate(request_of(SHORT, max_tokens=20))
    assert answer.tokens == whole.tokens
    assert answer.cache.replays == 4
    assert (await cluster.counters())["recomputes_total", "decode_worker_lost"] == 4


async def test_a_request_that_kills_every_worker_is_given_up(cluster: Cluster) -> None:
    cluster.workers.dies_at = [0] * (MAX_REPLAYS + 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_of(SHORT))
    assert isinstance(error_of(caught.value), UnavailableError)
    assert len(cluster.workers.decodes) == MAX_REPLAYS + 1
    assert (await cluster.counters())["requests_total", "UnavailableError"] == 1
    assert (await cluster.generate(request_of(SHORT))).finish == "LENGTH"


@pytest.mark.parametrize(
    "error", [WorkerLostError("died"), UnavailableError("no node", "start one")]
)
async def test_the_decode_node_computes_when_the_prefill_node_is_lost(
    cluster: Cluster, error: Exception
) -> None:
    cluster.workers.prefill_error = error
    answer = await cluster.generate(request_of(LONG))
    assert answer.reasons == {"prefill_worker_lost": 384}
    assert answer.cache.committed_blocks == 6
    assert (await cluster.counters())["recomputes_total", "prefill_worker_lost"] == 1
    cluster.workers.prefill_error = None
    warm = await cluster.generate(request_of(LONG))
    assert (warm.tokens, warm.cache.cached_tokens) == (answer.tokens, 384)


async def test_a_client_that_leaves_frees_the_gateway_and_the_node(cluster: Cluster) -> None:
    cluster.workers.pause_s = 0.01
    call = cluster.inference.Generate(request_of(SHORT, max_tokens=300))
    await call.read()
    assert cluster.server.gateway.num_running == 1
    assert cluster.workers.num_open == 1
    call.cancel()
    await cluster.idle()
    assert (await cluster.counters())["requests_total", "cancelled"] == 1
    assert (await cluster.generate(request_of(SHORT))).finish == "LENGTH"


async def test_the_callers_time_limit_ends_the_work(cluster: Cluster) -> None:
    cluster.workers.pause_s = 0.02
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_of(SHORT, max_tokens=300), timeout=0.4)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await cluster.idle()


async def test_the_servers_own_time_limit_is_told_as_such(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_DEADLINE_S", 0.3)
    cluster.workers.pause_s = 0.02
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_of(SHORT, max_tokens=300))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert has_details(caught.value)
    error = error_of(caught.value)
    assert isinstance(error, DeadlineError)
    assert error.remedy
    assert (await cluster.counters())["requests_total", "DeadlineError"] == 1


async def test_no_replay_begins_after_the_deadline(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_DEADLINE_S", 0.2)
    cluster.workers.pause_s = 0.25
    cluster.workers.dies_at = [1]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_of(SHORT))
    assert isinstance(error_of(caught.value), DeadlineError)
    assert len(cluster.workers.decodes) == 1


async def test_a_defect_of_the_prefill_node_costs_only_time(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    whole = await cluster.generate(request_of(LONG, preset="exact"))
    cluster.workers.prefill_error = RuntimeError("secret")
    answer = await cluster.generate(request_of(LONG))
    assert answer.reasons == {"prefill_failed": 384}
    assert len(answer.tokens) == len(whole.tokens)
    assert "secret" in caplog.text


async def test_a_defect_of_the_decode_node_is_told_as_ours_without_its_text(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("kvstrata.prefill_node.answer.sample", fail)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_of(SHORT))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text


async def test_too_much_at_once_is_refused_with_a_remedy(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.cluster.gateway.MAX_RUNNING_BYTES", 1)
    cluster.workers.pause_s = 0.01
    running = cluster.inference.Generate(request_of(SHORT, max_tokens=100))
    await running.read()  # one request alone always fits
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request_of(SHORT))
    assert isinstance(error_of(caught.value), CapacityError)
    running.cancel()
    await cluster.idle()
    assert (await cluster.generate(request_of(SHORT))).finish == "LENGTH"


async def test_a_worker_that_dies_after_its_closing_reply_changes_nothing(
    cluster: Cluster,
) -> None:
    whole = await cluster.generate(request_of(SHORT, max_tokens=20))
    cluster.workers.dies_at = [21]
    answer = await cluster.generate(request_of(SHORT, max_tokens=20))
    assert (answer.tokens, answer.cache.replays) == (whole.tokens, 0)


async def test_without_a_store_tokens_come_and_the_reason_is_told(
    config: WorkerConfig, model: Model, cluster: Cluster
) -> None:
    expected = await cluster.generate(request_of(LONG))
    async with serving(config, model, f"127.0.0.1:{free_port()}") as alone:
        answer = await alone.generate(request_of(LONG))
        assert (answer.tokens, answer.cache.cached_tokens) == (expected.tokens, 0)
        assert answer.reasons == {"store_unavailable": 0, "unpublished_store_unavailable": 0}
        assert alone.workers.prefills == []
        assert (await alone.counters())["recomputes_total", "store_unavailable"] == 1


async def test_a_generated_block_that_was_not_stored_takes_nothing_from_what_was_cached(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("values are not finite")

    await cluster.generate(request_of(SHORT))
    monkeypatch.setattr("kvstrata.methods.fallback.encode_blocks", refuse)
    answer = await cluster.generate(request_of(SHORT, max_tokens=70))
    assert answer.reasons == {"unencodable": 64}
    assert answer.cache.cached_tokens == 192


@pytest.mark.parametrize(
    ("preset", "recomputed", "cached"), [("exact", 192, 64), ("balanced", 384, 0)]
)
async def test_a_lost_block_costs_those_behind_it_and_a_lossy_prefix_as_a_whole(
    cluster: Cluster,
    store: LocalStore,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    recomputed: int,
    cached: int,
) -> None:
    await cluster.generate(request_of(LONG[:100], preset=preset))
    prefill = cluster.workers.prefill

    async def prefill_then_lose(task: Task) -> AsyncGenerator[GenerateReply]:
        async for reply in prefill(task):
            yield reply
        sequence = RunningSequence(model, task.method, task.prompt_ids, salt=task.salt)
        async with StoreClient(store.address) as client:
            keys = [BlockKey(sequence.scope, h) for h in sequence.hashes[3:]]
            assert await client.delete(keys) == 3

    monkeypatch.setattr(cluster.workers, "prefill", prefill_then_lose)
    answer = await cluster.generate(request_of(LONG, preset=preset))
    assert answer.reasons == {"absent": recomputed}
    assert answer.cache.cached_tokens == cached


async def test_requests_at_the_same_time_get_their_own_tokens(cluster: Cluster) -> None:
    prompts = [prompt_of(100, seed) for seed in range(5)]
    alone = [(await cluster.generate(request_of(p))).tokens for p in prompts]
    together = await asyncio.gather(*(cluster.generate(request_of(p)) for p in prompts * 2))
    assert [answer.tokens for answer in together] == alone * 2
    assert all(answer.cache.cached_tokens == 64 for answer in together)


async def test_an_occupied_port_is_told_with_a_remedy(
    config: WorkerConfig, model: Model, cluster: Cluster, store: LocalStore
) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen") as caught:
        async with serving(config, model, store.address, listen=cluster.server.address):
            pass
    assert "free port" in caught.value.remedy


async def test_a_foreign_address_is_told_with_a_remedy(cluster: Cluster, store: LocalStore) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen"):
        await start_gateway(
            "203.0.113.1:5",
            store_address=store.address,
            workers=cluster.workers,
            info=cluster.server.gateway._admission.info,
            tokenizer=None,
        )


async def test_a_request_may_skip_layers_and_the_next_one_need_not(cluster: Cluster) -> None:
    schedule = SkipDecodeSettings(max_layers=3, min_layers=2, decay_tokens=6)
    request = request_of(SHORT, max_tokens=12)
    dense = await cluster.generate(request)
    request.settings.skipdecode.CopyFrom(schedule)
    skipped = [await cluster.generate(request) for _ in range(2)]
    assert skipped[0].tokens == skipped[1].tokens != dense.tokens
    assert skipped[0].cache.cached_tokens == 192  # blocks of prompts are everybody's
    ran = SkipDecode(3, 2, 6).executions(11)
    assert [answer.cache.layer_executions for answer in skipped] == [ran, ran]
    assert dense.cache.layer_executions == 0
    assert (await cluster.generate(request_of(SHORT, max_tokens=12))).tokens == dense.tokens
    counters = await cluster.counters()
    assert counters["layer_executions_total",] == 2 * ran
