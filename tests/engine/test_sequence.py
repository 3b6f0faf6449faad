"""One sequence computed, stored, loaded and replayed: what is attended never depends on the way."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers

from kvstrata.engine import Model
from kvstrata.engine.sequence import Loaded, RunningSequence
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.presets import Method, from_preset
from kvstrata.methods.saliency_tag import decode_tags
from kvstrata.protos.frame import Frame, encode_frame
from kvstrata.protos.frame_pb2 import FrameHeader, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, block_hashes
from tests.engine.families import VOCAB_SIZE

BASE, MID, EXACT = Stratum.STRATUM_BASE, Stratum.STRATUM_MID, Stratum.STRATUM_EXACT
METHODS = {name: from_preset(name) for name in ("balanced", "exact")}
BALANCED, LOSSLESS = METHODS["balanced"], METHODS["exact"]
COARSE = Method(BALANCED.codec, finest=BASE)
FAMILY_NAMES = ["llama", "qwen3", "opt"]
PROMPT_LENGTH = 150  # two full blocks and a rest

Opened = dict[Stratum, Frame]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they save on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt_of(length: int = PROMPT_LENGTH, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def opened(blocks: Sequence[SealedBlock], wanted: Sequence[Stratum]) -> list[Opened]:
    return [{s: Frame.open(f) for s, f in b.frames.items() if s in wanted} for b in blocks]


def computed(
    model: Model, method: Method, prompt: Sequence[int]
) -> tuple[RunningSequence, list[SealedBlock]]:
    """Return a sequence whose full blocks were computed, sealed and settled."""
    sequence = RunningSequence(model, method, prompt)
    num_blocks = (len(prompt) - 1) // BLOCK_TOKENS
    for _ in sequence.compute(num_blocks * BLOCK_TOKENS):
        pass
    sealed = sequence.seal(0, num_blocks)
    sequence.settle(sealed)
    return sequence, sealed


def loaded(
    model: Model, method: Method, tokens: Sequence[int], blocks: Sequence[SealedBlock]
) -> RunningSequence:
    sequence = RunningSequence(model, method, tokens)
    assert sequence.load(opened(blocks, method.wanted)) == Loaded(len(blocks), None)
    return sequence


def tail(sequence: RunningSequence) -> torch.Tensor:
    return sequence.extend(sequence.token_ids[sequence.cache.length :])[0]


def greedy(
    sequence: RunningSequence, logits: torch.Tensor, count: int
) -> tuple[list[int], torch.Tensor, list[SealedBlock]]:
    """Extend token by token; returns the tokens, the last logits and the blocks that filled."""
    tokens: list[int] = []
    sealed: list[SealedBlock] = []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits, filled = sequence.extend(tokens[-1:])
        sealed += filled
    return tokens, logits, sealed


def reframed(frame: Frame, change: Mapping[str, Any]) -> Frame:
    """Return the frame with header fields changed and every checksum right."""
    header = FrameHeader()
    header.CopyFrom(frame.header)
    segments = {layer: bytes(data) for layer, data in frame.segments().items()}
    for name, value in change.items():
        if name == "token_ids":
            header.token_ids[:] = value
        else:
            setattr(header, name, value)
    del header.segments[:]
    return Frame.open(encode_frame(header, segments))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("preset", ["balanced", "exact"])
def test_a_loaded_cache_equals_the_settled_one(
    models: dict[str, Model], family: str, preset: str
) -> None:
    model, method, prompt = models[family], METHODS[preset], prompt_of()
    cold, sealed = computed(model, method, prompt)
    warm = loaded(model, method, prompt, sealed)
    assert warm.cache.length == cold.cache.length == 2 * BLOCK_TOKENS
    stored = slice(method.codec.first_layer, None)
    for a, b in zip(cold.cache.read(0, 128), warm.cache.read(0, 128), strict=True):
        assert torch.equal(a[stored], b[stored])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    logits, again = tail(cold), tail(warm)
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
    assert again.argmax() == logits.argmax()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("preset", ["balanced", "exact"])
def test_blocks_load_alike_in_one_batch_and_one_by_one(
    models: dict[str, Model], family: str, preset: str
) -> None:
    model, method, prompt = models[family], METHODS[preset], prompt_of()
    _, sealed = computed(model, method, prompt)
    together = loaded(model, method, prompt, sealed)
    singly = RunningSequence(model, method, prompt)
    for frames in opened(sealed, method.wanted):
        assert singly.load([frames]) == Loaded(1, None)
    for a, b in zip(together.cache.read(0, 128), singly.cache.read(0, 128), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("preset", ["balanced", "exact"])
def test_a_replay_goes_on_where_the_generation_was(
    models: dict[str, Model], family: str, preset: str
) -> None:
    model, method, prompt = models[family], METHODS[preset], prompt_of(120)
    first, sealed = computed(model, method, prompt)
    begun, logits, filled = greedy(first, tail(first), 75)
    assert [b.identity.first_position for b in filled] == [64, 128]
    tokens, _, _ = greedy(first, logits, 8)

    known = prompt + begun
    assert [b.identity.key.block_hash for b in sealed + filled] == block_hashes(first.scope, known)
    for stored in (sealed, sealed + filled[:1], sealed + filled):
        second = loaded(model, method, known, stored)
        replayed = tail(second)
        torch.testing.assert_close(replayed, logits, rtol=1e-4, atol=1e-4)
        assert greedy(second, replayed, 8)[0] == tokens


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_replaying_without_any_store_gives_the_same_blocks(
    models: dict[str, Model], family: str
) -> None:
    model, prompt = models[family], prompt_of(120)
    first, _ = computed(model, BALANCED, prompt)
    begun, logits, filled = greedy(first, tail(first), 20)
    second, _ = computed(model, BALANCED, prompt)
    replayed, refilled = second.extend(prompt[BLOCK_TOKENS:] + begun)
    torch.testing.assert_close(replayed, logits, rtol=1e-4, atol=1e-4)
    assert [b.identity for b in refilled] == [b.identity for b in filled]


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("preset", ["balanced", "exact"])
def test_a_partly_stored_prompt_differs_from_a_cold_one_by_no_more_than_the_codec(
    models: dict[str, Model], family: str, preset: str
) -> None:
    model, method, prompt = models[family], METHODS[preset], prompt_of(200)
    cold, sealed = computed(model, method, prompt)
    partly = loaded(model, method, prompt, sealed[:1])
    assert sum(partly.compute(192)) == 128
    partly.settle(partly.seal(1, 3))
    logits, again = tail(cold), tail(partly)
    tolerance = 1e-4 if method.codec.lossless else 0.5 * float(logits.std())
    torch.testing.assert_close(again, logits, rtol=0, atol=tolerance)


def change_tokens(blocks: list[Opened], index: int) -> None:
    other = [*blocks[index][BASE].header.token_ids[:-1], 3]
    blocks[index] = {s: reframed(f, {"token_ids": other}) for s, f in blocks[index].items()}


def swap_block(blocks: list[Opened], index: int) -> None:
    blocks[index] = blocks[index - 1]


def drop_mid(blocks: list[Opened], index: int) -> None:
    del blocks[index][MID]


def drop_all(blocks: list[Opened], index: int) -> None:
    blocks[index] = {}


def change_dtype(blocks: list[Opened], index: int) -> None:
    blocks[index] = {s: reframed(f, {"kv_dtype": "float16"}) for s, f in blocks[index].items()}


def change_encoding(blocks: list[Opened], index: int) -> None:
    blocks[index][MID] = reframed(blocks[index][MID], {"encoding_id": b"another writing."})


def change_codec(blocks: list[Opened], index: int) -> None:
    blocks[index] = {s: reframed(f, {"codec_version": 99}) for s, f in blocks[index].items()}


def move(blocks: list[Opened], index: int) -> None:
    blocks[index] = {s: reframed(f, {"first_position": 0}) for s, f in blocks[index].items()}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change_tokens, "token_mismatch"),
        (swap_block, "foreign"),
        (drop_mid, "stratum_absent"),
        (drop_all, "absent"),
        (change_dtype, "foreign"),
        (change_encoding, "stratum_absent"),
        (change_codec, "other_codec"),
        (move, "foreign"),
    ],
)
@pytest.mark.parametrize("index", [1, 2])
def test_a_load_stops_before_a_block_that_must_not_be_used(
    models: dict[str, Model], damage: Any, reason: str, index: int
) -> None:
    prompt = prompt_of(200)
    cold, sealed = computed(models["llama"], BALANCED, prompt)
    blocks = opened(sealed, BALANCED.wanted)
    damage(blocks, index)
    sequence = RunningSequence(models["llama"], BALANCED, prompt)
    assert sequence.load(blocks) == Loaded(index, reason)
    assert sequence.cache.length == index * BLOCK_TOKENS
    for a, b in zip(sequence.cache.read(0, 64), cold.cache.read(0, 64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["balanced", "exact"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flipped_byte_in_a_segment_stops_the_load_there(
    models: dict[str, Model], preset: str, index: int
) -> None:
    method, prompt = METHODS[preset], prompt_of(200)
    _, sealed = computed(models["llama"], method, prompt)
    blocks = opened(sealed, method.wanted)
    stratum = method.wanted[-1]
    data = bytearray(sealed[index].frames[stratum])
    segment = blocks[index][stratum].header.segments[-1]
    data[segment.offset + segment.length // 2] ^= 1
    blocks[index][stratum] = Frame.open(bytes(data))
    sequence = RunningSequence(models["llama"], method, prompt)
    assert sequence.load(blocks) == Loaded(index, "corrupt")
    assert sequence.cache.length == index * BLOCK_TOKENS
    assert tail(sequence).isfinite().all()


def test_loading_goes_on_after_the_blocks_that_are_held(models: dict[str, Model]) -> None:
    prompt = prompt_of(200)
    _, sealed = computed(models["qwen3"], BALANCED, prompt)
    frames = opened(sealed, BALANCED.wanted)
    sequence = RunningSequence(models["qwen3"], BALANCED, prompt)
    assert sequence.load(frames[:1]) == Loaded(1, None)
    assert sequence.load(frames[1:]) == Loaded(2, None)
    assert sequence.num_blocks_held == 3


def test_reading_the_base_alone_works_and_forbids_committing(models: dict[str, Model]) -> None:
    prompt = prompt_of()
    full, sealed = computed(models["llama"], BALANCED, prompt)
    assert full.committable
    coarse = loaded(models["llama"], COARSE, prompt, sealed)
    assert coarse.scope == full.scope
    assert not coarse.committable
    assert not torch.equal(coarse.cache.read(0, 128)[0], full.cache.read(0, 128)[0])
    assert tail(coarse).isfinite().all()
    again, _ = computed(models["llama"], COARSE, prompt)
    torch.testing.assert_close(
        again.cache.read(0, 128), coarse.cache.read(0, 128), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_values_beyond_the_codec_are_attended_but_not_sealed(
    models: dict[str, Model], bad: float
) -> None:
    sequence = RunningSequence(models["llama"], BALANCED, prompt_of())
    for _ in sequence.compute(128):
        pass
    before = sequence.cache.values[1, 0, 70, 3].clone()
    sequence.cache.values[1, 0, 70, 3] = bad
    assert sequence.seal(0, 2) == []
    assert not sequence.committable
    assert sequence.num_unencodable == 2
    sequence.cache.values[1, 0, 70, 3] = before
    sequence.settle([])
    logits = tail(sequence)
    tokens, logits, _ = greedy(sequence, logits, 50)
    assert len(tokens) == 50
    assert logits.isfinite().all()
    assert not sequence.committable


def test_a_generated_block_beyond_the_codec_stays_uncompressed(models: dict[str, Model]) -> None:
    sequence = RunningSequence(models["llama"], BALANCED, prompt_of(60))
    tail(sequence)
    sequence.cache.values[1, 0, 7, 3] = 1e9
    logits, sealed = sequence.extend([5, 6, 7, 8, 9])
    assert (sealed, sequence.committable, sequence.num_unencodable) == ([], False, 1)
    assert logits.isfinite().all()
    assert sequence.cache.values[1, 0, 7, 3] == 1e9


def test_the_exact_codec_stores_what_is_no_number(models: dict[str, Model]) -> None:
    sequence = RunningSequence(models["llama"], LOSSLESS, prompt_of())
    for _ in sequence.compute(128):
        pass
    sequence.cache.values[1, 0, 70, 3] = float("nan")
    sealed = sequence.seal(0, 2)
    warm = loaded(models["llama"], LOSSLESS, prompt_of(), sealed)
    a, b = sequence.cache.read(0, 128)[1], warm.cache.read(0, 128)[1]
    assert torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_exact_from_stored_blocks_generates_what_transformers_does(
    models: dict[str, Model], references: dict[str, Any], family: str
) -> None:
    prompt = prompt_of()
    _, sealed = computed(models[family], LOSSLESS, prompt)
    sequence = loaded(models[family], LOSSLESS, prompt, sealed)
    tokens, _, _ = greedy(sequence, tail(sequence), 64)
    settings = transformers.GenerationConfig(
        max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ids = torch.tensor([prompt])
    reference = references[family].generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=settings
    )
    assert tokens == reference[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("preset", "stratum", "layers"), [("balanced", BASE, [1, 2]), ("exact", EXACT, [0, 1, 2])]
)
def test_prompt_blocks_carry_saliency_of_every_stored_layer(
    models: dict[str, Model], family: str, preset: str, stratum: Stratum, layers: list[int]
) -> None:
    model = models[family]
    sequence, sealed = computed(model, METHODS[preset], prompt_of())
    _, _, filled = greedy(sequence, tail(sequence), 60)
    assert len(sealed) == 2
    assert len(filled) == 1
    tags_at = 2 * model.spec.num_kv_heads * 8 if preset == "balanced" else 0
    for block in sealed + filled:
        segments = Frame.open(block.frames[stratum]).segments()
        assert list(segments) == layers
        for segment in segments.values():
            tags = segment[tags_at : tags_at + BLOCK_TOKENS]
            saliency = decode_tags(torch.frombuffer(bytearray(tags), dtype=torch.uint8))
            assert (saliency > 0).all()
            assert (saliency <= 1).all()


def test_computing_what_is_held_computes_nothing(models: dict[str, Model]) -> None:
    sequence, _ = computed(models["llama"], LOSSLESS, prompt_of())
    assert list(sequence.compute(128)) == []
    assert list(sequence.compute(64)) == []


def test_a_sequence_fills_the_context_to_its_last_position(models: dict[str, Model]) -> None:
    model = models["llama"]
    prompt = prompt_of(model.spec.max_positions - 2)
    sequence, _ = computed(model, BALANCED, prompt)
    logits = tail(sequence)
    _, _, sealed = greedy(sequence, logits, 2)
    assert sequence.cache.length == model.spec.max_positions
    assert [b.identity.first_position for b in sealed] == [model.spec.max_positions - BLOCK_TOKENS]
