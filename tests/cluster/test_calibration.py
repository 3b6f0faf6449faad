"""Making a profile: seeded, resumable, and told as JSON and as a picture."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from kvstrata.cluster import calibration
from kvstrata.cluster.calibrate import calibrate as command
from kvstrata.cluster.calibration import (
    RATE_WIDTHS,
    CalibrationPlan,
    calibrate,
    cut_segments,
    extend,
    threshold_of_width,
)
from kvstrata.cluster.calibration_plot import plot_widths
from kvstrata.engine import Model
from kvstrata.engine.cache_statistics import CacheStatistics
from kvstrata.engine.layer_samples import LayerSamples
from kvstrata.methods.bit_allocation import VALUE_WEIGHT, allocate
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.predicted import PredictedCodec
from kvstrata.methods.profile import SUFFIX, load_profile, read_arrays, write_arrays
from kvstrata.protos.errors import ConfigurationError, InvalidRequestError
from tests.methods.profiles import blocks_of, make_profile

SENTENCE = "the cache holds keys and values of every block once, and reads them at any precision"
TEXTS = [" ".join(random.Random(seed).choices(SENTENCE.split(), k=400)) for seed in range(3)]
PLAN = CalibrationPlan(
    num_segments=3, context=128, continuation=24, num_rate_segments=1, num_prediction_segments=3
)


@pytest.fixture(autouse=True)
def fewer_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "RATE_WIDTHS", (0.6, 1.6, 3.4))
    monkeypatch.setattr(calibration, "PREDICTED_WIDTHS", (0.5, 2.0))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    """A model of its own: nodes pack theirs, and a packed model has no gradients."""
    return Model.load(str(model_folder), dtype="auto", device="auto")


class Log:
    """The progress callback: remembers what it was told, and fails where it is told to."""

    def __init__(self, fails_at: tuple[str, int] | None = None) -> None:
        self.told: list[tuple[str, int, int]] = []
        self.fails_at = fails_at

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.told.append((stage, done, total))
        if (stage, done) == self.fails_at:
            raise InterruptedError

    def stage(self, name: str) -> list[int]:
        return [done for stage, done, _ in self.told if stage == name]


def test_predictions_too_large_for_a_profile_are_refused_before_any_work() -> None:
    """A profile that cannot be loaded once replaced a good one, after hours."""
    spec = SimpleNamespace(num_layers=32, num_kv_heads=32, head_dim=128, max_positions=4096)
    llama_2_7b: Any = SimpleNamespace(spec=spec)
    plan = CalibrationPlan(num_prediction_segments=96)
    with pytest.raises(InvalidRequestError, match="8192 MiB"):
        calibration._check_plan(llama_2_7b, plan)
    calibration._check_plan(llama_2_7b, replace(plan, num_prediction_segments=0))


def test_a_calibrated_model_has_a_usable_profile(model: Model, tmp_path: Path) -> None:
    log = Log()
    path = calibrate(model, TEXTS, PLAN, tmp_path / "new", log)
    assert path == tmp_path / "new" / f"{model.model_id.hex()}{SUFFIX}"
    profile = load_profile(path)
    assert (profile.model_id, profile.first_layer) == (model.model_id, 1)
    spec = model.spec
    assert profile.shape == (spec.num_layers - 1, spec.num_kv_heads, spec.head_dim)
    assert set(profile.keys) == {"pre", "frame"}
    assert model.name in profile.note
    assert profile.rates.shape == (3, 3)
    thresholds, bits, divergences = profile.rates.T
    assert (np.diff(thresholds) > 0).all()
    assert (np.diff(bits) < 0).all()
    assert 1 < bits[-1] < bits[0] < 16
    assert divergences[-1] > divergences[0] > 0
    assert log.stage("gradients") == [0, 1, 2, 3]
    assert log.stage("samples") == [0, 1, 2, 3]
    assert log.told[-1][1] == log.told[-1][2]
    assert profile.prediction is not None
    assert profile.prediction.rates.shape == (2, 3)
    assert (np.diff(profile.prediction.rates, axis=0)[:, 1] < 0).all()
    assert PredictedCodec(profile, profile.rates[1, 0]).encode(blocks_of(profile, 1))
    codec = CalibratedCodec(profile, profile.threshold_for_bits(2.0))
    assert codec.encode(blocks_of(profile, 1))


def test_an_interrupted_calibration_goes_on_and_gives_the_same_profile(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[int] = []
    add = CacheStatistics.add

    def counted(self: CacheStatistics, *arguments: object) -> None:
        added.append(self.num_segments)
        add(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CacheStatistics, "add", counted)
    whole = load_profile(calibrate(model, TEXTS, PLAN, tmp_path / "whole", Log()))
    assert added == [0, 1, 2]
    folder = tmp_path / "parts"
    for fails_at, done in ((("gradients", 1), [0]), (("gradients", 2), [1]), (("rates", 1), [2])):
        added.clear()
        with pytest.raises(InterruptedError):
            calibrate(model, TEXTS, PLAN, folder, Log(fails_at))
        assert added == done
        assert not list(folder.glob(f"*{SUFFIX}"))
    added.clear()
    log = Log()
    resumed = load_profile(calibrate(model, TEXTS, PLAN, folder, log))
    assert added == []
    assert log.stage("gradients") == [3]
    assert resumed.profile_id == whole.profile_id


def test_prediction_is_learnt_anew_without_touching_the_rest(model: Model, tmp_path: Path) -> None:
    plain_plan = replace(PLAN, num_prediction_segments=0)
    plain = load_profile(calibrate(model, TEXTS, plain_plan, tmp_path / "plain", Log()))
    assert plain.prediction is None
    folder = tmp_path / "extended"
    with pytest.raises(InterruptedError):
        extend(model, plain, TEXTS, PLAN, folder, Log(("samples", 2)))
    log = Log()
    extended = load_profile(extend(model, plain, TEXTS, PLAN, folder, log))
    assert log.stage("samples") == [2, 3]
    assert extended.prediction is not None
    assert extended.transform_id == plain.profile_id != extended.profile_id
    whole = load_profile(calibrate(model, TEXTS, PLAN, tmp_path / "whole", Log()))
    assert whole.profile_id == extended.profile_id
    assert [path.suffix for path in folder.iterdir()] == [".npz"]


def test_samples_of_another_run_or_cut_short_are_made_again(model: Model, tmp_path: Path) -> None:
    segment = cut_segments(model.tokenizer, TEXTS, PLAN, 1, seed=0)[0]
    samples = LayerSamples(model, 1, tmp_path / "a", "one")
    samples.add(segment)
    samples.add(segment)
    whole = samples.read(1)
    assert torch.equal(whole[: len(whole) // 2], whole[len(whole) // 2 :])
    again = LayerSamples(model, 1, tmp_path / "a", "one")
    assert (again.num_segments, again.num_tokens) == (2, len(whole))
    assert torch.equal(again.read(1), whole)
    assert LayerSamples(model, 1, tmp_path / "a", "two").num_segments == 0
    path = tmp_path / "a" / "layer-001.f16"
    path.write_bytes(path.read_bytes()[:-2])
    assert LayerSamples(model, 1, tmp_path / "a", "one").num_segments == 0
    path.unlink()
    assert LayerSamples(model, 1, tmp_path / "a", "one").num_segments == 0
    (tmp_path / "a" / "done.npz").write_bytes(b"PK")
    assert LayerSamples(model, 1, tmp_path / "a", "one").num_segments == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another file", "an array less"])
def test_a_damaged_state_is_told_by_name_and_calibration_starts_anew(
    model: Model, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InterruptedError):
        calibrate(model, TEXTS, PLAN, tmp_path, Log(("gradients", 2)))
    (state,) = tmp_path.glob("*.state.npz")
    whole = state.read_bytes()
    if damage == "an array less":
        arrays = read_arrays(state, len(whole))
        del arrays["value.metric"]
        write_arrays(state, arrays)
    else:
        middle = len(whole) // 2
        state.write_bytes(
            {
                "cut": whole[:middle],
                "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
                "empty": b"",
                "another file": b"text",
            }[damage]
        )
    log = Log(("gradients", 3))
    with pytest.raises(InterruptedError):
        calibrate(model, TEXTS, PLAN, tmp_path, log)
    assert log.stage("gradients") == [0, 1, 2, 3]
    (record,) = caplog.records
    assert str(state) in record.getMessage()
    assert state.read_bytes() != whole  # of three segments now
    again = Log(("gradients", 3))
    with pytest.raises(InterruptedError):
        calibrate(model, TEXTS, PLAN, tmp_path, again)
    assert again.stage("gradients") == [3]


def test_a_second_calibration_into_a_folder_replaces_the_first(
    model: Model, tmp_path: Path
) -> None:
    first = load_profile(calibrate(model, TEXTS, PLAN, tmp_path, Log()))
    again = load_profile(calibrate(model, TEXTS, PLAN, tmp_path, Log()))
    other = load_profile(calibrate(model, TEXTS, replace(PLAN, seed=1), tmp_path, Log()))
    assert first.profile_id == again.profile_id != other.profile_id
    stem = model.model_id.hex()
    assert {p.name for p in tmp_path.iterdir()} == {f"{stem}{SUFFIX}", f"{stem}.state.npz"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1 << 20}, r"exceed the model's \d+ positions"),
        ({"num_segments": 1, "context": 5, "continuation": 1}, "too few for heads"),
        ({"num_segments": 9, "context": 9, "num_prediction_segments": 1}, "too few to predict"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused_at_once(
    model: Model, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        calibrate(model, TEXTS, replace(PLAN, **changes), tmp_path / "new", Log())
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_told_by_name(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="file"):
        calibrate(model, TEXTS, PLAN, tmp_path / "file", Log())


def test_another_plan_starts_anew(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        calibrate(model, TEXTS, PLAN, tmp_path, Log(("gradients", 2)))
    log = Log(("gradients", 3))
    with pytest.raises(InterruptedError):
        calibrate(model, TEXTS, replace(PLAN, seed=1), tmp_path, log)
    assert log.stage("gradients") == [0, 1, 2, 3]


def test_segments_are_drawn_by_the_seed_and_from_all_texts(model: Model) -> None:
    plan = replace(PLAN, num_segments=8)
    segments = cut_segments(model.tokenizer, TEXTS, plan, 8, seed=0)
    assert cut_segments(model.tokenizer, TEXTS, plan, 8, seed=0) == segments
    assert cut_segments(model.tokenizer, TEXTS, plan, 8, seed=1) != segments
    assert cut_segments(model.tokenizer, TEXTS, replace(plan, seed=1), 8, seed=0) != segments
    assert len(segments) == 8
    for number, segment in enumerate(segments):
        assert len(segment.context) == 128
        assert 0 < len(segment.continuation) <= 24
        if (number + number // 3) % 2 == 0:  # the others have records planted
            assert segment.weight == 1
            text = model.tokenizer.decode(segment.context + segment.continuation)
            assert text in TEXTS[number % 3]


def test_planted_records_are_asked_for_at_the_end(model: Model) -> None:
    plan = replace(PLAN, context=600, continuation=400)
    segment = cut_segments(model.tokenizer, TEXTS, plan, 4, seed=0)[1]
    asked = model.tokenizer.decode(segment.continuation).strip().splitlines()
    context = model.tokenizer.decode(segment.context)
    assert len(asked) == 10
    assert sum(record in context for record in asked[:-1]) >= 6  # the last may be cut


def test_texts_that_are_too_short_are_refused_or_left_out(model: Model, tmp_path: Path) -> None:
    for texts in ([], ["", "short"], [TEXTS[0][:151]]):
        with pytest.raises(InvalidRequestError, match="152 tokens long") as refusal:
            calibrate(model, texts, PLAN, tmp_path, Log())
        assert "--context" in refusal.value.remedy
    exact = TEXTS[0][:152]
    for segment in cut_segments(model.tokenizer, ["short", exact], PLAN, 3, seed=0):
        assert len(segment.context + segment.continuation) == 152


@pytest.mark.parametrize("width", RATE_WIDTHS)
def test_the_threshold_of_a_width_gives_that_width(width: float) -> None:
    profile = make_profile(2, 2, 64)
    threshold = threshold_of_width(profile.keys["pre"], profile.values, width)
    keys = allocate(profile.keys["pre"], threshold)
    values = allocate(profile.values, threshold, weight=VALUE_WEIGHT)
    assert (keys.mean_width + values.mean_width) / 2 == pytest.approx(width, abs=0.03)
    assert float(f"{threshold:.2e}") == threshold


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(command)
    return app


def test_the_command_prints_json_and_draws(
    app: typer.Typer, model: Model, model_folder: Path, tmp_path: Path
) -> None:
    files = []
    for number, text in enumerate(TEXTS):
        files += ["--text", str(tmp_path / f"{number}.txt")]
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    sizes = ["--segments", "2", "--context", "128", "--continuation", "32", "--rate-segments", "1"]
    sizes += ["--prediction-segments", "3"]
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, [*files, *sizes, "--model", str(model_folder), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    profile = load_profile(Path(told["profile"]))
    assert Path(told["profile"]).parent == out
    assert told["profile_id"] == profile.profile_id
    assert Path(told["plot"]).read_bytes().startswith(b"\x89PNG")
    assert [list(rate) for rate in told["rates"]] == [["threshold", "bits", "kl"]] * 3
    for rate, row in zip(told["rates"], profile.rates.tolist(), strict=True):
        assert list(rate.values()) == pytest.approx(row, abs=1e-4)


@pytest.mark.parametrize("contents", [None, b"\xff\xfe\x00"])
def test_files_that_are_no_text_are_told_by_name(
    app: typer.Typer, contents: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    if contents is not None:
        path.write_bytes(contents)
    done = CliRunner().invoke(app, ["--text", str(path)])
    assert isinstance(done.exception, ConfigurationError)
    assert str(path)[:100] in str(done.exception)


def test_a_picture_is_drawn_of_a_single_layer_and_head(tmp_path: Path) -> None:
    picture = plot_widths(make_profile(1, 1, 16), tmp_path / "a.png")
    assert picture.stat().st_size > 5000
