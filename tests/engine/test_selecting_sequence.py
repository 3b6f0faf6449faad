"""Requests under stages: cold, warm and replayed give the same tokens; blocks stay who they are."""

from collections.abc import Sequence

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.new_sequence import new_sequence
from kvstrata.engine.selecting_sequence import SelectingSequence
from kvstrata.engine.sequence import Loaded, RunningSequence
from kvstrata.methods.attention_gate import AttentionGate
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.codec import BlockCodec
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.gate_weights import GATES, GateError
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import Method, from_preset
from kvstrata.methods.profile import Profile
from kvstrata.methods.stage_settings import with_gates
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.engine.calibrating import profile_of, tokens_of
from tests.engine.test_calibrated_sequence import method_of
from tests.engine.test_sequence import one_thread
from tests.methods.gates import random_gates

__all__ = ["one_thread"]
PROMPT = tokens_of(150)
NUM_BLOCKS = 2
EVICT = H2O(heavy=0.1, recent=0.1, sinks=2)


@pytest.fixture(scope="module")
def profile(models: dict[str, Model]) -> Profile:
    return profile_of(models["llama"])


def codec_of(name: str, profile: Profile) -> BlockCodec:
    if name == "calibrated":
        return method_of(profile).codec
    return {
        "exact": ExactCodec(),
        "fallback": FallbackCodec(),
        "zipcache": ZipCacheCodec(ZipCache()),
    }[name]


def gated(model: Model, pipeline: Pipeline) -> Pipeline:
    """Return the pipeline; if it has a gate, then with random gates of the model."""
    shape = (model.spec.num_layers, model.spec.num_kv_heads, model.width)
    gates = random_gates(model.model_id, shape)
    GATES.add(gates)
    return with_gates(pipeline, None, gates)


CODECS = ("exact", "fallback", "calibrated", "zipcache")
each_codec = pytest.mark.parametrize("name", CODECS)


def cold(
    model: Model, method: Method, prompt: Sequence[int] = PROMPT
) -> tuple[RunningSequence, list[SealedBlock]]:
    """Return a sequence whose full blocks were computed, sealed and settled here."""
    sequence = new_sequence(model, method, prompt)
    num_blocks = (len(prompt) - 1) // BLOCK_TOKENS
    for _ in sequence.compute(num_blocks * BLOCK_TOKENS):
        pass
    sealed = sequence.seal(0, num_blocks)
    sequence.settle(sealed)
    return sequence, sealed


def warm(
    model: Model, method: Method, sealed: Sequence[SealedBlock], ids: Sequence[int] = PROMPT
) -> RunningSequence:
    """Return a sequence whose full blocks were fetched."""
    sequence = new_sequence(model, method, ids, num_prompt=len(PROMPT))
    loaded = sequence.load([{s: Frame.open(f) for s, f in b.frames.items()} for b in sealed])
    assert loaded.num_blocks == len(sealed)
    return sequence


def generate(sequence: RunningSequence, count: int = 12) -> tuple[list[int], torch.Tensor]:
    """Return greedy tokens and the logits after each."""
    logits, _ = sequence.extend(sequence.token_ids[sequence.cache.length :])
    tokens, rows = [], []
    for _ in range(count):
        rows.append(logits)
        tokens.append(int(logits.argmax()))
        logits, sealed = sequence.extend(tokens[-1:])
        assert not sealed or sequence.committable
    return tokens, torch.stack(rows)


PIPELINES = {
    "h2o": Pipeline.of(EVICT),
    "h2o rolling": Pipeline.of(H2O(heavy=0.1, recent=0.1, positions="rolling")),
    "zipvl evicts": Pipeline.of(ZipVL(tau=0.7, min_tokens=10, rest="evict")),
    "zipvl": Pipeline.of(ZipVL(tau=0.7, min_tokens=10)),
    "zipvl and h2o": Pipeline.of(ZipVL(tau=0.7, min_tokens=10, rest="evict"), EVICT),
    "gate": Pipeline.of(AttentionGate()),
    "gate and h2o": Pipeline.of(AttentionGate(), EVICT),
    "gate and zipvl": Pipeline.of(AttentionGate(), ZipVL(tau=0.7, min_tokens=10)),
}


@each_codec
@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_cold_warm_and_replayed_requests_give_the_same_tokens(models, profile, name, pipeline):
    codec = codec_of(name, profile)
    if pipeline.leaves_out and name in ("exact", "fallback"):
        pytest.skip("this codec's blocks hold all of their tokens")
    model = models["llama"]
    method = Method(codec, pipeline=gated(model, pipeline))
    first, sealed = cold(model, method)
    tokens, logits = generate(first)
    again, _ = generate(warm(model, method, sealed))
    assert again == tokens
    replayed = warm(model, method, sealed, [*PROMPT, *tokens[:5]])
    later, later_logits = generate(replayed, 7)
    assert later == tokens[5:]
    torch.testing.assert_close(later_logits, logits[5:], atol=1e-4, rtol=1e-4)


@each_codec
def test_h2o_leaves_blocks_and_their_names_as_they_are_without_it(models, profile, name):
    model, codec = models["llama"], codec_of(name, profile)
    plain, evicting = Method(codec), Method(codec, pipeline=Pipeline.of(EVICT))
    ours, sealed = cold(model, evicting)
    theirs, _ = cold(model, plain)
    assert ours.hashes == theirs.hashes
    # What others stored serves an evicting request, and the other way round.
    reader = warm(model, plain, sealed)
    assert isinstance(reader, RunningSequence)
    generate(reader, 2)
    generate(warm(model, evicting, cold(model, plain)[1]), 2)


def test_h2o_s_cache_holds_its_seats_and_never_grows_beyond(models):
    model = models["llama"]
    sequence, _ = cold(model, Method(ExactCodec(), pipeline=Pipeline.of(EVICT)))
    assert sequence.kept_fraction == 1.0
    generate(sequence, 4)
    assert isinstance(sequence, SelectingSequence)
    assert sequence.selected is not None
    assert not sequence.committable
    seats = EVICT.seats(len(PROMPT)).total
    for layer in range(model.spec.num_layers):
        assert [len(p) for p in sequence.selected.positions(layer)] == [seats] * 2
    assert sequence.kept_fraction == pytest.approx(seats / (len(PROMPT) + 4), abs=1e-6)
    assert sequence.cache.nbytes < 1000 * sequence.model.spec.num_layers
    dense = model.new_cache(len(PROMPT)).nbytes
    assert sequence.selected.nbytes < 0.35 * dense


@pytest.mark.parametrize("length", [64, 65, 128, 20])
def test_prompts_of_any_length_end_in_a_selected_cache(models, length):
    model = models["qwen2"]
    method = Method(ExactCodec(), pipeline=Pipeline.of(H2O(heavy=0.3, recent=0.3)))
    sequence, _ = cold(model, method, PROMPT[:length])
    generate(sequence, 3)
    assert isinstance(sequence, SelectingSequence)
    assert sequence.selected is not None
    assert sequence.selected.length == length + 3


NEUTRAL = {
    "zipcache": (Pipeline.of(ZipCache.neutral()), ZipCacheCodec(ZipCache.neutral())),
    "h2o": (Pipeline.of(H2O.neutral()), ExactCodec()),
    "zipvl": (Pipeline.of(ZipVL.neutral()), ExactCodec()),
    "gate": (Pipeline.of(AttentionGate.neutral()), ZipCacheCodec(ZipCache.neutral())),
    "all": (
        Pipeline.of(ZipCache.neutral(), H2O.neutral(), ZipVL.neutral(), AttentionGate.neutral()),
        ZipCacheCodec(ZipCache.neutral()),
    ),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize(("pipeline", "codec"), NEUTRAL.values(), ids=NEUTRAL)
def test_neutral_settings_give_the_dense_model_s_logits(models, family, pipeline, codec):
    model = models[family]
    sequence, _ = cold(model, Method(codec, pipeline=gated(model, pipeline)))
    tokens, logits = generate(sequence)
    dense = model.new_cache(200)
    model.forward(dense, PROMPT[:-1])
    expected = model.forward_all(dense, [PROMPT[-1], *tokens[:-1]])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert sequence.kept_fraction == 1.0


def test_what_depends_on_the_whole_prompt_is_stored_for_that_prompt_alone(models, profile):
    model = models["llama"]
    method = Method(codec_of("zipcache", profile), pipeline=PIPELINES["zipvl"])
    other = [*PROMPT[:-1], (PROMPT[-1] + 1) % 90]
    scopes = [new_sequence(model, method, ids).scope for ids in (PROMPT, other, PROMPT)]
    assert scopes[0] == scopes[2]
    assert scopes[0] != scopes[1]
    shared = Method(codec_of("zipcache", profile), pipeline=Pipeline.of(EVICT, ZipCache()))
    assert new_sequence(model, shared, PROMPT).scope == new_sequence(model, shared, other).scope


def test_zipvl_leaves_out_of_blocks_what_did_not_matter(models, profile):
    model = models["llama"]
    stage = ZipVL(tau=0.7, min_tokens=10, rest="evict")
    method = Method(codec_of("calibrated", profile), pipeline=Pipeline.of(stage))
    whole = Method(codec_of("calibrated", profile), pipeline=Pipeline.of(ZipVL(min_tokens=10)))
    sequence, sealed = cold(model, method)
    assert isinstance(sequence, SelectingSequence)
    assert sequence.kept is not None
    assert 0.2 < sequence.kept_fraction < 0.98
    assert (sequence.kept == sequence.kept[:, :1]).all()  # one set for all heads
    assert sum(b.num_bytes for b in sealed) < sum(b.num_bytes for b in cold(model, whole)[1])
    fetched = warm(model, method, sealed)
    assert isinstance(fetched, SelectingSequence)
    assert torch.equal(fetched.kept, sequence.kept)


def test_g8_a_head_caches_what_its_gate_keeps_and_what_is_protected(models, profile):
    model = models["llama"]
    stage = AttentionGate(keep_first=3)
    method = Method(codec_of("calibrated", profile), pipeline=gated(model, Pipeline.of(stage)))
    sequence, sealed = cold(model, method)
    assert isinstance(sequence, SelectingSequence)
    assert sequence.kept is not None
    assert sequence.kept[..., :3].all()
    first_layer = method.codec.first_layer
    assert sequence.kept[:first_layer].all()
    assert 0.2 < sequence.kept[first_layer:].float().mean() < 0.8
    assert (sequence.kept[first_layer:, 0] != sequence.kept[first_layer:, 1]).any()
    generate(sequence, 3)
    assert sequence.selected is not None
    for layer in range(model.spec.num_layers):
        for head, positions in enumerate(sequence.selected.positions(layer)):
            gated_ones = sequence.kept[layer, head].nonzero().flatten().tolist()
            assert positions == [*gated_ones, *range(128, len(PROMPT) + 3)]
    whole = Method(codec_of("calibrated", profile))
    assert sum(b.num_bytes for b in sealed) < sum(b.num_bytes for b in cold(model, whole)[1])


def test_the_shipped_gates_are_those_of_the_default_model(smollm2: Model):
    assert smollm2.gates is not None
    method = from_preset("attention-gate", smollm2.profile, smollm2.gates)
    sentence = "The cache holds the keys and values of every block once. "
    prompt = smollm2.tokenizer.encode(sentence * 20)[:150]
    sequence, sealed = cold(smollm2, method, prompt)
    assert len(sealed) == 2
    assert 0.1 < sequence.kept_fraction < 0.9


def test_gates_of_another_model_are_no_gates(models, profile):
    pipeline = gated(models["llama"], Pipeline.of(AttentionGate()))
    method = Method(codec_of("calibrated", profile), pipeline=pipeline)
    with pytest.raises(GateError, match="another model"):
        new_sequence(models["qwen2"], method, PROMPT)


def test_zipvl_gives_its_important_tokens_the_high_bits(models):
    model, stage = models["llama"], ZipCache(high_bits=16, low_bits=1)
    pipeline = Pipeline.of(ZipVL(tau=0.7, min_tokens=10), stage)
    sequence = new_sequence(model, Method(ZipCacheCodec(stage), pipeline=pipeline), PROMPT)
    for _ in sequence.compute(128):
        pass
    assert isinstance(sequence, SelectingSequence)
    matter = sequence.important
    assert matter is not None
    before = sequence.cache.read(0, 128)[0].clone()
    sequence.settle(sequence.seal(0, 2))
    same = (sequence.cache.read(0, 128)[0] == before).all(-1)
    assert torch.equal(same, matter[:, None].expand_as(same))


def test_zipcache_weighs_tokens_by_its_own_probes(models, profile):
    model, codec = models["llama"], codec_of("zipcache", profile)
    stage = ZipCache(recent_probes=3, random_probes=7, seed=5)
    sequence = new_sequence(model, Method(codec, pipeline=Pipeline.of(stage)), PROMPT)
    for _ in sequence.compute(128):
        pass
    assert isinstance(sequence, SelectingSequence)
    scores = sequence.scores
    assert scores is not None
    assert torch.equal(scores.rows, stage.probes(128))
    tags = codec.tags(
        [{s: Frame.open(f) for s, f in b.frames.items()} for b in sequence.seal(0, 2)]
    )
    from kvstrata.methods.saliency_tag import encode_tags

    assert torch.equal(tags.flatten(1), encode_tags(scores.saliency.mean(1)))


def test_v9_what_is_generated_is_compressed_without_touching_what_was(models, profile):
    model = models["llama"]
    method = Method(codec_of("zipcache", profile), pipeline=Pipeline.of(ZipCache()))
    sequence, _ = cold(model, method)
    logits, sealed = sequence.extend(PROMPT[128:])
    before = [x.clone() for x in sequence.cache.read(0, 128)]
    while not sealed:
        logits, sealed = sequence.extend([int(logits.argmax())])
    assert [b.identity.first_position for b in sealed] == [128]
    assert all(map(torch.equal, before, sequence.cache.read(0, 128)))


def test_calibrated_codec_is_the_one_that_a_profile_gives(profile):
    assert isinstance(codec_of("calibrated", profile), CalibratedCodec)


def test_blocks_that_depend_on_their_prompt_are_loaded_all_or_none(models, profile):
    model = models["llama"]
    method = Method(codec_of("zipcache", profile), pipeline=PIPELINES["zipvl evicts"])
    first, sealed = cold(model, method)
    tokens, _ = generate(first)
    frames = [{s: Frame.open(f) for s, f in b.frames.items()} for b in sealed]
    partial = new_sequence(model, method, PROMPT)
    assert partial.load(frames[:1]) == Loaded(0, "incomplete_prompt")
    broken = new_sequence(model, method, PROMPT)
    assert broken.load([frames[0], {}]).num_blocks == 0
    assert broken.cache.length == 0
    for sequence in (partial, broken):
        for _ in sequence.compute(128):
            pass
        sequence.settle(sequence.seal(0, 2))
        assert generate(sequence)[0] == tokens
