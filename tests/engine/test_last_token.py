"""The last token of a prompt that is all blocks, run once more: its logits, and nothing else."""

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.engine.seat import Generate
from kvstrata.engine.sequence import RunningSequence
from kvstrata.engine.step_loop import StepLoop
from kvstrata.engine.turns import Turn, turns
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.presets import Method
from kvstrata.methods.skipdecode import SkipDecode
from tests.engine.test_paged_cache import (
    KINDS,
    assert_near,
    kind,
    method,
    methods,
    model,
    name,
    pool,
    wide,
)
from tests.engine.test_sequence import LOSSLESS, greedy, one_thread, opened, prompt_of
from tests.engine.test_step_loop import Client, gathered, steps

__all__ = ["kind", "method", "methods", "model", "name", "one_thread", "pool", "steps", "wide"]
PROMPT = prompt_of(128)  # two full blocks and no rest


def sealed_of(model: Model, method: Method, prompt: list[int]) -> list[SealedBlock]:
    sequence = RunningSequence(model, method, prompt)
    for _ in sequence.compute(len(prompt)):
        pass
    return sequence.seal(0, len(prompt) // 64)


def again(sequence: RunningSequence) -> torch.Tensor:
    span = sequence.next_span(64)
    assert list(span.token_ids) == sequence.token_ids[-1:]
    assert span.wants_logits
    logits = sequence.model.forward_batch([span])[0]
    assert sequence.fill() == []
    return logits


def loaded(
    model: Model, method: Method, blocks: list[SealedBlock], pool: KVPool | None
) -> RunningSequence:
    sequence = RunningSequence(model, method, PROMPT, pool=pool)
    assert sequence.load(opened(blocks, method.wanted)).num_blocks == len(blocks)
    return sequence


def test_it_gives_the_logits_over_what_is_held_and_changes_nothing(
    model: Model, method: Method, pool: KVPool
) -> None:
    blocks = sealed_of(model, method, PROMPT)
    pooled, plain = (loaded(model, method, blocks, place) for place in (pool, None))
    cache, used = pooled.cache, pool.arena.used_bytes
    assert isinstance(cache, PagedCache)
    rows = [part.clone() for part in cache.read(cache.base, 128)]
    wanted = again(plain)
    for _ in range(2):  # as often as one likes
        assert_near(again(pooled), wanted)
        assert (cache.length, pool.arena.used_bytes) == (128, used)
        assert all(map(torch.equal, rows, cache.read(cache.base, 128)))
    if method.codec.lossless:
        assert_near(wanted, model.forward(model.new_cache(128), PROMPT))
    first = int(wanted.argmax())
    tokens, sealed = [], []
    for sequence in (pooled, plain):
        logits, _ = sequence.extend([first])
        found, _, filled = greedy(sequence, logits, 70)
        tokens.append(found)
        sealed.append([b.identity.first_position for b in filled])
    assert tokens[0] == tokens[1]
    assert sealed == [[128], [128]]  # the block that held the last token is not sealed again
    cache.close()


def test_after_a_pass_over_the_prompt_it_gives_the_logits_of_that_pass(
    model: Model, method: Method, pool: KVPool
) -> None:
    """Uncompressed rows, in one piece and in pages."""
    sequence = RunningSequence(model, method, PROMPT[:100], pool=pool)
    wanted, _ = sequence.extend(PROMPT[:100])
    if not method.codec.lossless:
        wanted = again(sequence)  # its first block has been settled since
    assert_near(again(sequence), wanted)
    assert isinstance(sequence.cache, PagedCache)
    sequence.cache.reserve(1)
    assert_near(again(sequence), wanted)
    sequence.cache.close()


def test_a_sequence_that_takes_turns_runs_it_in_a_turn(model: Model) -> None:
    sequence = loaded(model, LOSSLESS, sealed_of(model, LOSSLESS, PROMPT), None)
    wanted, chosen = int(again(sequence).argmax()), list[int]()

    def choose(logits: torch.Tensor) -> int | None:
        chosen.append(int(logits.argmax()))
        return chosen[-1] if len(chosen) < 3 else None

    found = list(turns(sequence, Generate(choose, lambda _: None), 128, lambda: 64))
    assert found == [Turn(0, 1)] * 3
    assert (chosen[0], len(chosen)) == (wanted, 3)


@pytest.mark.parametrize("skip", [None, SkipDecode(3, 2)], ids=["all-layers", "skipping"])
async def test_the_loop_runs_it_beside_others(
    wide: dict[str, Model],
    methods: dict[tuple[str, str], Method],
    steps: StepLoop,
    skip: SkipDecode | None,
) -> None:
    model, clients, wanted = steps.model, [], []
    for each in KINDS:
        method = Method(methods["wide", each].codec, skip=skip)
        blocks = sealed_of(model, method, PROMPT)
        clients.append(Client(steps, method, PROMPT, 6))
        clients[-1].sealed(blocks)
        wanted.append(int(again(loaded(model, method, blocks, None)).argmax()))
    found = await gathered(*clients, Client(steps, methods["wide", "exact"], prompt_of(90), 6))
    assert [tokens[0] for tokens in found[:-1]] == wanted
    assert [len(tokens) for tokens in found] == [6] * len(found)
    assert steps.counts.get("prompt_tokens") <= 90
    for client in clients:
        assert sorted(client.blocks) == [0, 1]
