"""The schedule: budgets, nested layer sets, cache lengths (papers.md, S1 to S3, S5, S8)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.methods.skipdecode import SkipDecode, running_rows
from kvstrata.protos.errors import InvalidRequestError

# Speed-up, layers, min, max, as published for OPT-1.3B and OPT-6.7B.
PUBLISHED = [
    (24, 8, 16, 2.00),
    (24, 6, 10, 3.00),
    (24, 4, 8, 4.00),
    (24, 3, 6, 5.33),
    (32, 11, 22, 1.94),
    (32, 8, 14, 2.91),
    (32, 6, 11, 3.76),
    (32, 5, 8, 4.92),
]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, SkipDecode]:
    num_layers = draw(st.integers(2, 48))
    warmup = draw(st.integers(0, num_layers - 1))
    low = draw(st.integers(warmup + 1, num_layers))
    high = draw(st.integers(low, num_layers))
    return num_layers, SkipDecode(high, low, draw(st.integers(1, 60)), warmup)


def test_budgets_fall_linearly() -> None:
    schedule = SkipDecode(16, 8, decay_tokens=4)
    assert [schedule.budget(i) for i in range(7)] == [16, 14, 12, 10, 8, 8, 8]


@pytest.mark.parametrize(("num_layers", "low", "high", "speedup"), PUBLISHED)
def test_the_published_settings_have_their_mean(
    num_layers: int, low: int, high: int, speedup: float
) -> None:
    schedule = SkipDecode(high, low, decay_tokens=1000)
    mean = schedule.executions(1001) / 1001
    assert mean == pytest.approx((low + high) / 2, abs=0.1)
    assert num_layers / mean == pytest.approx(speedup, abs=0.05)


@given(schedules())
def test_sets_are_nested_and_as_large_as_the_budget(made: tuple[int, SkipDecode]) -> None:
    num_layers, schedule = made
    before = set(range(num_layers))
    for index in range(schedule.decay_tokens + 3):
        layers = set(schedule.layers(index, num_layers))
        assert len(layers) == schedule.budget(index)
        assert layers <= before
        assert num_layers - 1 in layers
        assert layers >= set(range(schedule.warmup_layers))
        before = layers
    assert len(before) == schedule.min_layers


@given(schedules(), st.integers(0, 70))
def test_caches_are_prefixes_and_their_sum_is_what_ran(
    made: tuple[int, SkipDecode], num_generated: int
) -> None:
    num_layers, schedule = made
    counted = [
        sum(schedule.runs(layer, i, num_layers) for i in range(num_generated))
        for layer in range(num_layers)
    ]
    assert list(schedule.num_cached(num_generated, num_layers)) == counted
    assert sum(counted) == schedule.executions(num_generated)
    assert counted[-1] == num_generated


def test_the_example_of_the_module() -> None:
    schedule = SkipDecode(max_layers=5, min_layers=3, decay_tokens=2)
    assert [schedule.layers(i, 6) for i in range(4)] == [
        (0, 2, 3, 4, 5),
        (0, 3, 4, 5),
        (0, 4, 5),
        (0, 4, 5),
    ]
    assert schedule.num_cached(3, 6) == (3, 0, 1, 2, 3, 3)


def test_rows_of_a_batch_are_picked_layer_by_layer() -> None:
    schedule = SkipDecode(max_layers=5, min_layers=3, decay_tokens=2)
    rows = running_rows([schedule, None, schedule, schedule], [0, 7, 2, -1], 6)
    assert rows == [None, [1, 3], [0, 1, 3], [0, 1, 3], None, None]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((5, 1), "min_layers"),
        ((5, 2, 9, 2), "min_layers"),
        ((4, 5), "max_layers"),
        ((5, 3, 0), "decay_tokens"),
        ((5, 3, 2, -1), "warmup_layers"),
    ],
)
def test_what_is_no_schedule_is_refused(settings: tuple[int, ...], told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        SkipDecode(*settings)


def test_a_model_with_fewer_layers_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_layers 16 of a model with 12"):
        SkipDecode(16, 8).check(12)


@pytest.mark.parametrize(("speedup", "settings"), [(1, (30, 30)), (2, (20, 10)), (4, (10, 5))])
def test_a_schedule_for_a_speedup(speedup: float, settings: tuple[int, int]) -> None:
    schedule = SkipDecode.for_speedup(30, speedup)
    assert (schedule.max_layers, schedule.min_layers) == settings
    with pytest.raises(InvalidRequestError):
        SkipDecode.for_speedup(30, 0.5)
