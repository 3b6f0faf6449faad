"""Who gets which bits: monotone in the price, and with the distortions of the kernels' codes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.kernels.sign_codes import (
    FINE_LEVELS,
    GRID_PER_UNIT,
    GRID_SIZE,
    MAX_WIDTH,
    base_levels,
    code_table,
    fine_levels,
)
from kvstrata.methods.bit_allocation import (
    DISTORTION,
    ESCAPE_BITS_PER_ELEMENT,
    FINE_DISTORTION,
    MID_REMAINDER,
    SideAllocation,
    allocate,
)
from kvstrata.methods.profile import SideTables
from tests.methods.profiles import make_side


def _tables(variance: torch.Tensor) -> SideTables:
    shape = variance.shape
    return SideTables(torch.zeros(shape), torch.zeros(*shape, shape[-1]).half(), variance)


def _gaussian_error(width: int, *, fine: bool) -> float:
    """Return the mean squared error of the codes that kernels take, by cells of their grid."""
    inside = 16  # points per cell
    points = torch.arange(GRID_SIZE * inside, dtype=torch.float64).add(0.5)
    points = points / (GRID_PER_UNIT * inside) - GRID_SIZE / (2 * GRID_PER_UNIT)
    codes = code_table(width).long().repeat_interleave(inside)
    values = (fine_levels(width)[codes] if fine else base_levels(width)[codes >> 2]).double()
    density = torch.exp(-points.square() / 2) / math.sqrt(2 * math.pi)
    return float(((points - values).square() * density).sum() / (GRID_PER_UNIT * inside))


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_distortions_are_those_of_the_kernels_codes(width: int) -> None:
    assert _gaussian_error(width, fine=False) == pytest.approx(DISTORTION[width], rel=0.01)


def test_a_refined_component_without_planes_errs_as_told() -> None:
    assert len(DISTORTION) == MAX_WIDTH + 1 == len(FINE_LEVELS)
    assert _gaussian_error(0, fine=True) == pytest.approx(FINE_DISTORTION, rel=0.01)


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_two_planes_more_leave_no_more_than_the_remainder(width: int) -> None:
    """The share that ``MID_REMAINDER`` stands for: of Gaussian components, at every width."""
    remainder = _gaussian_error(width, fine=True) / _gaussian_error(width, fine=False)
    assert remainder < 1.1 * MID_REMAINDER


def _check(bits: SideAllocation, shape: tuple[int, ...]) -> None:
    layers, heads, dim = shape
    assert (bits.widths.shape, bits.widths.dtype) == (shape, torch.uint8)
    assert bits.widths.max() <= MAX_WIDTH
    assert (bits.widths[..., 1:] <= bits.widths[..., :-1]).all()
    assert (bits.mid_counts.shape, bits.mid_counts.dtype) == ((layers, heads), torch.int64)
    assert (bits.mid_counts % 8 == 0).all()
    assert (bits.mid_counts >= 8).all()
    assert (bits.mid_counts <= dim).all()
    for price in (bits.mid_price, bits.escape_price):
        assert (price.shape, price.dtype) == ((layers, heads), torch.float32)
        assert (price > 0).all()
    assert (bits.escape_price > bits.mid_price).all()
    assert bits.mean_width == pytest.approx(bits.widths.double().mean().item(), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([8, 20, 32, 80, 256])),
    thresholds=st.tuples(*[st.floats(-8, 4)] * 2),
    weight=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
def test_a_larger_threshold_never_gives_more_bits(
    shape: tuple[int, int, int], thresholds: tuple[float, float], weight: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logarithm = 4 * torch.randn(shape, generator=generator)
    tables = _tables(logarithm.exp().sort(-1, descending=True)[0])
    low, high = sorted(10**t for t in thresholds)
    fine, coarse = (allocate(tables, t, weight=weight) for t in (low, high))
    for bits in (fine, coarse):
        _check(bits, shape)
    assert (coarse.widths <= fine.widths).all()
    assert (coarse.mid_counts <= fine.mid_counts).all()
    assert (coarse.mid_price / high <= fine.mid_price / low * (1 + 1e-5)).all()


def test_widths_are_where_another_plane_pays() -> None:
    variance = torch.tensor([[[9.0, 1.0, 0.3, 0.1, 0.05, 0.01, 0.001, 0.0001]]])
    threshold = 0.01
    widths = allocate(_tables(variance), threshold).widths[0, 0].tolist()
    for cost, width in zip(variance[0, 0].tolist(), widths, strict=True):
        if width:
            assert cost * (DISTORTION[width - 1] - DISTORTION[width]) > threshold
        if width < MAX_WIDTH:
            assert cost * (DISTORTION[width] - DISTORTION[width + 1]) <= threshold
    assert len(set(widths)) > 3


def test_gains_fall_with_every_plane_so_that_greedy_is_optimal() -> None:
    gains = [a - b for a, b in itertools.pairwise(DISTORTION)]
    assert gains == sorted(gains, reverse=True)


def test_weight_scales_as_variance_does() -> None:
    tables = make_side(2, 2, 32, 0)
    double = SideTables(tables.mean, tables.basis, tables.variance * 2)
    weighted, scaled = allocate(tables, 0.03, weight=2.0), allocate(double, 0.03)
    assert torch.equal(weighted.widths, scaled.widths)
    assert torch.equal(weighted.mid_counts, scaled.mid_counts)
    assert torch.equal(weighted.mid_price, scaled.mid_price)


@pytest.mark.parametrize("threshold", [1e-30, 1e30])
def test_the_ends_are_all_planes_and_none(threshold: float) -> None:
    bits = allocate(make_side(1, 2, 32, 0), threshold)
    assert set(bits.widths.flatten().tolist()) == {MAX_WIDTH if threshold < 1 else 0}
    assert set(bits.mid_counts.flatten().tolist()) == {32 if threshold < 1 else 8}
    assert ESCAPE_BITS_PER_ELEMENT > MAX_WIDTH


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_price_that_is_not_positive_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        allocate(make_side(1, 1, 8, 0), threshold)
