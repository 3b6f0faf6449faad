"""Byte planes: every version bit for bit, whatever the bits mean."""

import pytest
import torch

from kvstrata.kernels.byte_planes import (
    merge_bytes,
    merge_bytes_reference,
    split_bytes,
    split_bytes_reference,
)
from kvstrata.kernels.byte_planes_numba import merge_bytes_numba, split_bytes_numba
from kvstrata.kernels.byte_planes_triton import merge_bytes_triton, split_bytes_triton

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int16, torch.int32]
VERSIONS = {
    "reference": (split_bytes_reference, merge_bytes_reference),
    "numba": (split_bytes_numba, merge_bytes_numba),
    "triton": (split_bytes_triton, merge_bytes_triton),
}


def _raw(count: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, size), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 4096, 5001])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_splits_and_merges_bit_for_bit(dtype, count, version):
    split, merge = VERSIONS[version]
    raw = _raw(count, dtype.itemsize)
    planes = split(raw.view(dtype).view(-1))
    assert planes.dtype == torch.uint8
    assert planes.is_contiguous()
    assert torch.equal(planes, raw.T)
    merged = merge(planes, dtype)
    assert merged.dtype == dtype
    assert merged.shape == (count,)
    assert torch.equal(merged.view(torch.uint8).view(raw.shape), raw)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, *DTYPES], ids=str)
def test_any_shape_stride_and_item_size(dtype):
    values = _raw(60, dtype.itemsize).view(dtype).view(3, 4, 5).transpose(0, 2)
    planes = split_bytes(values)
    assert planes.shape == (dtype.itemsize, 60)
    assert torch.equal(planes, split_bytes(values.contiguous()))
    merged = merge_bytes(planes.T.contiguous().T, dtype)
    assert torch.equal(merged.view(torch.uint8), values.contiguous().view(-1).view(torch.uint8))
    empty = split_bytes(values[:0])
    assert empty.shape == (dtype.itemsize, 0)
    assert merge_bytes(empty, dtype).shape == (0,)


def test_many_values_are_split_by_several_threads():
    values = _raw(1_000_003, 2).view(torch.bfloat16).view(-1)
    planes = split_bytes(values)
    assert torch.equal(planes, split_bytes_reference(values))
    assert torch.equal(
        merge_bytes(planes, torch.bfloat16).view(torch.int16), values.view(torch.int16)
    )


def test_the_first_plane_is_the_lowest_byte():
    planes = split_bytes(torch.tensor([1.0, -2.5]).bfloat16())
    assert planes.tolist() == [[0x80, 0x20], [0x3F, 0xC0]]


def test_planes_that_do_not_fit_the_dtype_are_refused():
    planes = torch.zeros(2, 5, dtype=torch.uint8)
    for wrong, dtype in (
        (planes, torch.float32),
        (planes.int(), torch.half),
        (planes[0], torch.half),
    ):
        with pytest.raises(ValueError, match="needs uint8 planes of shape"):
            merge_bytes(wrong, dtype)
