"""The prefill node with a real store: what it publishes, and what it says when it cannot."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

import kvstrata.prefill_node as room
from kvstrata.engine import Model
from kvstrata.kvstore_service.redis_binary import free_port
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import Method
from kvstrata.prefill_node import PrefillNode, WorkerConfig
from kvstrata.prefill_node.prefill import num_prompt_blocks
from kvstrata.protos.errors import DeadlineError
from kvstrata.protos.frame_pb2 import Stratum
from tests.prefill_node.nodes import (
    BALANCED,
    EXACT,
    MAX_POSITIONS,
    VOCAB_SIZE,
    decoded,
    first_token,
    names_of,
    prefilled,
    prompt_of,
    reasons_of,
    running,
    stored_blocks,
    task_of,
)


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks"),
    [(0, 0), (1, 0), (63, 0), (64, 1), (65, 1), (128, 2), (129, 2), (9_984, 156)],
)
def test_every_full_block_is_shared_but_under_stages_none_with_the_last_token(
    num_tokens: int, num_blocks: int
) -> None:
    assert num_prompt_blocks(num_tokens, BALANCED) == num_blocks
    staged = replace(BALANCED, pipeline=Pipeline.of(H2O()))
    ends = num_tokens > 0 and num_tokens % 64 == 0
    assert num_prompt_blocks(num_tokens, staged) == num_blocks - ends


@pytest.mark.parametrize("length", [1, 64, 65, 128, 129, 300])
async def test_every_full_block_is_published(
    config: WorkerConfig, model: Model, length: int
) -> None:
    prompt, expected = prompt_of(length), length // 64
    async with LocalStore() as store, running(config, store.address) as nodes:
        report = await prefilled(nodes.prefill, task_of(prompt))
        assert report.committed_blocks == expected
        assert (report.bytes_published > 0) == (expected > 0)
        assert reasons_of(report) == {}
        assert await stored_blocks(store.address, model, prompt) == expected


@pytest.mark.parametrize("method", [BALANCED, EXACT])
async def test_publishing_again_finds_the_blocks_there(
    config: WorkerConfig, model: Model, method: Method
) -> None:
    prompt = prompt_of(200)
    async with LocalStore() as store, running(config, store.address) as nodes:
        first = await prefilled(nodes.prefill, task_of(prompt, method))
        again = await prefilled(nodes.prefill, task_of(prompt, method))
        cached = await prefilled(nodes.prefill, task_of(prompt, method, expected_blocks=3))
        counters = store.running.store.counters
        assert counters.get("puts_total", outcome="committed") == 3
        assert counters.get("opened_blocks_total", state="exists") == 3
    assert again.coalesced_tokens == 192
    assert first.committed_blocks == again.committed_blocks == 3
    assert (cached.committed_blocks, cached.bytes_published) == (0, 0)
    assert cached.bytes_fetched > 0
    assert cached.tier == "dram"
    assert [s.stage for s in cached.stages] == ["fetch", "decompress", "tail"]
    assert {s.node for s in cached.stages} == {"prefill"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length", [192, 200])
@pytest.mark.parametrize("method", [BALANCED, EXACT])
async def test_the_first_token_is_the_one_that_a_decode_node_draws(
    config: WorkerConfig, method: Method, length: int, temperature: float
) -> None:
    task = task_of(prompt_of(length), method, temperature=temperature, seed=5)
    async with running(config) as nodes:
        alone = await decoded(nodes.decode, task)
    async with LocalStore() as store, running(config, store.address) as nodes:
        for _ in ("computed", "attached"):
            (reply,), report = await first_token(nodes.prefill, task)
            assert list(reply.token_ids) == alone.tokens[:1]
            assert alone.text.startswith(reply.text)
            assert reasons_of(report) == {}
        again = replace(task, generated_ids=tuple(alone.tokens[:1]))
        assert (await first_token(nodes.prefill, again))[0] == []


async def test_under_stages_the_first_token_is_left_to_the_decode_node(
    config: WorkerConfig,
) -> None:
    method = replace(EXACT, pipeline=Pipeline.of(H2O()))
    async with LocalStore() as store, running(config, store.address) as nodes:
        replies, report = await first_token(nodes.prefill, task_of(prompt_of(192), method))
    assert (replies, report.committed_blocks) == ([], 2)


async def test_only_the_uncached_suffix_is_computed(config: WorkerConfig, model: Model) -> None:
    prompt = prompt_of(300)
    async with LocalStore() as store, running(config, store.address) as nodes:
        await prefilled(nodes.prefill, task_of(prompt[:150]))
        report = await prefilled(nodes.prefill, task_of(prompt, expected_blocks=2))
        assert report.committed_blocks == 2
        assert reasons_of(report) == {}
        assert await stored_blocks(store.address, model, prompt) == 4


async def test_a_block_that_is_gone_is_counted_and_computed(
    config: WorkerConfig, model: Model
) -> None:
    prompt = prompt_of(200)
    async with LocalStore() as store, running(config, store.address) as nodes:
        report = await prefilled(nodes.prefill, task_of(prompt, expected_blocks=2))
        assert reasons_of(report) == {"absent": 128}
        assert report.committed_blocks == 3


async def test_tenants_share_no_block(config: WorkerConfig, model: Model) -> None:
    prompt = prompt_of(100)
    async with LocalStore() as store, running(config, store.address) as nodes:
        await prefilled(nodes.prefill, replace(task_of(prompt), salt=b"another"))
        assert await stored_blocks(store.address, model, prompt) == 0


async def test_methods_share_no_block(config: WorkerConfig, model: Model) -> None:
    assert names_of(model, prompt_of(100))[0] != names_of(model, prompt_of(100), EXACT)[0]


async def test_a_store_that_is_gone_is_told_and_not_raised(config: WorkerConfig) -> None:
    async with running(config, f"127.0.0.1:{free_port()}") as nodes:
        report = await prefilled(nodes.prefill, task_of(prompt_of(200)))
        assert reasons_of(report) == {"unpublished_store_unavailable": 0}
        assert report.committed_blocks == 0
        report = await prefilled(nodes.prefill, task_of(prompt_of(200), expected_blocks=2))
        assert reasons_of(report) == {
            "store_unavailable": 128,
            "unpublished_store_unavailable": 0,
        }


async def test_a_prefix_read_coarsely_is_not_computed_here(config: WorkerConfig) -> None:
    method = Method(BALANCED.codec, finest=Stratum.STRATUM_BASE)
    async with LocalStore() as store, running(config, store.address) as nodes:
        report = await prefilled(nodes.prefill, task_of(prompt_of(200), method))
        assert report.committed_blocks == 0
        assert list(report.stages) == []
        assert store.running.store.counters.get("puts_total") == 0


async def test_values_beyond_the_codec_are_told(
    config: WorkerConfig, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("values are not finite")

    monkeypatch.setattr("kvstrata.methods.fallback.encode_blocks", refuse)
    async with LocalStore() as store, running(config, store.address) as nodes:
        report = await prefilled(nodes.prefill, task_of(prompt_of(200)))
        assert reasons_of(report) == {"unencodable": 192}
        assert report.committed_blocks == 0
        assert await stored_blocks(store.address, model, prompt_of(200)) == 0


async def test_a_deadline_in_the_past_ends_the_work(config: WorkerConfig) -> None:
    async with LocalStore() as store, running(config, store.address) as nodes:
        with pytest.raises(DeadlineError, match="over") as caught:
            await prefilled(nodes.prefill, task_of(prompt_of(200), timeout_s=-1.0))
        assert caught.value.remedy
        assert store.running.store.counters.get("puts_total") == 0


async def test_requests_at_the_same_time_do_not_disturb_each_other(
    config: WorkerConfig, model: Model
) -> None:
    prompts = [prompt_of(150, seed) for seed in range(4)]
    async with LocalStore() as store, running(config, store.address) as nodes:
        reports = await asyncio.gather(*(prefilled(nodes.prefill, task_of(p)) for p in prompts))
        assert [r.committed_blocks for r in reports] == [2] * 4
        for prompt in prompts:
            assert await stored_blocks(store.address, model, prompt) == 2


async def test_info_tells_what_is_served(config: WorkerConfig, model_folder: Path) -> None:
    info = await PrefillNode(config).info()
    assert (info.model, info.vocab_size) == (model_folder.name, VOCAB_SIZE)
    assert (info.max_positions, info.kv_dtype) == (MAX_POSITIONS, "float32")
    assert len(info.fingerprint) == 16
    assert info.kv_bytes_per_token_bf16 == 3 * 2 * 8 * 2 * 2


def test_what_is_left_of_the_time_falls_and_ends_in_an_error() -> None:
    task = task_of((5,), timeout_s=10.0)
    assert 9.0 < task.remaining_s <= 10.0
    with pytest.raises(DeadlineError):
        _ = replace(task, deadline_unix_s=time.time()).remaining_s


def test_public_names_are_sorted_and_importable() -> None:
    assert room.__all__ == sorted(room.__all__)
    assert all(getattr(room, name) is not None for name in room.__all__)
