"""Ranges of bytes: every version byte for byte, and none outside of the data."""

import pytest
import torch

from kvstrata.kernels.byte_ranges import join_ranges, join_ranges_reference
from kvstrata.kernels.byte_ranges_numba import join_ranges_numba

VERSIONS = {"reference": join_ranges_reference, "numba": join_ranges_numba}


@pytest.mark.parametrize("count", [0, 1, 7, 501])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_joins_byte_for_byte(count: int, version: str) -> None:
    data = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    sizes = torch.randint(0, 90, (count,))
    firsts = (torch.rand(count) * (5001 - sizes)).long()
    wanted = b"".join(bytes(data[a : a + n].tolist()) for a, n in zip(firsts, sizes, strict=True))
    assert bytes(VERSIONS[version](data, firsts, sizes).tolist()) == wanted


def test_any_shape_in_c_order() -> None:
    data, firsts = torch.arange(64, dtype=torch.uint8), torch.tensor([[0, 8], [16, 60]])
    sizes = torch.tensor([[1, 2], [0, 4]])
    wanted = [0, 8, 9, 60, 61, 62, 63]
    assert join_ranges(data, firsts, sizes).tolist() == wanted
    assert join_ranges(data, firsts.T.contiguous().T, sizes).tolist() == wanted
    assert join_ranges(data, firsts.T, sizes.T).tolist() == [0, 8, 9, 60, 61, 62, 63]


@pytest.mark.parametrize(("first", "size"), [(-1, 2), (60, 5), (65, 0), (3, -1), (2**62, 2**62)])
def test_no_range_lies_outside(first: int, size: int) -> None:
    data = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="outside"):
        join_ranges(data, torch.tensor([0, first]), torch.tensor([1, size]))


def test_types_and_shapes_that_make_no_sense_are_refused() -> None:
    data, one = torch.zeros(64, dtype=torch.uint8), torch.ones(1, dtype=torch.int64)
    for arguments in ((data.float(), one, one), (data, one.int(), one), (data, one, one[:0])):
        with pytest.raises(ValueError, match=r"must be|came with"):
            join_ranges(*arguments)
