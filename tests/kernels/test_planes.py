"""Packing 2-bit codes and splitting bytes: the layout, and that nothing is lost."""

from typing import Any

import pytest
import torch

from kvstrata.kernels import merge_bytes, pack_2bit, split_bytes, unpack_2bit

DIMS = [4, 32, 64, 80, 96, 128, 256]


def _codes(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randint(0, 4, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3, 5)], ids=str)
def test_2_bit_codes_survive_packing(lead: tuple[int, ...], dim: int) -> None:
    codes = _codes(*lead, dim)
    packed = pack_2bit(codes)
    assert packed.shape == (*lead, dim // 4)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_2bit(packed), codes)


@pytest.mark.parametrize("stale", [0, 1, 2, 3, 0xFF])
def test_unpacking_writes_every_lane_whatever_the_memory_held(
    stale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = _codes(3, 80)
    packed = pack_2bit(codes)
    empty: Any = torch.empty

    def stale_memory(*args: Any, **kwargs: Any) -> torch.Tensor:
        memory: torch.Tensor = empty(*args, **kwargs).fill_(stale)
        return memory

    monkeypatch.setattr(torch, "empty", stale_memory)
    unpacked = unpack_2bit(packed)
    monkeypatch.undo()
    assert torch.equal(unpacked, codes)


def test_every_byte_unpacks_to_its_four_codes() -> None:
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = unpack_2bit(packed)
    assert codes.tolist() == [[b & 3, b >> 2 & 3, b >> 4 & 3, b >> 6] for b in range(256)]
    assert torch.equal(pack_2bit(codes), packed)


def test_elements_a_quarter_apart_share_a_byte() -> None:
    codes = torch.tensor([3, 0, 1, 0, 2, 0, 0, 3], dtype=torch.uint8)
    # byte 0: elements 0, 2, 4, 6; byte 1: elements 1, 3, 5, 7; the first in the lowest bits
    assert pack_2bit(codes).tolist() == [3 | 1 << 2 | 2 << 4 | 0 << 6, 0 | 0 | 0 | 3 << 6]
    for element, (byte, value) in enumerate(
        [(0, 0x01), (1, 0x01), (0, 0x04), (1, 0x04), (0, 0x10), (1, 0x10), (0, 0x40), (1, 0x40)]
    ):
        one = torch.zeros(8, dtype=torch.uint8)
        one[element] = 1
        assert pack_2bit(one)[byte] == value
        assert pack_2bit(one).sum() == value


def test_packing_leaves_its_input_alone() -> None:
    codes = _codes(2, 32)
    before = codes.clone()
    pack_2bit(codes)
    assert torch.equal(codes, before)


def test_strided_codes_pack_like_contiguous_ones() -> None:
    codes = _codes(6, 5, 32).transpose(0, 1)[:, ::2]
    assert torch.equal(pack_2bit(codes), pack_2bit(codes.contiguous()))
    packed = pack_2bit(codes).transpose(0, 1)
    assert torch.equal(unpack_2bit(packed), codes.transpose(0, 1))


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 66])
def test_a_dimension_that_four_does_not_divide_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4, got {dim}"):
        pack_2bit(torch.zeros(2, dim, dtype=torch.uint8))


DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (64, 80)], ids=str)
def test_values_split_into_byte_planes_and_merge_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    values = raw.view(dtype).squeeze(-1)
    planes = split_bytes(values)
    assert planes.shape == (dtype.itemsize, values.numel())
    assert planes.is_contiguous()
    assert torch.equal(planes, raw.view(-1, dtype.itemsize).T)
    merged = merge_bytes(planes, dtype)
    assert merged.dtype == dtype
    assert torch.equal(merged.view(DTYPES[dtype]), values.flatten().view(DTYPES[dtype]))


@pytest.mark.parametrize(
    ("dtype", "planes"),
    [
        (torch.bfloat16, [[0x80, 0x20], [0x3F, 0xC0]]),
        (torch.float16, [[0x00, 0x00], [0x3C, 0xC1]]),
        (torch.float32, [[0, 0], [0, 0], [0x80, 0x20], [0x3F, 0xC0]]),
    ],
    ids=str,
)
def test_the_first_plane_is_the_lowest_byte(dtype: torch.dtype, planes: list[list[int]]) -> None:
    assert split_bytes(torch.tensor([1.0, -2.5], dtype=dtype)).tolist() == planes


def test_strided_values_split_in_their_logical_order() -> None:
    values = torch.arange(12.0).view(3, 4).T
    assert torch.equal(split_bytes(values), split_bytes(values.contiguous()))
    assert torch.equal(merge_bytes(split_bytes(values), torch.float32), values.flatten())
