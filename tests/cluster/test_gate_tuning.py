"""Training gates: only they change, they end at the keep rate, and a second run resumes."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvstrata.cluster.gate_passes import GatedPass, GateParameters
from kvstrata.cluster.gate_plan import Example, GatePlan, answered, cut
from kvstrata.cluster.gate_tuning import TunedGates, measure, tune_gates
from kvstrata.cluster.gate_warmup import importance, observe
from kvstrata.cluster.tune import app
from kvstrata.engine import Model
from kvstrata.methods.attention_gate import AttentionGate
from kvstrata.methods.gate_weights import SUFFIX, load_gates
from kvstrata.protos.errors import ConfigurationError, InvalidRequestError, LimitError
from tests.engine.test_sequence import one_thread

__all__ = ["one_thread"]

SENTENCE = "the cache holds keys and values of every block once, and reads them at any precision"
TEXT = " ".join(random.Random(0).choices(SENTENCE.split(), k=1200))
PLAN = GatePlan(
    length=192,
    num_steps=24,
    learning_rate=1e-2,
    warm_steps=30,
    num_cached=4,
    gate_heads=2,
    gate_dim=4,
    num_measured=2,
)


def quietly(*_: object) -> None:
    pass


@pytest.fixture
def tiny(model_folder: Path) -> Model:
    """A model of its own: an adapter changes it."""
    return Model.load(str(model_folder), dtype=torch.float32, device="cpu")


def tuned(model: Model, out: Path, plan: GatePlan = PLAN, tell=quietly) -> TunedGates:
    return tune_gates(model, [cut(model, TEXT, plan)], plan, out, tell)


def test_gates_end_near_the_keep_rate_and_in_a_file(tiny: Model, tmp_path: Path) -> None:
    result = tuned(tiny, tmp_path)
    saved = load_gates(tmp_path / f"{tiny.model_id.hex()}{SUFFIX}")
    assert saved.gates_id == result.gates.gates_id
    assert (len(result.warm_losses), len(result.losses), len(result.keep_rates)) == (30, 24, 24)
    assert result.warm_losses[-1] < result.warm_losses[0]
    assert 0.2 < result.keep_rates[-1] < 0.8
    assert result.measured["full"].kept_fraction == 1.0
    assert 0.2 < result.measured["gated"].kept_fraction < 0.8


def test_g9_only_gates_have_a_gradient_while_the_base_is_frozen(tiny: Model) -> None:
    gates = GateParameters(tiny, PLAN)
    example = cut(tiny, TEXT, PLAN)[0]
    state = GatedPass(gates, PLAN, AttentionGate(), example.num_gated)
    loss = tiny.forward_through(state, example.ids[:-1]).float().square().mean()
    (loss + torch.cat(state.gates).mean()).backward()
    assert all(p.grad is not None for p in gates.parameters())
    weights = list(tiny._hf_model.parameters())
    assert weights
    assert all(p.grad is None and not p.requires_grad for p in weights)


def test_without_a_warm_up_gates_begin_by_keeping_all(tiny: Model, tmp_path: Path) -> None:
    plan = GatePlan(length=192, num_steps=1, warm_steps=0, num_measured=1)
    result = tuned(tiny, tmp_path, plan)
    assert result.warm_losses == []
    assert result.keep_rates[0] > 0.9


class StopError(Exception):
    pass


def test_a_second_run_goes_on_where_the_first_stopped(tiny: Model, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    def stop(stage: str, done: int, _: int) -> None:
        told.append((stage, done))
        if (stage, done) == ("training", 22):
            raise StopError

    with pytest.raises(StopError):
        tuned(tiny, tmp_path / "a", tell=stop)
    told.clear()
    again = tuned(tiny, tmp_path / "a", tell=lambda *now: told.append(now[:2]))
    assert told[0] == ("training", 20)
    whole = tuned(tiny, tmp_path / "b")
    assert again.gates.gates_id == whole.gates.gates_id
    assert again.keep_rates == whole.keep_rates


@pytest.mark.parametrize("change", ["text", "gated"])
def test_other_examples_start_anew(tiny: Model, tmp_path: Path, change: str) -> None:
    """Also with a warm-up alone, whose examples are others than those of the steps after."""
    plan = replace(PLAN, num_steps=0) if change == "text" else PLAN
    first = tuned(tiny, tmp_path, plan)
    examples = cut(tiny, TEXT[::-1] if change == "text" else TEXT, plan)
    if change == "gated":
        examples = [replace(example, num_gated=example.num_gated // 2) for example in examples]
    other = tune_gates(tiny, [examples], plan, tmp_path, quietly)
    assert other.gates.gates_id != first.gates.gates_id


def test_importance_is_what_later_blocks_attend_to() -> None:
    queries, keys, values = torch.randn(4, 150, 8), torch.randn(2, 150, 8), torch.randn(2, 150, 8)
    output, found = importance(queries, keys, values, 0.3)
    scores = queries @ keys.repeat_interleave(2, 0).transpose(1, 2) * 0.3
    weights = scores.masked_fill(torch.ones(150, 150).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(output, weights @ values.repeat_interleave(2, 0))
    mass = weights[:, 128:, 70].mean(1).view(2, 2).mean(1)  # token 70 is of block 1
    torch.testing.assert_close(found[:, 70], mass * values[:, 70].norm(dim=-1))
    assert not found[:, 128:].any()


def test_targets_are_standardised_and_leave_out_what_has_none(tiny: Model) -> None:
    seen = observe(tiny, cut(tiny, TEXT, PLAN)[:3], quietly)
    targets = torch.cat([one.target for one in seen], dim=-1)
    counted = targets.isfinite()
    assert counted.float().mean() == pytest.approx(124 / 192)
    assert targets[counted].mean().abs() < 1e-4


def test_supervised_examples_count_their_answers_alone(tiny: Model, tmp_path: Path) -> None:
    example = answered(tiny, "a question that is asked? " * 8, "its answer")
    assert example.first_counted == example.num_gated - 1
    plan = GatePlan(
        length=192, num_steps=2, warm_steps=2, num_cached=1, num_measured=1, rank=2,
        bidirectional=True, window=0,
    )  # fmt: skip
    result = tune_gates(tiny, [[example]], plan, tmp_path, quietly)
    assert result.gates.needs_whole_prompt
    assert (tmp_path / "adapter").is_dir()


def test_measuring_without_gates_is_the_dense_model(tiny: Model) -> None:
    example = Example(list(range(40, 90)), 49)
    found = measure(tiny, None, [example])
    logits = tiny.forward_all(tiny.new_cache(49), example.ids[:-1])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(example.ids[1:]))
    assert found.loss == pytest.approx(expected.item(), abs=1e-4)


def test_what_cannot_be_trained_on_is_refused_before_any_work(tiny: Model, tmp_path: Path) -> None:
    for groups in ([], [[]], [cut(tiny, "", PLAN)], [cut(tiny, "too short", PLAN)]):
        with pytest.raises(InvalidRequestError, match="nothing to train on"):
            tune_gates(tiny, groups, PLAN, tmp_path / "none", quietly)
    assert not (tmp_path / "none").exists()
    for prompt, answer in (("", "yes"), ("what?", "")):
        with pytest.raises(InvalidRequestError, match="lacks its"):
            answered(tiny, prompt, answer)
    with pytest.raises(InvalidRequestError, match="the model takes"):
        answered(tiny, TEXT, "yes")
    for settings in ({"keep_rate": 0.0}, {"keep_rate": 1.5}, {"loss": "none"}, {"window": 48}):
        with pytest.raises(LimitError):
            GatePlan(**settings)


def test_the_command_writes_gates_and_plots(model_folder: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "gates"
    text.write_text(TEXT)
    options = ["--model", str(model_folder), "--out", str(out), "--length", "128"]
    options += ["--warm-steps", "3", "--cached", "2", "--steps", "3", "--measured", "1"]
    done = CliRunner().invoke(app, ["gate", *options, "--text", str(text)])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kept"]["full"] == 1.0
    assert (out / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.glob(f"*{SUFFIX}"))
    broken = tmp_path / "examples.jsonl"
    broken.write_text('{"prompt": "a"}\n')
    refused = CliRunner().invoke(app, ["gate", *options, "--examples", str(broken)])
    assert isinstance(refused.exception, ConfigurationError)
