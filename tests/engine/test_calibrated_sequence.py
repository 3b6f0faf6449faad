"""Sequences under the calibrated codec in both forms, and which profile a model gets."""

import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from kvstrata.engine import Model, model_tables, storage
from kvstrata.engine.sequence import Loaded, RunningSequence
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.presets import Method
from kvstrata.methods.profile import SUFFIX, Profile, ProfileError, ProfileStore
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import RopeForm
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.engine.calibrating import profile_of
from tests.engine.test_sequence import (
    BASE,
    computed,
    greedy,
    loaded,
    one_thread,
    opened,
    prompt_of,
    tail,
)
from tests.methods.predictions import predicting_profile
from tests.methods.profiles import make_profile

__all__ = ["one_thread"]
CASES = [
    ("llama", "pre"),
    ("llama", "frame"),
    ("llama-yarn", "frame"),
    ("qwen3", "frame"),
    ("opt", "pre"),
]
each_case = pytest.mark.parametrize(("family", "form"), CASES, ids=["-".join(c) for c in CASES])


@pytest.fixture(scope="module")
def profiles(models: dict[str, Model]) -> dict[str, Profile]:
    return {family: profile_of(models[family]) for family, _ in CASES}


def method_of(profile: Profile, form: str = "pre") -> Method:
    """Return a method of a few bits, whatever the scale of a random model's gradients."""
    sides = (profile.keys[form], profile.values)
    threshold = 0.01 * min(float(tables.variance.median()) for tables in sides)
    return Method(CalibratedCodec(profile, threshold, form))


@pytest.fixture
def method(profiles: dict[str, Profile], family: str, form: str) -> Method:
    return method_of(profiles[family], form)


@each_case
def test_a_loaded_cache_equals_the_settled_one(
    models: dict[str, Model], family: str, form: str, method: Method
) -> None:
    model, prompt = models[family], prompt_of()
    cold, sealed = computed(model, method, prompt)
    assert len(sealed) == 2
    warm = loaded(model, method, prompt, sealed)
    assert warm.cache.length == cold.cache.length == 2 * BLOCK_TOKENS
    for a, b in zip(cold.cache.read(0, 128), warm.cache.read(0, 128), strict=True):
        assert torch.equal(a[1:], b[1:])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tail(warm), tail(cold), rtol=1e-5, atol=1e-5)
    singly = RunningSequence(model, method, prompt)
    for frames in opened(sealed, method.wanted):
        assert singly.load([frames]) == Loaded(1, None)
    for a, b in zip(cold.cache.read(0, 128), singly.cache.read(0, 128), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_case
def test_settling_changes_little_and_base_alone_more(
    models: dict[str, Model], family: str, form: str, method: Method
) -> None:
    """Keys turned in a wrong way would come back as other keys."""
    model, prompt = models[family], prompt_of()
    sequence = RunningSequence(model, method, prompt)
    for _ in sequence.compute(128):
        pass
    before = [part.clone()[1:] for part in sequence.cache.read(0, 128)]
    sealed = sequence.seal(0, 2)
    sequence.settle(sealed)
    coarse = loaded(model, Method(method.codec, finest=BASE), prompt, sealed)
    assert not coarse.committable
    fine = [part[1:] for part in sequence.cache.read(0, 128)]
    rough = [part[1:] for part in coarse.cache.read(0, 128)]
    for put, better, worse in zip(before, fine, rough, strict=True):
        error, larger = ((read - put).square().mean() / put.var() for read in (better, worse))
        assert error < larger
        assert error < 0.15
    assert sequence.committable
    assert sequence.num_unencodable == 0


@each_case
def test_frames_tell_their_form_and_hold_no_first_layer(
    models: dict[str, Model], family: str, form: str, method: Method
) -> None:
    _, sealed = computed(models[family], method, prompt_of())
    wanted = {
        "pre": RopeForm.ROPE_FORM_NONE if family == "opt" else RopeForm.ROPE_FORM_PRE,
        "frame": RopeForm.ROPE_FORM_FRAME,
    }[form]
    for block in sealed:
        for frame in (Frame.open(data) for data in block.frames.values()):
            assert frame.header.rope == wanted
            assert list(frame.segments()) == [1, 2]


@each_case
def test_a_replay_goes_on_where_the_generation_was(
    models: dict[str, Model], family: str, form: str, method: Method
) -> None:
    model, prompt = models[family], prompt_of(120)
    first, sealed = computed(model, method, prompt)
    begun, logits, filled = greedy(first, tail(first), 75)
    assert [b.identity.first_position for b in filled] == [64, 128]
    known = prompt + begun
    tokens, _, _ = greedy(first, logits, 4)
    second = loaded(model, method, known, sealed + filled)
    replayed = tail(second)
    torch.testing.assert_close(replayed, logits, rtol=1e-4, atol=1e-4)
    assert greedy(second, replayed, 4)[0] == tokens


def test_blocks_of_one_form_are_foreign_to_the_other(
    models: dict[str, Model], profiles: dict[str, Profile]
) -> None:
    model, prompt = models["llama"], prompt_of()
    pre, frame = (method_of(profiles["llama"], form) for form in ("pre", "frame"))
    _, sealed = computed(model, pre, prompt)
    sequence = RunningSequence(model, frame, prompt)
    assert sequence.load(opened(sealed, frame.wanted)) == Loaded(0, "foreign")


def test_a_prompt_without_a_full_block_is_served(
    models: dict[str, Model], profiles: dict[str, Profile]
) -> None:
    method = method_of(profiles["llama"])
    sequence, sealed = computed(models["llama"], method, prompt_of(40))
    assert sealed == []
    assert sequence.committable
    assert tail(sequence).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_values_beyond_the_codec_are_attended_but_not_sealed(
    models: dict[str, Model], profiles: dict[str, Profile], bad: float
) -> None:
    method = method_of(profiles["llama"])
    sequence = RunningSequence(models["llama"], method, prompt_of())
    for _ in sequence.compute(128):
        pass
    sequence.cache.values[1, 0, 70, 3] = bad
    assert sequence.seal(0, 2) == []
    assert (sequence.committable, sequence.num_unencodable) == (False, 2)


@pytest.fixture
def fresh(models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model that has not looked for its profile yet, and a folder to look in."""
    monkeypatch.setenv("KVSTRATA_CACHE", str(tmp_path))
    monkeypatch.setattr(model_tables, "PROFILES", ProfileStore())
    storage.profile_folder().mkdir()
    model = copy.copy(models["llama"])
    model.__dict__.pop("profile", None)
    return model


def _save(profile: Profile) -> None:
    profile.save(storage.profile_folder() / f"{profile.model_id.hex()}{SUFFIX}")


def test_a_model_without_a_profile_says_so_once(
    fresh: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert fresh.profile is None
        assert fresh.profile is None
    (record,) = caplog.records
    assert "kvstrata calibrate" in record.message


def test_a_model_finds_its_profile_in_the_cache_folder(
    fresh: Model, profiles: dict[str, Profile], caplog: pytest.LogCaptureFixture
) -> None:
    _save(profiles["llama"])
    assert fresh.profile is not None
    assert fresh.profile.profile_id == profiles["llama"].profile_id
    assert fresh.profile is fresh.profile
    (record,) = caplog.records  # its presets need more bytes than they could
    assert "near-lossless and small use the calibrated codec" in record.message
    assert "kvstrata calibrate --extend" in record.message


def test_of_a_profile_that_can_predict_nothing_is_said(
    fresh: Model, caplog: pytest.LogCaptureFixture
) -> None:
    profile = dataclasses.replace(
        predicting_profile(2, 2, 8), model_id=fresh.model_id, first_layer=1
    )
    model_tables.PROFILES.add(profile)
    assert fresh.profile is profile
    assert not caplog.records


def test_a_profile_is_the_same_for_every_dtype(model_folders: dict[str, Path]) -> None:
    exact, rounded = (
        Model.load(str(model_folders["llama"]), dtype=dtype, device="cpu")
        for dtype in ("float32", "bfloat16")
    )
    assert exact.model_id == rounded.model_id
    assert len({exact.model_id, exact.fingerprint, rounded.fingerprint}) == 3
    assert len(exact.model_id) == 16


@pytest.mark.parametrize(
    ("shape", "first_layer"),
    [((2, 2, 16), 1), ((2, 1, 8), 1), ((1, 2, 8), 1), ((3, 2, 8), 1), ((2, 2, 8), 0)],
)
def test_a_profile_of_another_shape_is_refused(
    fresh: Model, shape: tuple[int, int, int], first_layer: int
) -> None:
    _save(make_profile(*shape, first_layer=first_layer, model_id=fresh.model_id))
    with pytest.raises(ProfileError, match="of another shape"):
        _ = fresh.profile


def test_a_profile_of_this_shape_is_taken_whichever_layers_it_leaves_out(fresh: Model) -> None:
    for layers, first_layer in ((1, 2), (3, 0), (2, 1)):
        profile = make_profile(layers, 2, 8, first_layer=first_layer, model_id=fresh.model_id)
        _save(profile)
        fresh.__dict__.pop("profile", None)
        model_tables.PROFILES.add(profile)
        assert fresh.profile is profile
        assert dataclasses.replace(profile).profile_id == profile.profile_id
