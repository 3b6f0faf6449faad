"""Sampling parameters and the choice of a token."""

from typing import Any

import pytest
import torch

from kvstrata.engine import SamplingParams, sample

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 3


def _draws(params: SamplingParams, steps: range, logits: torch.Tensor = LOGITS) -> list[int]:
    return [sample(logits, params, step) for step in steps]


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    assert sample(torch.tensor([0.0, 2.0, 1.0, 2.0]), SamplingParams(), 0) == 1


def test_a_seeded_draw_depends_on_the_step_only() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    whole = _draws(params, range(40))
    assert _draws(params, range(25, 40)) == whole[25:]
    assert len(set(whole)) > 5
    assert _draws(SamplingParams(temperature=1.0, seed=8), range(40)) != whole


def test_draws_without_a_seed_differ() -> None:
    params = SamplingParams(temperature=2.0)
    assert _draws(params, range(40)) != _draws(params, range(40))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.0, 0.2]).log()
    drawn = torch.tensor(_draws(SamplingParams(temperature=1.0, seed=1), range(4000), logits))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.0, 0.2]), atol=0.03, rtol=0)


def test_top_k_and_top_p_keep_only_the_most_probable() -> None:
    best = LOGITS.argsort(descending=True).tolist()
    top_k = _draws(SamplingParams(temperature=2.0, top_k=3, seed=1), range(200))
    assert set(top_k) == set(best[:3])
    probabilities = LOGITS.softmax(0)
    nucleus = _draws(SamplingParams(temperature=1.0, top_p=0.6, seed=1), range(300))
    num_kept = int((probabilities[best].cumsum(0) < 0.6).sum()) + 1
    assert set(nucleus) <= set(best[:num_kept])
    tiny = SamplingParams(temperature=2.0, top_p=1e-9, seed=1)
    assert set(_draws(tiny, range(20))) == {best[0]}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    params = SamplingParams(temperature=1e-300, seed=1)
    assert set(_draws(params, range(5))) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_without_a_finite_maximum_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="cannot sample"):
        sample(torch.full((4,), value), SamplingParams(), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**9),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("seed", 1 << 64),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop", "text"),
        ("stop", ("x" * 1025,)),
    ],
)
def test_wrong_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value}).validate()


def test_the_defaults_and_the_limits_are_valid() -> None:
    SamplingParams().validate()
    SamplingParams(
        max_tokens=1, temperature=2, top_p=1, top_k=5, seed=-(1 << 63), stop=("a",) * 16
    ).validate()
    assert isinstance(sample(LOGITS, SamplingParams(temperature=1.0, seed=-5), 0), int)
