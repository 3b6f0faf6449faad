"""Rotation at positions: every version against the complex product, and back."""

import pytest
import torch

from kvstrata.kernels.rope import rotate, rotate_reference
from kvstrata.kernels.rope_numba import rotate_numba
from kvstrata.kernels.rope_triton import rotate_triton

# heads, tokens, head_dim, rotary_dim
SHAPES = {
    "one": (1, 1, 32, 32),
    "small": (1, 3, 64, 64),
    "odd": (3, 37, 80, 80),
    "partial": (2, 70, 128, 64),
    "hardly": (1, 5, 96, 2),
    "wide": (2, 33, 256, 256),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _tables(num_positions: int, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    speeds = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(num_positions)[:, None] * speeds
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


@each_shape
@each_dtype
@pytest.mark.parametrize("version", [rotate_reference, rotate_numba, rotate_triton])
@pytest.mark.parametrize("inverse", [False, True], ids=["forth", "back"])
def test_every_version_is_the_complex_product(shape, dtype, version, inverse):
    heads, tokens, dim, rotary_dim = shape
    keys = torch.randn(heads, tokens, dim).to(dtype)
    cos, sin = _tables(200, rotary_dim)
    positions = torch.randint(0, 200, (tokens,))
    out = torch.full_like(keys, float("nan"))
    version(keys, cos, sin, positions, inverse, out)
    half = rotary_dim // 2
    turn = torch.complex(cos, -sin if inverse else sin)[positions, :half].to(torch.complex128)
    wide = keys.double()
    turned = torch.complex(wide[..., :half], wide[..., half:rotary_dim]) * turn
    expected = torch.cat([turned.real, turned.imag, wide[..., rotary_dim:]], dim=-1)
    bound = (expected.abs() + 4 * 2.0**-23) * ULP[dtype] + 2.0**-20
    assert ((out.double() - expected).abs() <= bound).all()
    assert torch.equal(out[..., rotary_dim:], keys[..., rotary_dim:])


@each_dtype
def test_the_compiled_loop_gives_the_bits_of_the_reference(dtype):
    keys = torch.randn(2, 300, 64).to(dtype)
    keys[0, 3, 5], keys[1, 7, 40] = float("nan"), float("inf")
    cos, sin = torch.randn(300, 48), torch.randn(300, 48)  # halves that differ
    out, expected = torch.empty_like(keys), torch.empty_like(keys)
    rotate_numba(keys, cos, sin, None, False, out)
    rotate_reference(keys, cos, sin, None, False, expected)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any()
    assert torch.equal(out.nan_to_num(0.5), expected.nan_to_num(0.5))


@each_dtype
@pytest.mark.parametrize("in_place", [False, True])
def test_rotating_back_restores(dtype, in_place):
    keys = torch.randn(3, 130, 96).to(dtype)
    cos, sin = _tables(130, 96)
    held = keys.clone()
    there = rotate(held, cos, sin, out=held if in_place else None)
    assert (there is held) == in_place
    assert in_place or torch.equal(held, keys)
    back = rotate(there, cos, sin, inverse=True, out=there if in_place else None)
    largest = keys.double().abs().amax(-1, keepdim=True) * 2
    assert ((back.double() - keys.double()).abs() <= largest * ULP[dtype] * 2).all()


@pytest.mark.parametrize("version", [rotate_numba, rotate_triton])
def test_in_place_equals_out_of_place(version):
    keys = torch.randn(2, 45, 80)
    cos, sin = _tables(45, 64)
    out = torch.empty_like(keys)
    version(keys, cos, sin, None, False, out)
    version(keys, cos, sin, None, False, keys)
    assert torch.equal(keys, out)


def test_position_zero_turns_nothing_and_positions_pick_rows():
    keys = torch.randn(2, 4, 64).bfloat16()
    cos, sin = _tables(9, 64)
    assert torch.equal(rotate(keys, cos, sin, positions=torch.zeros(4).long()), keys)
    picked = torch.tensor([8, 0, 3, 3])
    by_row = rotate(keys, cos[picked], sin[picked])
    assert torch.equal(rotate(keys, cos, sin, positions=picked), by_row)


def test_strided_and_empty_keys_and_any_leading_dimensions():
    keys = torch.randn(5, 2, 3, 64).transpose(0, 2)
    cos, sin = _tables(5, 64)
    turned = rotate(keys, cos, sin)
    assert turned.is_contiguous()
    assert torch.equal(turned, rotate(keys.contiguous(), cos, sin))
    assert rotate(torch.zeros(2, 0, 64), cos[:0], sin[:0]).shape == (2, 0, 64)


def test_out_may_lie_beside_the_keys_but_not_across_them():
    cos, sin = _tables(5, 64)
    memory = torch.randn(4 * 5 * 64)
    keys, beside = memory.view(2, 2, 5, 64)
    told = rotate(keys, cos, sin)
    for at in (64, 576):
        with pytest.raises(ValueError, match="be the keys themselves"):
            rotate(keys, cos, sin, out=memory[at : at + 640].view(2, 5, 64))
    assert torch.equal(rotate(keys, cos, sin, out=beside), told)
    with pytest.raises(ValueError, match="must be contiguous"):
        rotate(keys.view(5, 2, 64).transpose(0, 1), cos, sin, out=keys)


def test_inputs_that_do_not_fit_are_refused():
    keys, (cos, sin) = torch.zeros(2, 5, 64), _tables(5, 64)
    here = torch.arange(5)
    for arguments, options, said in (
        ((keys.double(), cos, sin), {}, "bf16, fp16 or fp32"),
        ((keys, cos[:4], sin[:4]), {}, "5 tokens need as many rows"),
        ((keys, cos, sin[:4]), {}, "of one shape"),
        ((keys, cos.half(), sin), {}, "float32 of one shape"),
        ((keys[..., :32], cos, sin), {}, "at most 32, not 64"),
        ((keys, cos[:, :7], sin[:, :7]), {}, "even"),
        ((keys, cos, sin), {"positions": here[:4]}, "int64 positions"),
        ((keys, cos, sin), {"positions": here + 1}, "1 to 5 are not all within"),
        ((keys, cos, sin), {"positions": here - 1}, "-1 to 3 are not all within"),
        ((keys, cos, sin), {"out": keys.half()}, "out must be contiguous"),
        ((keys, cos.to("meta"), sin.to("meta")), {}, "on one device"),
    ):
        with pytest.raises(ValueError, match=said):
            rotate(*arguments, **options)
