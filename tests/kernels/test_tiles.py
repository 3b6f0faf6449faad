"""Products in the matrix unit and by FMA: exact enough, and no other library notices."""

import pytest
import torch
from numba import njit

from kvstrata.kernels import tiles_numba as tiles
from kvstrata.kernels.floats_numba import as_numpy

KINDS = [
    pytest.param(False, id="fma"),
    pytest.param(
        True, id="amx", marks=pytest.mark.skipif(not tiles.has_tiles(), reason="no matrix unit")
    ),
]
_begin, _multiply, _end = tiles.begin_products, tiles.multiply_columns, tiles.end_products


@njit
def _product(rows, at, row, packed, start, depth, config, sums):  # type: ignore[no-untyped-def]
    _begin(packed, config)
    _multiply(rows, at, row, packed, start, depth, sums, 0, 16)
    _end(packed, config)


def product(
    a: torch.Tensor, matrix: torch.Tensor, column: int, *, matrix_unit: bool
) -> torch.Tensor:
    """Return 16 columns of ``a``, (64, K), times the last of the matrices, (H, K, D)."""
    heads, depth, dim = matrix.shape
    whole = tiles.padded(depth)
    rows = torch.zeros(64, whole, dtype=torch.bfloat16 if matrix_unit else torch.float32)
    rows[:, :depth] = a
    sums = torch.full((64, 16), torch.nan)
    packed = tiles.pack(matrix, tiles=matrix_unit)
    start = ((heads - 1) * dim + column) * whole
    _product(
        as_numpy(rows.view(-1)), 0, whole, packed, start, whole, tiles.tile_config(),
        sums.view(-1).numpy(),
    )  # fmt: skip
    return sums


@pytest.mark.parametrize("matrix_unit", KINDS)
@pytest.mark.parametrize(("depth", "dim"), [(1, 16), (32, 32), (80, 80), (128, 64)])
def test_columns_are_those_of_the_whole_product(depth: int, dim: int, matrix_unit: bool) -> None:
    a = torch.randn(64, depth).bfloat16().float()
    matrix = torch.randn(2, depth, dim).bfloat16().float()
    for column in (0, dim - 16):
        found = product(a, matrix, column, matrix_unit=matrix_unit)
        exact = a @ matrix[1, :, column : column + 16]
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("matrix_unit", KINDS)
def test_what_is_not_a_number_stays_so(matrix_unit: bool) -> None:
    a = torch.zeros(64, 32)
    a[5, 3], a[40, 31] = torch.nan, torch.inf
    found = product(a, torch.ones(1, 32, 16), 0, matrix_unit=matrix_unit)
    assert torch.isnan(found[5]).all()
    assert torch.isinf(found[40]).all()
    assert torch.isfinite(found[[0, 4, 6, 63]]).all()


@pytest.mark.skipif(not tiles.has_tiles(), reason="no matrix unit")
def test_another_library_s_use_of_the_matrix_unit_is_left_alone() -> None:
    a = torch.randn(200, 200).bfloat16()
    before = a @ a
    for _ in range(2):
        product(torch.randn(64, 32), torch.randn(1, 32, 16), 0, matrix_unit=True)
        assert torch.equal(a @ a, before)
