"""The Hadamard matrix: its own inverse, for every head dimension."""

import pytest
import torch

from kvstrata.kernels.hadamard import hadamard, turn

DIMS = [1, 2, 32, 64, 80, 96, 128, 256]


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_symmetric_and_its_own_inverse(dim: int) -> None:
    matrix = hadamard(dim)
    assert matrix.shape == (dim, dim)
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, matrix.T)
    product = matrix.double() @ matrix.double()
    # Every entry is rounded once: at most 2^-24 of itself, so the sum of squares by 2^-23.
    torch.testing.assert_close(product, torch.eye(dim).double(), rtol=0, atol=2**-22)


@pytest.mark.parametrize("dim", DIMS)
def test_it_spreads_every_element_evenly_over_its_block(dim: int) -> None:
    size = dim & -dim
    spread = hadamard(dim).abs()
    block = torch.arange(dim) // size
    together = block[:, None] == block[None, :]
    assert (spread[~together] == 0).all()
    torch.testing.assert_close(spread[together], torch.full((dim * size,), size**-0.5))


def test_its_first_rows_are_those_of_sylvester() -> None:
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (hadamard(4) * 2).tolist() == signs


@pytest.mark.parametrize("dim", DIMS)
def test_it_keeps_lengths_and_undoes_itself(dim: int) -> None:
    rows = torch.randn(5, dim, generator=torch.Generator().manual_seed(dim))
    turned = rows @ hadamard(dim)
    torch.testing.assert_close(turned.norm(dim=-1), rows.norm(dim=-1))
    torch.testing.assert_close(turned @ hadamard(dim), rows)


@pytest.mark.parametrize("dim", DIMS)
def test_sums_and_differences_equal_the_product_with_the_matrix(dim: int) -> None:
    rows = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(dim))
    torch.testing.assert_close(turn(rows), rows @ hadamard(dim))
    strided = rows.transpose(0, 1)[::2]
    assert torch.equal(turn(strided), turn(strided.contiguous()))


@pytest.mark.parametrize("dim", DIMS)
def test_of_integers_the_unscaled_transform_is_exact(dim: int) -> None:
    rows = torch.randint(-127, 128, (5, dim), generator=torch.Generator().manual_seed(dim)).float()
    size = dim & -dim
    signs = (hadamard(dim) * size**0.5).round().double()
    assert torch.equal(turn(rows, scaled=False).double(), rows.double() @ signs)


def test_neighbours_are_added_first() -> None:
    large = 2.0**30
    rows = torch.tensor([[large, -large, 1.0, 1.0]])
    assert turn(rows, scaled=False)[0, 0] == 2  # (large - large) + (1 + 1)
    assert turn(rows[:, [0, 2, 1, 3]], scaled=False)[0, 0] == 0  # (large + 1) + (-large + 1)
