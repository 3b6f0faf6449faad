"""Sequences in a pool give what sequences with memory of their own give, in far fewer bytes."""

import random
from pathlib import Path

import pytest
import torch
import transformers

from kvstrata.engine import Model
from kvstrata.engine.batch import Span
from kvstrata.engine.kv_arena import ArenaFullError
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.engine.row_buffer import RowBuffer
from kvstrata.engine.sequence import Loaded, RunningSequence
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.presets import Method
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.engine.calibrating import profile_of
from tests.engine.conftest import build_tokenizer
from tests.engine.families import _GATED, _YARN, build_reference
from tests.engine.test_calibrated_sequence import method_of
from tests.engine.test_sequence import (
    BALANCED,
    BASE,
    LOSSLESS,
    greedy,
    one_thread,
    opened,
    prompt_of,
    tail,
)

__all__ = ["one_thread"]
POOL_BYTES = 4 << 20
KINDS = ["exact", "fallback", "pre", "frame"]
WIDE = {
    "wide": lambda: transformers.LlamaConfig(**_GATED, head_dim=16),
    "wide-yarn": lambda: transformers.LlamaConfig(**_GATED, head_dim=16, rope_parameters=_YARN),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Tiny models whose heads are wide enough for blocks to be read in place."""
    models = {}
    for name, make_config in WIDE.items():
        folder: Path = tmp_path_factory.mktemp(name)
        build_reference(make_config()).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        models[name] = Model.load(str(folder), dtype=torch.float32, device="cpu")
    return models


@pytest.fixture(scope="module")
def methods(wide: dict[str, Model]) -> dict[tuple[str, str], Method]:
    found = {}
    for name, model in wide.items():
        profile = profile_of(model)
        found |= {(name, form): method_of(profile, form) for form in ("pre", "frame")}
        found |= {(name, "exact"): LOSSLESS, (name, "fallback"): BALANCED}
    return found


@pytest.fixture(params=WIDE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(wide: dict[str, Model], name: str) -> Model:
    return wide[name]


@pytest.fixture
def method(methods: dict[tuple[str, str], Method], name: str, kind: str) -> Method:
    return methods[name, kind]


@pytest.fixture
def pool(model: Model) -> KVPool:
    return KVPool(model, POOL_BYTES, max_sequences=8)


def start(
    model: Model, method: Method, prompt: list[int], pool: KVPool | None
) -> tuple[RunningSequence, list[SealedBlock]]:
    """Return a sequence whose full blocks were computed, sealed and settled."""
    sequence = RunningSequence(model, method, prompt, pool=pool)
    num_blocks = (len(prompt) - 1) // BLOCK_TOKENS
    for _ in sequence.compute(num_blocks * BLOCK_TOKENS):
        pass
    sealed = sequence.seal(0, num_blocks)
    sequence.settle(sealed)
    return sequence, sealed


def paged(sequence: RunningSequence) -> PagedCache:
    assert isinstance(sequence.cache, PagedCache)
    return sequence.cache


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-3) -> None:
    """Compare logits, whose largest are about 50."""
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_a_pooled_sequence_generates_what_a_plain_one_does(
    model: Model, method: Method, pool: KVPool
) -> None:
    """Over the end of two blocks: those that fill are sealed alike, and attended alike."""
    prompt = prompt_of(120)
    plain, sealed = start(model, method, prompt, None)
    pooled, again = start(model, method, prompt, pool)
    assert len(again) == len(sealed) == 1
    logits, wanted = tail(pooled), tail(plain)
    assert_near(logits, wanted)
    tokens, wanted, filled = greedy(plain, wanted, 75)
    got, logits, again = greedy(pooled, logits, 75)
    assert got == tokens
    assert_near(logits, wanted)
    assert [b.identity for b in again] == [b.identity for b in filled]
    assert pooled.num_unencodable == 0
    pool.check_integrity()


def test_blocks_written_by_one_kind_of_cache_load_into_the_other(
    model: Model, method: Method, pool: KVPool
) -> None:
    prompt = prompt_of(150)
    plain, sealed = start(model, method, prompt, None)
    pooled, again = start(model, method, prompt, pool)
    wanted = tail(plain)
    assert_near(tail(pooled), wanted)
    for blocks in (sealed, again):
        warm = RunningSequence(model, method, prompt, pool=pool)
        assert warm.load(opened(blocks, method.wanted)) == Loaded(2, None)
        assert_near(tail(warm), wanted)
        other = RunningSequence(model, method, prompt)
        assert other.load(opened(blocks, method.wanted)) == Loaded(2, None)
        assert_near(tail(other), wanted)
        paged(warm).close()
    pool.check_integrity()


def test_a_replay_goes_on_where_the_generation_was(
    model: Model, method: Method, pool: KVPool
) -> None:
    prompt = prompt_of(120)
    first, sealed = start(model, method, prompt, pool)
    begun, logits, filled = greedy(first, tail(first), 75)
    second = RunningSequence(model, method, prompt + begun, pool=pool)
    blocks = sealed + filled
    assert second.load(opened(blocks, method.wanted)) == Loaded(3, None)
    replayed = tail(second)
    assert_near(replayed, logits)
    assert greedy(second, replayed, 4)[0] == greedy(first, logits, 4)[0]


def test_the_rest_of_a_prompt_is_computed_on_top_of_loaded_blocks(
    model: Model, method: Method, pool: KVPool
) -> None:
    """Its saliency counts keys that lie compressed before it."""
    prompt = prompt_of(230)
    _, sealed = start(model, method, prompt[:129], None)
    results = []
    for own in (None, pool):
        sequence = RunningSequence(model, method, prompt, pool=own)
        sequence.load(opened(sealed, method.wanted))
        for _ in sequence.compute(192):
            pass
        saliency = sequence.cache.saliency(128, 192, model.attention_scaling)
        rest = sequence.seal(2, 3)
        sequence.settle(rest)
        results.append((saliency, tail(sequence), rest))
    stored = slice(method.codec.first_layer, None)
    torch.testing.assert_close(results[1][0][stored], results[0][0][stored], rtol=1e-2, atol=1e-5)
    assert_near(results[1][1], results[0][1])


def test_saliency_of_a_filling_block_equals_that_of_kept_queries(
    model: Model, method: Method, pool: KVPool
) -> None:
    """Some rows come as a chunk, the others one by one."""
    prompt = prompt_of(127)
    found = []
    for own in (None, pool):
        sequence, _ = start(model, method, prompt[:90], own)
        tail(sequence)
        for token in prompt[90:]:
            sequence.extend([token])
        found.append(sequence.cache.saliency(64, 127, model.attention_scaling))
    stored = slice(method.codec.first_layer, None)
    torch.testing.assert_close(found[1][stored], found[0][stored], rtol=1e-2, atol=1e-4)


def test_any_composition_of_a_batch_gives_each_sequence_its_own(
    model: Model, methods: dict[tuple[str, str], Method], name: str, pool: KVPool
) -> None:
    """Sequences of all methods, in passes of random members, some by chunks and some by tokens."""
    rng = random.Random(0)
    sequences, wanted = [], []
    for i, kind in enumerate(KINDS * 2):
        method, prompt = methods[name, kind], prompt_of(70 + 17 * i, seed=i)
        alone, _ = start(model, method, prompt, None)
        logits = tail(alone)
        wanted.append(greedy(alone, logits, 40)[0])
        sequences.append((start(model, method, prompt, pool)[0], prompt))
    logits_of: dict[int, torch.Tensor] = {}
    got: list[list[int]] = [[] for _ in sequences]
    while min(map(len, got)) < 40:
        spans, chosen = [], []
        for i, (sequence, prompt) in enumerate(sequences):
            held = sequence.cache.length
            if len(got[i]) == 40 or rng.random() < 0.3:
                continue
            if held < len(prompt):
                count = min(rng.choice([1, 5, 64]), len(prompt) - held)
                new = prompt[held : held + count]
            else:
                got[i].append(int(logits_of[i].argmax()))
                new = got[i][-1:]
            sequence.token_ids[held:] = new
            boundary = (held // BLOCK_TOKENS + 1) * BLOCK_TOKENS
            sequence.cache.expect_block(boundary)
            spans.append(Span(sequence.cache, new))
            chosen.append(i)
        for i, row in zip(chosen, model.forward_batch(spans), strict=True) if spans else ():
            logits_of[i] = row
            sequence = sequences[i][0]
            if sequence.cache.length % BLOCK_TOKENS == 0:
                index = sequence.num_blocks_held - 1
                sequence.settle(sequence.seal(index, index + 1))
    assert got == wanted
    for sequence, _ in sequences:
        paged(sequence).close()
    pool.check_integrity()
    assert pool.arena.used_bytes == 0


def test_compressed_blocks_take_a_fraction_of_the_rows(
    model: Model, methods: dict[tuple[str, str], Method], name: str, pool: KVPool
) -> None:
    sizes = {}
    for kind in ("exact", "frame"):
        sequence, _ = start(model, methods[name, kind], prompt_of(200), pool)
        logits = tail(sequence)
        before = pool.arena.used_bytes
        greedy(sequence, logits, 2)
        cache = paged(sequence)
        sizes[kind] = cache.num_bytes
        assert cache.base == (192 if kind == "frame" else 0)
        assert pool.arena.used_bytes - before <= 0 or kind == "exact"
        assert pool.arena.used_bytes == cache.num_bytes
        assert pool.num_bytes >= cache.num_bytes
        cache.close()
        assert pool.arena.used_bytes == 0
    assert sizes["frame"] < sizes["exact"] / 3


def test_a_pool_without_room_says_so_and_keeps_what_it_had(model: Model, method: Method) -> None:
    row = 2 * model.spec.num_layers * model.spec.num_kv_heads * model.spec.head_dim * 4
    pool = KVPool(model, 420 * row, max_sequences=2)
    sequence, _ = start(model, method, prompt_of(100), pool)
    logits = tail(sequence)
    other = PagedCache(pool, method.codec, prompt_of(250))
    with pytest.raises(ArenaFullError):
        other.reserve(2000)
    with pytest.raises(ArenaFullError, match="places"):
        PagedCache(pool, method.codec, [])
    plain, _ = start(model, method, prompt_of(100), None)
    assert greedy(sequence, logits, 3)[0] == greedy(plain, tail(plain), 3)[0]
    other.close()
    other.close()
    paged(sequence).close()
    pool.check_integrity()
    assert (pool.arena.used_bytes, pool.num_free_slots) == (0, 2)


def rows_of(model: Model, num_rows: int) -> int:
    """Return the bytes of uncompressed tokens."""
    return RowBuffer.bytes_for(model.spec, num_rows)


def test_rows_go_into_pages_where_there_is_room_for_one_form_only(
    model: Model, methods: dict[tuple[str, str], Method], name: str
) -> None:
    """Also with others' extents behind them, which move down as they shrink."""
    method, prompt = methods[name, "exact"], prompt_of(239)
    own, others = rows_of(model, 240), rows_of(model, 16)
    pool = KVPool(model, own + others, max_sequences=2)
    sequence, _ = start(model, method, prompt, pool)
    other = PagedCache(pool, method.codec, prompt[:16])
    other.reserve(16)
    cache = paged(sequence)
    assert pool.arena.free_bytes == 0
    logits = tail(sequence)
    plain, _ = start(model, method, prompt, None)
    tokens, after, _ = greedy(plain, tail(plain), 1)
    got, got_after, _ = greedy(sequence, logits, 1)
    assert got == tokens
    assert_near(got_after, after)
    assert (cache.num_bytes, pool.arena.free_bytes) == (own, 0)
    with pytest.raises(ArenaFullError):
        cache.reserve(1)
    other.close()
    cache.close()
    pool.check_integrity()
    assert pool.arena.used_bytes == 0


def test_rows_stay_in_one_piece_while_memory_is_held_still(
    model: Model, methods: dict[tuple[str, str], Method], name: str
) -> None:
    method = methods[name, "exact"]
    pool = KVPool(model, rows_of(model, 128), max_sequences=1)
    sequence, _ = start(model, method, prompt_of(119), pool)
    logits, cache = tail(sequence), paged(sequence)
    pool.arena.hold_still()
    with pytest.raises(ArenaFullError, match="rows in pages"):
        cache.settle_rows()
    pool.arena.let_move()
    plain, _ = start(model, method, prompt_of(119), None)
    assert greedy(sequence, logits, 3)[0] == greedy(plain, tail(plain), 3)[0]
    cache.close()


def test_a_failed_pass_leaves_the_sequences_as_they_were(
    model: Model, method: Method, pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence, _ = start(model, method, prompt_of(100), pool)
    logits = tail(sequence)
    expected = greedy(start(model, method, prompt_of(100), None)[0], logits, 3)[0]
    token = int(logits.argmax())
    kernel = "kvstrata.engine.paged_states.step_rows"

    def fail(*_: object) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(kernel, fail)
        with pytest.raises(ConnectionError):
            model.forward(sequence.cache, [token])
    assert sequence.cache.length == 100
    plain, _ = start(model, method, prompt_of(100), None)
    tail(plain)
    assert_near(sequence.extend([token])[0], plain.extend([token])[0])
    assert expected[0] == token


def test_truncated_sequences_go_on_from_there(model: Model, method: Method, pool: KVPool) -> None:
    prompt = prompt_of(150)
    sequence, sealed = start(model, method, prompt, pool)
    wanted = tail(sequence)
    cache = paged(sequence)
    cache.truncate(64)
    sequence.load(opened(sealed, method.wanted)[1:])
    assert cache.length == 128
    assert_near(tail(sequence), wanted)
    if cache.base:
        with pytest.raises(ValueError, match="cannot truncate"):
            cache.truncate(65)
    cache.truncate(0)
    assert cache.num_bytes == 0 or not cache.base
    pool.check_integrity()


def test_a_damaged_block_is_not_taken_in(
    wide: dict[str, Model], methods: dict[tuple[str, str], Method]
) -> None:
    model, method = wide["wide"], methods["wide", "frame"]
    pool = KVPool(model, POOL_BYTES)
    _, sealed = start(model, method, prompt_of(150), None)
    frames = opened(sealed, method.wanted)
    damaged = bytearray(sealed[1].frames[BASE])
    damaged[-1] ^= 1
    frames[1][BASE] = Frame.open(bytes(damaged))
    sequence = RunningSequence(model, method, prompt_of(150), pool=pool)
    assert sequence.load(frames) == Loaded(1, "corrupt")
    assert paged(sequence).base == 64
    with pytest.raises(CorruptFrameError):
        paged(sequence).hold(frames[1:], 1)
    assert paged(sequence).length == 64
    pool.check_integrity()


def test_a_pool_that_holds_no_tokens_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="holds no 16 tokens"):
        KVPool(model, 1000)
