"""The constants of the codes are the optimum that they claim to be, and codes nest."""

import itertools
import math

import pytest
import torch

from kvstrata.kernels import sign_codes

WIDTHS = range(sign_codes.MAX_WIDTH + 1)


@pytest.mark.parametrize("width", range(1, 5))
def test_coefficients_can_be_computed_again(width: int) -> None:
    found = sign_codes.fit_coefficients(width)
    assert found == pytest.approx(sign_codes.COEFFICIENTS[width], abs=2e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_fine_levels_can_be_computed_again(width: int) -> None:
    base = sign_codes.base_values(width)
    borders = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(base)), math.inf]
    ends = list(itertools.pairwise(borders))
    chosen = ends[:: max(1, len(ends) // 4)]
    found = [level for low, high in chosen for level in sign_codes.split_cell(low, high)]
    told = [
        level
        for cell in range(0, len(ends), max(1, len(ends) // 4))
        for level in sign_codes.FINE_LEVELS[width][4 * cell : 4 * cell + 4]
    ]
    assert found == pytest.approx(told, abs=2e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_levels_ascend_and_each_fine_level_lies_in_its_cell(width: int) -> None:
    fine, base = sign_codes.fine_levels(width), sign_codes.base_levels(width)
    assert (fine.diff() > 0).all()
    assert (base.diff() > 0).all()
    assert torch.allclose(base, -base.flip(0))
    between = (base[1:] + base[:-1]) / 2
    assert torch.equal(torch.bucketize(fine, between), torch.arange(len(fine)) // 4)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_holds_every_code_and_is_symmetric(width: int) -> None:
    table = sign_codes.code_table(width).int()
    top = (4 << width) - 1
    assert sorted(set(table.tolist())) == list(range(top + 1))
    assert (table.diff() >= 0).all()
    assert torch.equal(table + table.flip(0), torch.full_like(table, top))


def test_the_grid_clamps_and_does_not_round_up() -> None:
    y = torch.tensor([-1e30, -8.0, -0.001, 0.0, 1 / 128, 7.999, 8.0, 1e30])
    assert sign_codes.grid_index(y).tolist() == [0, 0, 1023, 1024, 1025, 2047, 2047, 2047]


@pytest.mark.parametrize(
    ("width", "distortion"),
    list(enumerate((1.0, 0.3634, 0.1175, 0.03694, 0.01141, 0.003464, 0.0010333))),
)
def test_the_distortion_is_the_fitted_one(width: int, distortion: float) -> None:
    y = torch.linspace(-7.9, 7.9, 400_001, dtype=torch.float64)
    chance = torch.exp(-y.square() / 2)
    codes = sign_codes.code_table(width)[sign_codes.grid_index(y.float())].long()
    rest = (y - sign_codes.base_levels(width).double()[codes >> 2]).square()
    assert float((chance * rest).sum() / chance.sum()) == pytest.approx(distortion, rel=5e-3)
