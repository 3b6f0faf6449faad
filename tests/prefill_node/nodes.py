"""Real nodes over a tiny random model, a real store, and what tests ask of them."""

import contextlib
import functools
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvstrata.decode_node import DecodeNode
from kvstrata.engine import Model, SamplingParams
from kvstrata.engine.sequence import RunningSequence
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.methods.presets import Method, from_preset
from kvstrata.prefill_node import PrefillNode, Task, WorkerConfig
from kvstrata.prefill_node.read_rates import MIN_SEEN, Arrivals, settings_of
from kvstrata.protos.identity import BLOCK_TOKENS, BlockHash, ScopeDigest, block_hashes
from kvstrata.protos.inference_pb2 import CacheReport, FinishReason, GenerateReply
from tests.engine.conftest import build_tokenizer
from tests.engine.families import build_reference

BALANCED, EXACT = from_preset("balanced"), from_preset("exact")
MAX_POSITIONS = 512
VOCAB_SIZE = 259
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
STORE_TIMEOUT_S = 3.0


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama whose vocabulary is its tokenizer's: one token a byte."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    build_reference(config).save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_once() -> Callable[..., Model]:
    return functools.cache(Model.load)


@pytest.fixture
def model(
    model_folder: Path, load_once: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Model]:
    """The model; nodes of this test get this very one, and pack it: nothing else changes it."""
    monkeypatch.setattr(Model, "load", load_once)
    threads = torch.get_num_threads()
    yield load_once(str(model_folder), adapter=None, dtype="auto", device="auto")
    torch.set_num_threads(threads)


@pytest.fixture
def config(model_folder: Path, model: Model) -> WorkerConfig:
    """Of a node whose store nobody serves."""
    return WorkerConfig(
        "127.0.0.1:1", str(model_folder), num_threads=1, store_timeout_s=STORE_TIMEOUT_S
    )


@dataclass(frozen=True)
class Nodes:
    prefill: PrefillNode
    decode: DecodeNode


@contextlib.asynccontextmanager
async def running(config: WorkerConfig, store_address: str | None = None) -> AsyncIterator[Nodes]:
    """A prefill and a decode node, closed at the end."""
    if store_address:
        config = replace(config, store_address=store_address)
    nodes = Nodes(PrefillNode(config), DecodeNode(config))
    try:
        yield nodes
    finally:
        await nodes.prefill._worker.close()
        await nodes.decode._worker.close()


def prompt_of(length: int, seed: int = 1) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())


def task_of(
    prompt: Sequence[int],
    method: Method = BALANCED,
    *,
    expected_blocks: int = 0,
    generated: Sequence[int] = (),
    timeout_s: float = 60.0,
    max_tokens: int = 8,
    ignore_eos: bool = True,
    **sampling: Any,
) -> Task:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, **sampling)
    return Task(
        request_id="test",
        prompt_ids=tuple(prompt),
        method=method,
        sampling=params,
        deadline_unix_s=time.time() + timeout_s,
        expected_blocks=expected_blocks,
        generated_ids=tuple(generated),
    )


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    cache: CacheReport

    @property
    def reasons(self) -> dict[str, int]:
        return reasons_of(self.cache)


def reasons_of(report: CacheReport) -> dict[str, int]:
    return {r.reason: r.tokens for r in report.recomputes}


def answer_of(replies: Sequence[GenerateReply]) -> Answer:
    """Check the form of a stream and return what it says."""
    last = replies[-1]
    assert all(not r.finish_reason and not r.HasField("cache") for r in replies[:-1])
    assert not last.token_ids
    return Answer(
        [i for r in replies for i in r.token_ids],
        "".join(r.text for r in replies),
        FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_"),
        last.usage.prompt_tokens,
        last.usage.completion_tokens,
        last.cache,
    )


async def decoded(node: DecodeNode, task: Task) -> Answer:
    return answer_of([GenerateReply.FromString(r) async for r in node.generate(task)])


async def prefilled(node: PrefillNode, task: Task) -> CacheReport:
    return (await first_token(node, task))[1]


async def first_token(node: PrefillNode, task: Task) -> tuple[list[GenerateReply], CacheReport]:
    """Return what a prefill node says of the answer, at most one token; and its report."""
    replies = [GenerateReply.FromString(r) async for r in node.prefill(task)]
    assert len(replies) <= 2
    assert all(len(r.token_ids) == 1 and not r.HasField("cache") for r in replies[:-1])
    assert not replies[-1].token_ids
    assert not replies[-1].finish_reason
    return replies[:-1], replies[-1].cache


def names_of(
    model: Model, tokens: Sequence[int], method: Method = BALANCED
) -> tuple[ScopeDigest, list[BlockHash]]:
    """Return the scope and hashes of the full blocks of ``tokens``."""
    sequence = RunningSequence(model, method, tokens)
    full = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
    return sequence.scope, block_hashes(sequence.scope, tokens[:full])


async def stored_blocks(
    address: str, model: Model, tokens: Sequence[int], method: Method = BALANCED
) -> int:
    """Return how many blocks of ``tokens`` the store holds, counted from the first."""
    async with StoreClient(address) as client:
        return len((await client.lookup(*names_of(model, tokens, method))).blocks)


def learn(worker: Any, method: Method, byte_s: float, token_s: float) -> None:
    """Let a node have seen fetches and prompts that took so long."""
    codec, rates = method.codec, worker.rates
    for _ in range(MIN_SEEN):
        arrivals = Arrivals(functools.partial(next, itertools.count(0.0, 1000 * byte_s)))
        for stratum in codec.strata * 2:
            arrivals.add("dram", stratum, 1000)
        rates.fetched(arrivals, settings_of(codec), codec.strata)
        rates.unpacked(settings_of(codec), codec.strata, 1, 0.0)
        rates.computed(100, 100 * token_s)
