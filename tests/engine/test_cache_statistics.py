"""Statistics of the cache: gradients against finite differences, and keys in both forms."""

import numpy as np
import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.cache_statistics import SKIPPED_TOKENS, CacheStatistics, Segment
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.engine.calibrating import profile_of, segment_of
from tests.engine.families import ROTARY_FAMILIES

FAMILY_NAMES = ["llama", "llama-yarn", "qwen3", "opt"]
SKIP = slice(SKIPPED_TOKENS, None)


def _cache(model: Model, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
    cache = model.new_cache(len(segment.context))
    model.forward(cache, segment.context)
    keys, values = cache.read(0, cache.length)
    return keys.clone(), values.clone()


def _gathered(model: Model, segment: Segment, first_layer: int = 1) -> CacheStatistics:
    statistics = CacheStatistics(model, first_layer)
    statistics.add(segment, torch.Generator().manual_seed(0))
    return statistics


def _log_p(
    model: Model, keys: torch.Tensor, values: torch.Tensor, segment: Segment
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of the continuation that a seeded generator samples."""
    log_p = model.continue_over(keys, values, segment.continuation).double().log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    sample = torch.multinomial(log_p.detach().float().exp(), 1, generator=generator)
    return log_p.gather(-1, sample).sum(), sample


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_gradient_is_the_finite_difference_of_the_sampled_continuation(
    family: str, models: dict[str, Model]
) -> None:
    model, segment = models[family], segment_of(60, 12)
    keys, values = _cache(model, segment)
    statistics = CacheStatistics(model, 1)
    generator = torch.Generator().manual_seed(0)
    gradients = statistics._gradients(keys, values, segment.continuation, generator, 1)
    with torch.no_grad():
        _, sample = _log_p(model, keys, values, segment)

    def along(direction: torch.Tensor, side: int, step: float) -> float:
        moved = [keys.clone(), values.clone()]
        moved[side][1:] += step * direction
        with torch.no_grad():
            log_p = model.continue_over(moved[0], moved[1], segment.continuation)
        return float(log_p.double().log_softmax(-1).gather(-1, sample).sum())

    for side, gradient in enumerate(gradients):
        assert gradient.shape == keys[1:].shape
        direction = gradient / gradient.norm()
        step = 1e-2
        difference = (along(direction, side, step) - along(direction, side, -step)) / (2 * step)
        assert difference == pytest.approx(float(gradient.norm()), rel=0.03)


@pytest.mark.parametrize("family", ["llama", "llama-llama3-rope", "llama-yarn", "qwen3"])
def test_the_metric_of_keys_is_that_of_the_keys_before_rotation(
    family: str, models: dict[str, Model]
) -> None:
    """By autograd through the rotation itself, scalings of YaRN included."""
    model, segment = models[family], segment_of(60, 12)
    keys, values = _cache(model, segment)
    pre = model.rotate(keys, 0, inverse=True).requires_grad_()
    total, _ = _log_p(model, model.rotate(pre, 0), values, segment)
    (gradient,) = torch.autograd.grad(total, pre)
    felt = gradient[1:, :, SKIP].double()
    moments = _gathered(model, segment).sides["key_pre"]
    expected = felt.mT @ felt
    torch.testing.assert_close(
        moments.metric, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
    assert moments.num_gradients == felt.shape[2] == 56


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_keys_are_counted_in_the_forms_in_which_they_are_stored(
    family: str, models: dict[str, Model]
) -> None:
    """As ``RunningSequence.seal`` hands them to a codec."""
    model, segment = models[family], segment_of(150, 12)
    keys, values = _cache(model, segment)
    starts = torch.arange(150) // BLOCK_TOKENS * BLOCK_TOKENS
    stored = {
        "key_pre": model.rotate(keys, 0, inverse=True),
        "key_frame": model.rotate(keys, starts, inverse=True),
        "value": values,
    }
    sides = _gathered(model, segment).sides
    assert set(sides) == set(stored)
    for name, vectors in stored.items():
        seen = vectors[1:, :, SKIP].double()
        assert sides[name].count == seen.shape[2] == 146
        torch.testing.assert_close(sides[name].total, seen.sum(2), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(sides[name].outer, seen.mT @ seen, rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_turns_take_keys_from_one_form_to_the_other(family: str, models: dict[str, Model]) -> None:
    model = models[family]
    keys, _ = _cache(model, segment_of(BLOCK_TOKENS, 1))
    turns = CacheStatistics(model, 1)._turns()
    pre = model.rotate(keys, 0, inverse=True).double()
    frame = model.rotate(keys, torch.zeros(BLOCK_TOKENS, dtype=torch.int64), inverse=True)
    turned = (turns @ pre[..., None])[..., 0]
    torch.testing.assert_close(turned, frame.double(), rtol=1e-4, atol=1e-4)
    identity = torch.eye(model.spec.head_dim, dtype=torch.float64).expand_as(turns)
    torch.testing.assert_close(turns @ turns.mT, identity, rtol=0, atol=1e-5)


def test_a_model_that_does_not_rotate_has_one_form(models: dict[str, Model]) -> None:
    model, segment = models["opt"], segment_of(60, 12)
    keys, values = _cache(model, segment)
    statistics = _gathered(model, segment)
    assert set(statistics.sides) == {"key_pre", "value"}
    for name, vectors in (("key_pre", keys), ("value", values)):
        seen = vectors[1:, :, SKIP].double()
        torch.testing.assert_close(statistics.sides[name].outer, seen.mT @ seen)
    assert set(statistics.fit()[0]) == {"pre"}


def test_several_samples_are_several_gradients_of_the_same_vectors(
    models: dict[str, Model],
) -> None:
    segment = segment_of(40, 8)
    statistics = CacheStatistics(models["llama"], 1)
    statistics.add(segment, torch.Generator().manual_seed(0), 3)
    for name in ("key_pre", "value"):
        moments = statistics.sides[name]
        assert (moments.count, moments.num_gradients) == (36, 3 * 36)
    one = _gathered(models["llama"], segment)
    assert torch.equal(one.sides["value"].outer, statistics.sides["value"].outer)


def test_layers_before_the_first_stored_are_left_out(models: dict[str, Model]) -> None:
    segment = segment_of(40, 8)
    some, every = (_gathered(models["llama"], segment, first) for first in (2, 0))
    for name, moments in some.sides.items():
        torch.testing.assert_close(moments.outer, every.sides[name].outer[2:])
        torch.testing.assert_close(moments.metric, every.sides[name].metric[2:])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tables_fit_the_model(family: str, models: dict[str, Model]) -> None:
    model = models[family]
    profile = profile_of(model)
    spec = model.spec
    assert profile.shape == (spec.num_layers - 1, spec.num_kv_heads, spec.head_dim)
    for tables in (*profile.keys.values(), profile.values):
        assert tables.basis.isfinite().all()
        assert (tables.variance > 0).all()


def test_restored_statistics_go_on_where_they_were(models: dict[str, Model]) -> None:
    model = models["llama"]
    generator = torch.Generator().manual_seed(7)
    whole = _gathered(model, segment_of(40, 8))
    resumed = CacheStatistics(model, 1)
    resumed.restore({name: array.copy() for name, array in whole.arrays().items()})
    assert resumed.num_segments == 1
    for statistics in (whole, resumed):
        statistics.add(segment_of(40, 8, seed=2), generator.manual_seed(7))
    assert whole.num_segments == resumed.num_segments == 2
    for name, array in whole.arrays().items():
        assert np.array_equal(array, resumed.arrays()[name])


def test_the_statistics_of_another_model_are_refused(models: dict[str, Model]) -> None:
    arrays = _gathered(models["opt"], segment_of(40, 8)).arrays()
    for family in ("llama", "qwen3"):
        with pytest.raises((KeyError, ValueError)):
            CacheStatistics(models[family], 1).restore(arrays)
