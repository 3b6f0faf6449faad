"""The decode node with a real store: the same tokens whatever the store does."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import pytest
import redis
import torch

from kvstrata.decode_node import DecodeNode
from kvstrata.engine import Model
from kvstrata.engine.batch import Span
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.redis_binary import free_port
from kvstrata.kvstore_service.redis_tier import value_key
from kvstrata.kvstore_service.testing import LocalStore, RedisServer
from kvstrata.methods.presets import Method
from kvstrata.prefill_node import WorkerConfig
from kvstrata.protos import admin_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.errors import DeadlineError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.inference_pb2 import GenerateReply
from tests.prefill_node.nodes import (
    BALANCED,
    EXACT,
    MAX_POSITIONS,
    decoded,
    names_of,
    prefilled,
    prompt_of,
    running,
    stored_blocks,
    task_of,
)

METHODS = pytest.mark.parametrize("method", [BALANCED, EXACT], ids=["balanced", "exact"])
COARSE = Method(BALANCED.codec, finest=Stratum.STRATUM_BASE)
PROMPT = prompt_of(200)  # three shared blocks and a rest


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """A listener that accepts connections and never says a word."""
    ended = asyncio.Event()

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ended.wait()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        ended.set()
        server.close()
        await server.wait_closed()


async def evict(address: str, tier: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
        reply = await stub.Evict(admin_pb2.EvictRequest(tier=tier))
        return int(reply.evicted)


async def storeless(config: WorkerConfig, *args: Any, **kwargs: Any) -> list[int]:
    """Return the tokens that a node gives for this task when there is no store."""
    async with running(config) as nodes:
        return (await decoded(nodes.decode, task_of(*args, **kwargs))).tokens


@METHODS
async def test_tokens_are_the_same_with_and_without_a_store(
    config: WorkerConfig, method: Method
) -> None:
    tokens = await storeless(config, PROMPT, method, max_tokens=24)
    async with LocalStore() as store, running(config, store.address) as nodes:
        await prefilled(nodes.prefill, task_of(PROMPT, method))
        warm = await decoded(
            nodes.decode, task_of(PROMPT, method, expected_blocks=3, max_tokens=24)
        )
    assert warm.tokens == tokens
    assert warm.reasons == {}
    assert (warm.finish, warm.prompt_tokens, warm.completion_tokens) == ("LENGTH", 200, 24)
    cache = warm.cache
    assert (cache.prompt_tokens, cache.shareable_tokens) == (200, 192)
    assert (cache.tier, cache.bytes_published, cache.committed_blocks) == ("dram", 0, 0)
    assert cache.bytes_fetched > 0
    assert cache.codec == f"{method.codec.name}/{method.codec.version}"
    assert cache.precision == ("exact" if method is EXACT else "base+mid")
    assert [s.stage for s in cache.stages] == ["fetch", "decompress", "tail", "decode"]


@METHODS
async def test_nothing_of_a_stored_prompt_that_is_all_blocks_is_computed(
    config: WorkerConfig, method: Method
) -> None:
    prompt = prompt_of(192)
    tokens = await storeless(config, prompt, method, max_tokens=70)
    async with LocalStore() as store, running(config, store.address) as nodes:
        await prefilled(nodes.prefill, task_of(prompt, method))
        task = task_of(prompt, method, expected_blocks=3, max_tokens=70)
        warm = await decoded(nodes.decode, task)
        assert nodes.decode._worker.steps.counts.get("prompt_tokens") == 0
        assert (warm.tokens, warm.reasons, warm.cache.shareable_tokens) == (tokens, {}, 192)
        assert warm.cache.committed_blocks == 1  # that of what was generated
        replay = task_of(prompt, method, expected_blocks=4, generated=tokens[:64], max_tokens=70)
        assert (await decoded(nodes.decode, replay)).tokens == tokens[64:]
        assert nodes.decode._worker.steps.counts.get("prompt_tokens") == 0


async def test_a_cold_decode_publishes_what_it_computed(config: WorkerConfig, model: Model) -> None:
    async with LocalStore() as store, running(config, store.address) as nodes:
        cold = await decoded(nodes.decode, task_of(PROMPT))
        assert cold.cache.committed_blocks == 3
        assert cold.cache.bytes_published > 0
        assert cold.reasons == {}
        assert await stored_blocks(store.address, model, PROMPT) == 3
        warm = await decoded(nodes.decode, task_of(PROMPT, expected_blocks=3))
    assert warm.tokens == cold.tokens
    assert warm.cache.bytes_fetched == cold.cache.bytes_published


@pytest.mark.parametrize(("expected", "counted"), [(0, {}), (2, {"store_unavailable": 128})])
async def test_a_store_that_is_gone_counts_only_what_was_expected_of_it(
    config: WorkerConfig, expected: int, counted: dict[str, int]
) -> None:
    async with running(config, f"127.0.0.1:{free_port()}") as nodes:
        answer = await decoded(nodes.decode, task_of(PROMPT, expected_blocks=expected))
    assert len(answer.tokens) == 8
    assert answer.reasons == counted | {"unpublished_store_unavailable": 0}


async def test_a_store_that_hangs_delays_by_its_time_limit_only(config: WorkerConfig) -> None:
    tokens = await storeless(config, PROMPT)
    async with silent_server() as address:
        hasty = dataclasses.replace(config, store_timeout_s=0.4)
        async with running(hasty, address) as nodes:
            begin = time.monotonic()
            answer = await decoded(nodes.decode, task_of(PROMPT, expected_blocks=3))
            assert time.monotonic() - begin < 6.0
    assert answer.tokens == tokens
    assert answer.reasons == {"store_timeout": 192, "unpublished_store_timeout": 0}


@METHODS
async def test_a_byte_that_flipped_in_redis_is_seen_and_recomputed(
    config: WorkerConfig, model: Model, redis_server: RedisServer, method: Method
) -> None:
    tokens = await storeless(config, PROMPT, method)
    scope, hashes = names_of(model, PROMPT, method)
    name = value_key(BlockKey(scope, hashes[0]), method.wanted[-1])
    async with (
        LocalStore(redis_url=redis_server.url) as store,
        running(config, store.address) as nodes,
    ):
        await prefilled(nodes.prefill, task_of(PROMPT, method))
        assert await evict(store.address, "dram") == 3
        with redis.Redis(port=redis_server.port) as connection:
            last = connection.strlen(name) - 1
            byte = connection.getrange(name, last, last)
            connection.setrange(name, last, bytes([byte[0] ^ 1]))
        answer = await decoded(nodes.decode, task_of(PROMPT, method, expected_blocks=3))
        assert answer.tokens == tokens
        assert answer.reasons == {"corrupt": 192}
        healed = await decoded(nodes.decode, task_of(PROMPT, method, expected_blocks=3))
        assert (healed.tokens, healed.reasons) == (tokens, {})


async def test_blocks_come_from_redis_when_dram_forgot_them(
    config: WorkerConfig, redis_server: RedisServer
) -> None:
    prompt = prompt_of(150, seed=7)
    tokens = await storeless(config, prompt)
    async with (
        LocalStore(redis_url=redis_server.url) as store,
        running(config, store.address) as nodes,
    ):
        await prefilled(nodes.prefill, task_of(prompt))
        await evict(store.address, "dram")
        answer = await decoded(nodes.decode, task_of(prompt, expected_blocks=2))
    assert (answer.tokens, answer.reasons, answer.cache.tier) == (tokens, {}, "redis")


async def test_blocks_evicted_after_the_lookup_are_counted_as_such(
    config: WorkerConfig,
) -> None:
    tokens = await storeless(config, PROMPT)
    async with LocalStore() as store, running(config, store.address) as nodes:
        await prefilled(nodes.prefill, task_of(PROMPT))
        assert await evict(store.address) == 3
        answer = await decoded(nodes.decode, task_of(PROMPT, expected_blocks=3))
    assert answer.tokens == tokens
    assert answer.reasons == {"evicted": 192}


@pytest.mark.parametrize("length", [30, 200])
async def test_a_deadline_in_the_past_gives_no_token(config: WorkerConfig, length: int) -> None:
    async with running(config) as nodes:
        with pytest.raises(DeadlineError):
            await decoded(nodes.decode, task_of(prompt_of(length), timeout_s=-1.0))


async def test_a_deadline_ends_a_generation_that_runs(
    config: WorkerConfig, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward_batch

    def slow(spans: Sequence[Span]) -> torch.Tensor:
        time.sleep(0.3)
        return forward(spans)

    monkeypatch.setattr(model, "forward_batch", slow)
    async with running(config) as nodes:
        task = task_of(prompt_of(30), max_tokens=400, timeout_s=3)
        tokens: list[int] = []

        async def collect() -> None:
            async for reply in nodes.decode.generate(task):
                tokens.extend(GenerateReply.FromString(reply).token_ids)

        with pytest.raises(DeadlineError):
            await collect()
    assert 0 < len(tokens) <= 10


async def test_closing_early_stops_publishing_and_the_next_request_works(
    config: WorkerConfig,
) -> None:
    tokens = await storeless(config, PROMPT)
    before = asyncio.all_tasks()
    async with silent_server() as address, running(config, address) as nodes:
        nodes.decode._worker.config = dataclasses.replace(config, store_timeout_s=0.4)
        nodes.decode._worker._store = StoreClient(address, timeout_s=0.4)
        replies = nodes.decode.generate(task_of(PROMPT, max_tokens=300))
        first = GenerateReply.FromString(await anext(replies))
        assert list(first.token_ids) == tokens[:1]
        assert asyncio.all_tasks() - before
        await replies.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        publishing = [t for t in asyncio.all_tasks() - before if "publish" in repr(t.get_coro())]
        assert publishing == []
        again = await decoded(nodes.decode, task_of(PROMPT))
    assert again.tokens == tokens


async def test_cancelling_the_reader_leaves_a_node_that_works(config: WorkerConfig) -> None:
    tokens = await storeless(config, PROMPT)
    async with LocalStore() as store, running(config, store.address) as nodes:
        reading = asyncio.create_task(decoded(nodes.decode, task_of(PROMPT, max_tokens=300)))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        again = await decoded(nodes.decode, task_of(PROMPT))
    assert again.tokens == tokens


@METHODS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_resumed_generation_goes_on_exactly(
    config: WorkerConfig, method: Method, temperature: float
) -> None:
    settings: dict[str, Any] = {"max_tokens": 70, "temperature": temperature, "seed": 5}
    async with LocalStore() as store, running(config, store.address) as nodes:
        whole = await decoded(nodes.decode, task_of(PROMPT, method, **settings))
        texts = [""]
        async for reply in nodes.decode.generate(task_of(PROMPT, method, **settings)):
            texts.append(texts[-1] + GenerateReply.FromString(reply).text)
        for count in (1, 66):
            rest = await decoded(
                nodes.decode, task_of(PROMPT, method, generated=whole.tokens[:count], **settings)
            )
            assert rest.tokens == whole.tokens[count:]
            assert texts[count] + rest.text == whole.text
            assert (rest.completion_tokens, rest.prompt_tokens) == (70, 200)
    other = await storeless(config, PROMPT, method, generated=tuple(whole.tokens[:40]), **settings)
    assert other == whole.tokens[40:]


async def test_resuming_what_was_complete_gives_the_closing_reply_alone(
    config: WorkerConfig,
) -> None:
    async with running(config) as nodes:
        whole = await decoded(nodes.decode, task_of(PROMPT))
        rest = await decoded(nodes.decode, task_of(PROMPT, generated=whole.tokens))
    assert (rest.tokens, rest.text, rest.finish) == ([], "", "LENGTH")
    assert rest.completion_tokens == 8


def printable_place(text: str) -> int:
    return next(i for i in range(4, len(text) - 4) if text[i : i + 2].isascii())


async def test_a_stop_string_ends_the_text_before_it(config: WorkerConfig) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 60}
    async with running(config) as nodes:
        free = await decoded(nodes.decode, task_of(PROMPT, **settings))
        stop = free.text[(at := printable_place(free.text)) : at + 2]
        answer = await decoded(nodes.decode, task_of(PROMPT, stop=("never", stop), **settings))
        resumed = await decoded(
            nodes.decode, task_of(PROMPT, stop=(stop,), generated=answer.tokens, **settings)
        )
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish == "STOP"
    assert answer.tokens == free.tokens[: len(answer.tokens)]
    assert (resumed.tokens, resumed.text, resumed.finish) == ([], "", "STOP")


async def test_an_end_of_sequence_token_ends_unless_ignored(
    config: WorkerConfig, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 10}
    async with running(config) as nodes:
        free = await decoded(nodes.decode, task_of(PROMPT, **settings))
        place = next(i for i in range(2, 10) if free.tokens[i] not in free.tokens[:i])
        ends = dataclasses.replace(model.spec, eos_token_ids=frozenset({free.tokens[place]}))
        monkeypatch.setattr(model, "spec", ends)
        ended = await decoded(nodes.decode, task_of(PROMPT, ignore_eos=False, **settings))
        ignored = await decoded(nodes.decode, task_of(PROMPT, **settings))
    assert (ended.tokens, ended.finish) == (free.tokens[: place + 1], "STOP")
    assert (ignored.tokens, ignored.finish) == (free.tokens, "LENGTH")


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
async def test_no_more_tokens_come_than_asked_for(config: WorkerConfig, max_tokens: int) -> None:
    async with running(config) as nodes:
        answer = await decoded(nodes.decode, task_of(prompt_of(20), max_tokens=max_tokens))
    assert (len(answer.tokens), answer.finish) == (max_tokens, "LENGTH")


@pytest.mark.parametrize("length", [MAX_POSITIONS - 1, MAX_POSITIONS - 5])
async def test_the_end_of_the_context_ends_a_generation(config: WorkerConfig, length: int) -> None:
    async with LocalStore() as store, running(config, store.address) as nodes:
        answer = await decoded(nodes.decode, task_of(prompt_of(length), max_tokens=1000))
    assert len(answer.tokens) == MAX_POSITIONS - length
    assert answer.finish == "LENGTH"


@METHODS
async def test_the_next_turn_finds_the_blocks_that_filled_in_this_one(
    config: WorkerConfig, model: Model, method: Method
) -> None:
    prompt = prompt_of(60)
    async with LocalStore() as store, running(config, store.address) as nodes:
        answer = await decoded(nodes.decode, task_of(prompt, method, max_tokens=80))
        assert answer.cache.committed_blocks == 2
        turn = (*prompt, *answer.tokens, *prompt_of(20, seed=9))
        assert await stored_blocks(store.address, model, turn, method) == 2
        following = await decoded(nodes.decode, task_of(turn, method, expected_blocks=2))
        assert following.reasons == {}
        assert following.cache.bytes_fetched == answer.cache.bytes_published


async def test_nothing_is_committed_on_top_of_a_coarse_read(
    config: WorkerConfig, model: Model
) -> None:
    async with LocalStore() as store, running(config, store.address) as nodes:
        cold = await decoded(nodes.decode, task_of(PROMPT, COARSE, max_tokens=80))
        assert store.running.store.counters.get("puts_total") == 0
        assert cold.cache.committed_blocks == 0
        assert cold.cache.precision == "base"
        await prefilled(nodes.prefill, task_of(PROMPT))
        warm = await decoded(
            nodes.decode, task_of(PROMPT, COARSE, expected_blocks=3, max_tokens=80)
        )
        assert store.running.store.counters.get("puts_total") == 3
    assert warm.tokens == cold.tokens
    assert warm.reasons == {}
    assert warm.cache.bytes_fetched > 0


async def test_values_beyond_the_codec_are_told_and_the_tokens_still_come(
    config: WorkerConfig, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("values are not finite")

    monkeypatch.setattr("kvstrata.methods.fallback.encode_blocks", refuse)
    async with LocalStore() as store, running(config, store.address) as nodes:
        answer = await decoded(nodes.decode, task_of(PROMPT, max_tokens=70))
        assert answer.reasons == {"unencodable": 256}
        assert len(answer.tokens) == 70
        assert store.running.store.counters.get("puts_total") == 0


@METHODS
async def test_requests_at_the_same_time_get_their_own_tokens(
    config: WorkerConfig, method: Method
) -> None:
    prompts = [prompt_of(100, seed) for seed in range(4)]
    alone = [await storeless(config, prompt, method) for prompt in prompts]
    async with LocalStore() as store, running(config, store.address) as nodes:
        answers = await asyncio.gather(
            *(decoded(nodes.decode, task_of(prompt, method)) for prompt in prompts)
        )
    assert [answer.tokens for answer in answers] == alone


async def test_info_is_that_of_the_prefill_node(config: WorkerConfig) -> None:
    async with running(config) as nodes:
        assert await DecodeNode.info(nodes.decode) == await nodes.prefill.info()
