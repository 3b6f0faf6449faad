"""What `make bench-methods` compares: sizes are counted, gates asked, rows joined by key."""

import json
from pathlib import Path

import methods_catalogue
import pytest
import records
from methods_schemes import Evicted, Gated, Observed, by_gate, everything

from kvstrata.engine import Model
from kvstrata.methods.gate_weights import GATES, GateWeights
from kvstrata.methods.presets import from_preset
from tests.benchmarks.test_codec_measures import model
from tests.engine.test_sequence import one_thread
from tests.methods.gates import random_gates

__all__ = ["model", "one_thread"]
IDS = [3 + i * i % 80 for i in range(200)]


@pytest.fixture(scope="module")
def gates(model: Model) -> GateWeights:
    shape = (model.spec.num_layers, model.spec.num_kv_heads, model.width)
    GATES.add(random_gates(model.model_id, shape))
    assert model.gates is not None
    return model.gates


@pytest.fixture(scope="module")
def prompt(model: Model, gates: GateWeights) -> Observed:
    return Observed.observe(model, IDS)


def test_everything_costs_what_bf16_costs(prompt: Observed) -> None:
    stored = Evicted("uncompressed", 1.0, everything).store(prompt)
    assert stored.num_bits == prompt.scores.saliency.numel() * 2 * prompt.model.spec.head_dim * 16


def test_the_order_of_gates_fills_the_budget_and_keeps_the_newest(prompt: Observed) -> None:
    kept = by_gate(0.5)(prompt)
    assert (kept.sum(-1) == 100).all()
    assert kept[..., :4].all()
    assert kept[..., 150:].all()


def test_gates_are_served_as_requests_get_them(prompt: Observed, gates: GateWeights) -> None:
    stored = Gated(from_preset("attention-gate", None, gates), 0.5).store(prompt)
    whole = prompt.scores.saliency.numel() * 2 * prompt.model.spec.head_dim * 16
    assert 0.2 * whole < stored.num_bits < 0.95 * whole
    logits = prompt.model.forward_all(stored.cache, IDS[:3])
    assert logits.isfinite().all()


def test_a_short_run_leaves_out_what_only_a_full_one_has(gates: GateWeights) -> None:
    schemes = methods_catalogue.eviction((0.5, 0.3), 0, has_kvpress=True)
    schemes += methods_catalogue.gated(gates, None, (0.5, 0.3))
    found = {(s.name, s.budget) for s in schemes if methods_catalogue.is_short(s)}
    assert {("h2o", 0.3), ("random", 0.5), ("attention-gate", 0.5)} < found
    assert not {("random", 0.3), ("uniform", 0.5)} & found
    assert methods_catalogue.gated(None, None, (0.5,)) == []


def test_new_rows_take_the_place_of_those_with_the_same_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    old = [{"method": "a", "kl": 1}, {"method": "b", "kl": 2}]
    assert records.joined("none", old, ("method",), {}) == old
    records.save("some", old, seed=0)
    new = [{"method": "a", "kl": 3}]
    assert records.joined("some", new, ("method",), {"seed": 1}) == new  # another machine's, say
    found = records.joined("some", new, ("method",), {"seed": 0})
    assert found == [{"method": "b", "kl": 2}, {"method": "a", "kl": 3}]
    assert json.loads((tmp_path / "some.json").read_text())["seed"] == 0
