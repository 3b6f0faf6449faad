"""Products in the matrix unit, by pairs and by FMA: exact enough, and no other library notices."""

import pytest
import torch
from numba import njit

from kvstrata.kernels import products_numba as products
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.products_numba import Multiplier
from kvstrata.kernels.vectors_numba import HAS_PAIRS

MULTIPLIERS = [
    "floats",
    pytest.param("pairs", marks=pytest.mark.skipif(not HAS_PAIRS, reason="no AVX512-BF16")),
    pytest.param(
        "tiles", marks=pytest.mark.skipif(not products.has_tiles(), reason="no matrix unit")
    ),
]
_begin, _multiply = products.begin_products, products.multiply_columns
_end = products.end_products


@njit
def _product(rows, at, row, packed, start, depth, config, sums):  # type: ignore[no-untyped-def]
    _begin(packed, config)
    _multiply(rows, at, row, packed, start, depth, sums, 0, 16)
    _end(packed, config)


def product(a: torch.Tensor, matrix: torch.Tensor, column: int, by: Multiplier) -> torch.Tensor:
    """Return 16 columns of ``a``, (64, K), times the last of the matrices, (H, K, D)."""
    heads, depth, dim = matrix.shape
    whole = products.padded(depth, by)
    rows = torch.zeros(64, whole, dtype=torch.float32 if by == "floats" else torch.bfloat16)
    rows[:, :depth] = a
    sums = torch.full((64, 16), torch.nan)
    packed = products.pack(matrix, by)
    start = ((heads - 1) * dim + column) * whole
    _product(
        as_numpy(rows.view(-1)), 0, whole, packed, start, whole, products.tile_config(),
        sums.view(-1).numpy(),
    )  # fmt: skip
    return sums


@pytest.mark.parametrize("by", MULTIPLIERS)
@pytest.mark.parametrize(("depth", "dim"), [(1, 16), (32, 32), (80, 80), (128, 64)])
def test_columns_are_those_of_the_whole_product(depth: int, dim: int, by: Multiplier) -> None:
    a = torch.randn(64, depth).bfloat16().float()
    matrix = torch.randn(2, depth, dim).bfloat16().float()
    for column in (0, dim - 16):
        found = product(a, matrix, column, by)
        exact = a @ matrix[1, :, column : column + 16]
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("by", MULTIPLIERS)
def test_what_is_not_a_number_stays_so(by: Multiplier) -> None:
    a = torch.zeros(64, 32)
    a[5, 3], a[40, 31] = torch.nan, torch.inf
    found = product(a, torch.ones(1, 32, 16), 0, by)
    assert torch.isnan(found[5]).all()
    assert torch.isinf(found[40]).all()
    assert torch.isfinite(found[[0, 4, 6, 63]]).all()


@pytest.mark.skipif(not products.has_tiles(), reason="no matrix unit")
def test_another_library_s_use_of_the_matrix_unit_is_left_alone() -> None:
    a = torch.randn(200, 200).bfloat16()
    before = a @ a
    for _ in range(2):
        product(torch.randn(64, 32), torch.randn(1, 32, 16), 0, "tiles")
        assert torch.equal(a @ a, before)
