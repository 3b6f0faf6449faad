"""Training a few parameters: it lowers the loss, resumes exactly, and tells what is wrong."""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvstrata.cluster.model_check import load_served_model
from kvstrata.cluster.skipdecode_tuning import TuningPlan, answer_rows, tune
from kvstrata.cluster.tune import app
from kvstrata.cluster.tuning import Tuner, TuningSchedule
from kvstrata.cluster.tuning_plot import plot_losses
from kvstrata.engine import Model, ModelNotFoundError, UnsupportedModelError
from kvstrata.methods.presets import Method
from kvstrata.methods.skipdecode import SkipDecode
from kvstrata.prefill_node import WorkerConfig
from kvstrata.protos.errors import ConfigurationError, InvalidRequestError
from tests.prefill_node.nodes import EXACT, decoded, prompt_of, running, task_of

SENTENCE = "the cache holds keys and values of every block once, and reads them at any precision"
TEXT = " ".join(random.Random(0).choices(SENTENCE.split(), k=2500))
SCHEDULE = SkipDecode(max_layers=3, min_layers=2, decay_tokens=8)
PLAN = TuningPlan(prompt=8, answer=8, batch=2, num_steps=24, learning_rate=3e-2, num_measured=4)


def quietly(*_: object) -> None:
    pass


@pytest.fixture
def tiny(model_folder: Path) -> Model:
    """A model of its own: tuning changes it."""
    return Model.load(str(model_folder), dtype=torch.float32, device="cpu")


class Line:
    """A parameter that shall become its target; counts how often it was asked."""

    def __init__(self, state: Path, num_steps: int = 50, identity: str = "line") -> None:
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.asked = 0
        self.tuner = Tuner({"w": self.weight}, TuningSchedule(num_steps, 0.1), state, identity)

    def loss_of(self, step: int) -> Iterator[torch.Tensor]:
        for target in (1.0, 3.0):
            yield ((self.weight - target) ** 2).mean() / 2
        self.asked += 1

    def run(self) -> list[float]:
        return self.tuner.run(self.loss_of, quietly)


def test_the_loss_falls_and_the_curve_is_drawn(tmp_path: Path) -> None:
    line = Line(tmp_path / "state")
    losses = line.run()
    assert (len(losses), line.asked) == (50, 50)
    assert losses[-1] < losses[0] / 2
    picture = plot_losses({"loss": losses}, tmp_path / "loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = Line(tmp_path / "whole")
    expected = whole.run()
    first = Line(tmp_path / "cut")

    def interrupted(step: int) -> Iterator[torch.Tensor]:
        if step == 33:
            raise KeyboardInterrupt
        yield from first.loss_of(step)

    with pytest.raises(KeyboardInterrupt):
        first.tuner.run(interrupted, quietly)
    second = Line(tmp_path / "cut")
    assert second.run() == pytest.approx(expected)
    assert second.asked == 50 - 20  # saved every 20 steps
    assert torch.allclose(second.weight, whole.weight)
    third = Line(tmp_path / "cut")
    assert third.run() == pytest.approx(expected)
    assert third.asked == 0


@pytest.mark.parametrize("how", ["another identity", "damaged", "another shape"])
def test_what_is_not_of_this_training_is_not_taken_up(tmp_path: Path, how: str) -> None:
    Line(tmp_path / "state").run()
    line = Line(tmp_path / "state", identity="else" if how == "another identity" else "line")
    if how == "damaged":
        (tmp_path / "state").write_bytes(b"\xff" * 99)
    if how == "another shape":
        line.weight.data = torch.zeros(5)
    assert len(line.run()) == line.asked == 50


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    line = Line(tmp_path / "state")

    def bad(step: int) -> Iterator[torch.Tensor]:
        yield (line.weight * (float("nan") if step == 30 else 1.0)).sum()

    with pytest.raises(ArithmeticError, match="step 30"):
        line.tuner.run(bad, quietly)


def test_rows_of_an_answer_follow_the_budget_of_each_token() -> None:
    rows = answer_rows(SkipDecode(3, 2, decay_tokens=1), prompt=2, answer=3, num_layers=3)
    assert [r if r is None else r.tolist() for r in rows] == [None, [0, 1, 2], None]


def test_tuning_brings_the_schedule_near_the_full_model(
    tiny: Model, model_folder: Path, tmp_path: Path
) -> None:
    before = tiny.forward_once([5, 6, 7])
    tuned = tune(tiny, SCHEDULE, [TEXT], PLAN, tmp_path, quietly)
    assert tuned.measured["full"].kl == pytest.approx(0, abs=1e-6)
    assert tuned.measured["full"].top1 == 1
    assert tuned.measured["untuned"].kl > 0.01
    assert tuned.measured["tuned"].loss < tuned.measured["untuned"].loss
    with tiny.without_adapter():
        assert torch.equal(tiny.forward_once([5, 6, 7]), before)
    after = tiny.forward_once([5, 6, 7])
    assert not torch.allclose(after, before, atol=1e-2)

    folder = str(model_folder)
    plain = Model.load(folder, dtype=torch.float32, device="cpu")
    merged = Model.load(folder, adapter=str(tmp_path), dtype=torch.float32, device="cpu")
    assert (merged.fingerprint != plain.fingerprint, merged.model_id) == (True, plain.model_id)
    # The adapter is stored in bfloat16.
    assert (merged.forward_once([5, 6, 7]) - after).norm() < 0.05 * (after - before).norm()


def test_too_short_texts_and_wrong_schedules_are_refused_before_training(
    tiny: Model, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match="max_layers 9"):
        tune(tiny, SkipDecode(9, 2), [TEXT], PLAN, tmp_path, quietly)
    with pytest.raises(InvalidRequestError, match="no text is 16 tokens"):
        tune(tiny, SCHEDULE, ["short"], PLAN, tmp_path, quietly)
    with pytest.raises(InvalidRequestError, match="positions"):
        tune(tiny, SCHEDULE, [TEXT], TuningPlan(prompt=4096), tmp_path, quietly)
    assert not list(tmp_path.iterdir())


async def test_the_command_makes_an_adapter_that_a_node_serves(
    model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXT)
    options = {
        "--out": tmp_path / "out", "--text": tmp_path / "text", "--model": model_folder,
        "--speedup": 1.2, "--prompt": 8, "--answer": 8, "--steps": 3, "--measured": 1,
    }  # fmt: skip
    words = ["skipdecode", *(str(word) for pair in options.items() for word in pair)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["schedule"]["max_layers"] == 3
    assert set(told["measured"]) == {"full", "untuned", "tuned", "tuned_full"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "loss.png"} <= names
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None

    node = WorkerConfig("127.0.0.1:1", str(model_folder), adapter=str(tmp_path / "out"))
    schedule = SkipDecode(**told["schedule"])
    task = task_of(prompt_of(90), Method(EXACT.codec, skip=schedule), max_tokens=9)
    async with running(dataclasses.replace(node, num_threads=1)) as nodes:
        info = await nodes.decode.info()
        answer = await decoded(nodes.decode, task)
    assert answer.cache.layer_executions == schedule.executions(8)
    served = load_served_model(str(model_folder), "auto", node.adapter)
    assert served.fingerprint == info.fingerprint
    assert served.fingerprint != load_served_model(str(model_folder), "auto").fingerprint


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    words = ["skipdecode", "--out", str(tmp_path), "--text", str(tmp_path / "none")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigurationError)


@pytest.mark.parametrize(
    ("config", "weights", "error", "told"),
    [
        (None, None, ModelNotFoundError, "adapter_config.json and adapter_model.safetensors"),
        ('{"peft_type": "LORA"}', None, ModelNotFoundError, "adapter_model.safetensors missing"),
        ("{", b"", ModelNotFoundError, "damaged"),
        ('{"peft_type": "IA3"}', b"", UnsupportedModelError, "IA3"),
    ],
)
def test_a_folder_that_is_no_adapter_is_refused(
    model_folder: Path,
    tmp_path: Path,
    config: str | None,
    weights: bytes | None,
    error: type[Exception],
    told: str,
) -> None:
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    if weights is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(error, match=told):
        Model.load(str(model_folder), adapter=str(tmp_path), device="cpu")
