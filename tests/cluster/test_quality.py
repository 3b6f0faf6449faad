import math

import pytest
import torch

from kvstrata.cluster.quality import (
    FACTS_PER_CONTEXT,
    compress,
    kl_divergence,
    plant_facts,
    prefilled,
    recall,
    teacher_forced,
)
from kvstrata.engine.model import Model
from kvstrata.methods.presets import from_preset

TEXT = "\n\n".join(f"p{i}" for i in range(12))


def test_planted_facts_are_in_the_text_once_and_repeat_with_the_seed() -> None:
    text, facts = plant_facts(TEXT, 3)
    assert len(facts) == len({fact.subject for fact in facts}) == FACTS_PER_CONTEXT
    for fact in facts:
        assert text.count(fact.statement) == 1
        assert len(fact.digits) == 5
        assert fact.statement.startswith(fact.cue.strip())
    assert plant_facts(TEXT, 3) == (text, facts)
    assert plant_facts(TEXT, 4)[1] != facts
    assert [p for p in text.split("\n\n") if p.startswith("p")] == TEXT.split("\n\n")


def test_divergence_is_the_mean_over_rows_and_takes_the_first_as_the_truth() -> None:
    first = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    second = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    forth, back = math.log(4 / 3) / 2, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert kl_divergence(first, second) == pytest.approx(forth / 2, abs=1e-6)
    assert kl_divergence(second, first) == pytest.approx(back / 2, abs=1e-6)


def test_a_lossless_method_changes_no_probability(model: Model) -> None:
    text, facts = plant_facts(TEXT, 0)
    recalled = list(recall(model, from_preset("exact"), text, facts))
    assert [r.fact for r in recalled] == facts
    assert all(r.compressed == r.reference for r in recalled)


def test_a_lossy_method_changes_little_and_is_smaller(model: Model) -> None:
    ids = model.tokenizer.encode(TEXT * 4)
    rest = ids[:20]
    sequence = prefilled(model, from_preset("balanced"), ids)
    before = teacher_forced(sequence, ids, rest)
    held = sequence.cache.length
    num_bytes = compress(sequence)
    assert sequence.cache.length == held
    assert 0 < kl_divergence(before, teacher_forced(sequence, ids, rest)) < 0.05
    assert 0 < num_bytes < held * model.spec.kv_bytes_per_token_bf16
