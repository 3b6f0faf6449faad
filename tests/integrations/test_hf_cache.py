"""The transformers cache over a real store: hits, equal tokens, and what goes wrong."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvstrata.engine.errors import UnsupportedModelError
from kvstrata.integrations.hf_blocks import fingerprint_of
from kvstrata.integrations.hf_cache import CacheStore
from kvstrata.kvstore_service.redis_binary import free_port
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.protos.errors import MethodConflictError, UnknownPresetError
from tests.prefill_node.nodes import model_folder, prompt_of

__all__ = ["model_folder"]

PROMPT = list(prompt_of(200))  # three full blocks
Model = transformers.PreTrainedModel


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()


@pytest.fixture
async def store() -> AsyncIterator[LocalStore]:
    async with LocalStore() as store:
        yield store


def generated(model: Model, ids: list[int], cache: Any = None, **options: Any) -> list[int]:
    """Return prompt and answer as ``generate`` gives them, by a plain call of it."""
    prompt = torch.tensor([ids])
    options = {"max_new_tokens": 70, "do_sample": False, "eos_token_id": None, **options}
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options
    )
    return [int(i) for i in output[0]]


async def served(
    model: Model, address: str, work: Callable[[CacheStore], None], **options: Any
) -> dict[str, int]:
    """Do ``work`` beside the store's event loop, and return what was counted."""

    def run() -> dict[str, int]:
        with CacheStore(model, address, **{"timeout_s": 60.0, **options}) as caches:
            work(caches)
            caches.flush()
            return dict(caches.counts)

    return await asyncio.to_thread(run)


async def test_the_second_generate_hits_and_gives_the_same_tokens(
    model: Model, store: LocalStore
) -> None:
    plain = generated(model, PROMPT)

    def cold(caches: CacheStore) -> None:
        assert generated(model, PROMPT, caches.cache(PROMPT)) == plain

    def warm(caches: CacheStore) -> None:
        cache = caches.cache(torch.tensor([PROMPT]), torch.ones(1, len(PROMPT)))
        assert cache.cached_tokens == cache.get_seq_length() == 192
        assert generated(model, PROMPT, cache) == plain

    assert await served(model, store.address, cold) == {"cached": 0, "saved": 3}
    assert await served(model, store.address, warm) == {"cached": 192}


async def test_a_longer_prompt_reads_its_prefix_and_saves_the_rest_and_the_answer(
    model: Model, store: LocalStore
) -> None:
    def talk(caches: CacheStore) -> None:
        generated(model, PROMPT[:130], caches.cache(PROMPT[:130]))
        caches.flush()
        cache = caches.cache(PROMPT)
        assert cache.cached_tokens == 128
        output = generated(model, PROMPT, cache)
        assert output == generated(model, PROMPT)
        cache.save(output)
        cache.save(output)  # nothing is left to save
        caches.flush()
        assert caches.cache(output).cached_tokens == 256

    assert await served(model, store.address, talk) == {"cached": 384, "saved": 4}


@pytest.mark.parametrize("preset", ["balanced", "small"])
async def test_a_lossy_preset_hits_and_its_keys_are_those_of_the_places(
    model: Model, store: LocalStore, preset: str
) -> None:
    held = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([PROMPT]), past_key_values=held)

    def talk(caches: CacheStore) -> None:
        generated(model, PROMPT, caches.cache(PROMPT), max_new_tokens=1)
        caches.flush()
        cache = caches.cache(PROMPT)
        assert cache.cached_tokens == 192
        for ours, theirs in zip(cache.layers, held.layers, strict=True):
            for mine, true in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                error = (mine - true[:, :, :192]).norm() / true[:, :, :192].norm()
                assert error < 0.5
        assert len(generated(model, PROMPT, cache)) == 270

    await served(model, store.address, talk, preset=preset)


async def test_without_a_store_everything_is_computed_and_counted(model: Model) -> None:
    plain = generated(model, PROMPT)

    def talk(caches: CacheStore) -> None:
        assert generated(model, PROMPT, caches.cache(PROMPT)) == plain

    counts = await served(model, f"127.0.0.1:{free_port()}", talk, timeout_s=2.0)
    assert counts == {"store_unavailable": 1, "cached": 0, "unsaved_store_unavailable": 1}


async def test_a_store_that_does_not_answer_delays_by_the_time_limit_only(model: Model) -> None:
    def talk(caches: CacheStore) -> None:
        assert len(generated(model, PROMPT, caches.cache(PROMPT))) == 270

    with socket.create_server(("127.0.0.1", 0)) as silent:  # which accepts nobody
        port = silent.getsockname()[1]
        counts = await served(model, f"127.0.0.1:{port}", talk, timeout_s=0.5)
    assert counts.pop("timeout", 0) + counts.pop("store_unavailable", 0) == 1
    assert counts == {"cached": 0, "unsaved_store_unavailable": 1}


async def test_a_damaged_block_is_computed(model: Model, store: LocalStore) -> None:
    def talk(caches: CacheStore) -> None:
        generated(model, PROMPT, caches.cache(PROMPT))
        caches.flush()
        slots = store.running.store.dram._held  # a store verifies what comes, not its own memory
        for slot in slots.slots():
            (frame,) = slots.frames(int(slot), [4]).values()
            slots.put(int(slot), {4: frame[:-80] + bytes(80)})
        assert generated(model, PROMPT, caches.cache(PROMPT)) == generated(model, PROMPT)

    counts = await served(model, store.address, talk)
    assert counts["cached"] == 0
    assert counts["corrupt"] == 1


async def test_what_is_no_single_plain_sequence_neither_reads_nor_saves(
    model: Model, store: LocalStore
) -> None:
    def talk(caches: CacheStore) -> None:
        two = torch.tensor([PROMPT, PROMPT])
        model.generate(
            two,
            attention_mask=torch.ones_like(two),
            past_key_values=caches.cache(two),
            max_new_tokens=2,
        )
        padded = torch.ones(1, len(PROMPT))
        padded[0, 0] = 0
        assert caches.cache(PROMPT, padded).token_ids is None
        beams = generated(model, PROMPT, caches.cache(PROMPT), num_beams=2, max_new_tokens=2)
        assert beams == generated(model, PROMPT, num_beams=2, max_new_tokens=2)
        short = caches.cache(PROMPT[:64])
        assert short.cached_tokens == 0
        cache = caches.cache(PROMPT)
        generated(model, PROMPT, cache, max_new_tokens=1)
        cache.save([5] * 256)

    counts = await served(model, store.address, talk)
    assert counts["batch"] == 2
    assert counts["unsaved_other_prompt"] == 1


def test_the_fingerprint_follows_the_weights(model: Model, model_folder: Path) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert fingerprint_of(other) == fingerprint_of(model)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert fingerprint_of(other) != fingerprint_of(model)
    assert fingerprint_of(other.bfloat16()) != fingerprint_of(model)


def test_what_cannot_be_right_is_refused(model: Model) -> None:
    with pytest.raises(UnknownPresetError):
        CacheStore(model, "127.0.0.1:1", preset="best")
    with pytest.raises(MethodConflictError, match="every token of every layer"):
        CacheStore(model, "127.0.0.1:1", preset="h2o")
    sliding = transformers.MistralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="sliding"):
        CacheStore(transformers.AutoModelForCausalLM.from_config(sliding), "127.0.0.1:1")


async def test_the_example_of_the_readme_runs(
    model: Model, model_folder: Path, store: LocalStore
) -> None:
    page = (Path(__file__).parents[2] / "integrations" / "README.md").read_text()
    (example,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    example = example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model_folder))
    example = example.replace("127.0.0.1:7070", store.address)
    counts: list[int] = []
    await asyncio.to_thread(exec, example, {"print": lambda *told: counts.append(told[0])})
    assert counts == [0, 128]
