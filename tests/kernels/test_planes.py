"""Packing codes and splitting bytes: the layout, and that nothing is lost."""

import pytest
import torch

from kvstrata.kernels import merge_bytes, pack_planar, planes, split_bytes, unpack_planar
from kvstrata.kernels.planes import unpack_planar_reference
from kvstrata.kernels.planes_triton import unpack_planar_triton

DIMS = [8, 32, 64, 80, 96, 128, 256]
BITS = [1, 2, 4]

each_width = pytest.mark.parametrize("bits", BITS)


def _codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


@each_width
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3, 5)], ids=str)
def test_codes_survive_packing(lead: tuple[int, ...], dim: int, bits: int) -> None:
    codes = _codes(bits, *lead, dim)
    packed = pack_planar(codes, bits)
    assert packed.shape == (*lead, dim * bits // 8)
    assert packed.dtype == torch.uint8
    unpacked = unpack_planar(packed, bits)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize(("bits", "dim"), [(2, 4), (2, 20), (4, 2), (4, 6)])
def test_a_dimension_needs_to_fill_bytes_only(bits: int, dim: int) -> None:
    codes = _codes(bits, 3, dim)
    assert torch.equal(unpack_planar(pack_planar(codes, bits), bits), codes)


@each_width
@pytest.mark.parametrize("stale", [0, 1, 2, 3, 0xFF])
def test_unpacking_writes_every_lane_whatever_the_memory_held(
    stale: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = _codes(bits, 3, 80)
    packed = pack_planar(codes, bits)
    given = []

    def stale_memory(
        shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        given.append(torch.full(shape, stale, dtype=dtype, device=device))
        return given[0]

    monkeypatch.setattr(planes, "empty_huge", stale_memory)
    unpacked = unpack_planar(packed, bits)
    assert unpacked is given[0]
    assert torch.equal(unpacked, codes)


@each_width
def test_every_byte_unpacks_to_its_codes(bits: int) -> None:
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = unpack_planar(packed, bits)
    mask = 2**bits - 1
    each = [[b >> shift & mask for shift in range(0, 8, bits)] for b in range(256)]
    assert codes.tolist() == each
    assert torch.equal(pack_planar(codes, bits), packed)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        # two bytes: even elements in the first, odd ones in the second
        (1, [1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000101, 0b10000110]),
        # byte 0: elements 0, 2, 4, 6; byte 1: elements 1, 3, 5, 7; the first in the lowest bits
        (2, [3, 0, 1, 0, 2, 0, 0, 3], [3 | 1 << 2 | 2 << 4 | 0 << 6, 0 | 0 | 0 | 3 << 6]),
        # byte 0: elements 0 and 3; byte 1: 1 and 4; byte 2: 2 and 5
        (4, [15, 0, 1, 10, 7, 8], [0xAF, 0x70, 0x81]),
    ],
)
def test_the_bytes_are_these(bits: int, codes: list[int], packed: list[int]) -> None:
    whole = torch.tensor(codes, dtype=torch.uint8)
    assert pack_planar(whole, bits).tolist() == packed
    assert unpack_planar(torch.tensor(packed, dtype=torch.uint8), bits).tolist() == codes


@each_width
def test_elements_a_run_apart_share_a_byte(bits: int) -> None:
    dim = 16
    num_bytes = dim * bits // 8
    for element in range(dim):
        one = torch.zeros(dim, dtype=torch.uint8)
        one[element] = 1
        packed = pack_planar(one, bits)
        slot, byte = divmod(element, num_bytes)
        assert packed[byte] == 1 << (bits * slot)
        assert packed.sum() == packed[byte]


@each_width
def test_packing_leaves_its_input_alone(bits: int) -> None:
    codes = _codes(bits, 2, 32)
    before = codes.clone()
    packed = pack_planar(codes, bits)
    assert torch.equal(codes, before)
    before = packed.clone()
    unpack_planar(packed, bits)
    assert torch.equal(packed, before)


@each_width
def test_strided_codes_pack_like_contiguous_ones(bits: int) -> None:
    codes = _codes(bits, 6, 5, 32).transpose(0, 1)[:, ::2]
    assert torch.equal(pack_planar(codes, bits), pack_planar(codes.contiguous(), bits))
    packed = pack_planar(codes, bits).transpose(0, 1)
    assert torch.equal(unpack_planar(packed, bits), codes.transpose(0, 1))


@pytest.mark.parametrize(
    ("bits", "slots", "dim"),
    [(1, 8, dim) for dim in (1, 4, 12, 66, 100)]
    + [(2, 4, dim) for dim in (1, 2, 3, 5, 66)]
    + [(4, 2, dim) for dim in (1, 3, 65)],
)
def test_a_dimension_that_leaves_a_byte_unfilled_is_refused(
    bits: int, slots: int, dim: int
) -> None:
    with pytest.raises(ValueError, match=f"multiple of {slots}, not {dim}$"):
        pack_planar(torch.zeros(2, dim, dtype=torch.uint8), bits)


@each_width
def test_what_is_no_code_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"a code is {1 << bits}, too large for {bits} bits"):
        pack_planar(torch.full((8,), 1 << bits, dtype=torch.uint8), bits)
    for wrong in (torch.zeros(8, dtype=torch.int64), torch.tensor(0, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="codes must be uint8"):
            pack_planar(wrong, bits)
    with pytest.raises(ValueError, match="packed must be uint8"):
        unpack_planar(torch.tensor(0, dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", [-1, 0, 3, 5, 8, 16])
def test_another_width_is_refused(bits: int) -> None:
    codes = torch.zeros(2, 120, dtype=torch.uint8)
    for function in (pack_planar, unpack_planar):
        with pytest.raises(ValueError, match=f"bits must be 1, 2 or 4, not {bits}$"):
            function(codes, bits)


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


FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@each_width
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (3, 5, 33), (300, 128)], ids=str)
def test_every_version_unpacks_to_the_same_numbers(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    expected = unpack_planar_reference(packed, bits).to(dtype)
    read = unpack_planar(packed, bits, dtype)
    assert read.dtype == dtype
    assert torch.equal(read, expected)
    out = torch.full((packed[..., 0].numel(), expected.shape[-1]), 99).to(dtype)
    unpack_planar_triton(packed.view(-1, shape[-1]), bits, out)
    assert torch.equal(out.view(expected.shape), expected)


@each_width
def test_no_bytes_unpack_to_no_codes(bits: int) -> None:
    for shape in ((0, 16), (3, 0)):
        packed = torch.zeros(shape, dtype=torch.uint8)
        read = unpack_planar(packed, bits, torch.bfloat16)
        assert read.shape == (shape[0], shape[1] * 8 // bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    packed = torch.zeros(2, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="dtype must be"):
        unpack_planar(packed, 2, dtype)
    with pytest.raises(ValueError, match="packed must be uint8"):
        unpack_planar(packed.to(dtype), 2)
