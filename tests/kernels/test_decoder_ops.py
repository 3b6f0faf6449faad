"""The operations between a decoder's products: the CPU's versions against their definitions."""

import pytest
import torch
import transformers

from kvstrata.kernels.decoder_ops import (
    add_rms_norm,
    add_rms_norm_reference,
    rotate_heads,
    rotate_heads_reference,
    silu_gate,
    silu_gate_reference,
)
from kvstrata.kernels.decoder_ops_triton import (
    add_rms_norm_triton,
    rotate_heads_triton,
    silu_gate_triton,
)

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 48), (7, 50), (130, 576)])


# The interpreter cuts bf16 off where a GPU rounds it.
each_interpreted = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.dtype == wanted.dtype
    tolerance = DTYPES[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@each_dtype
@each_shape
@pytest.mark.parametrize("has_residual", [True, False])
def test_norm_adds_and_normalises(
    dtype: torch.dtype, rows: int, width: int, has_residual: bool
) -> None:
    x, residual = torch.randn(2, rows, width).to(dtype)
    weight = (torch.rand(width) + 0.5).to(dtype)
    added = residual if has_residual else None
    got, wanted = (norm(x, added, weight, 1e-5) for norm in (add_rms_norm, add_rms_norm_reference))
    near(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@each_dtype
def test_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    x = torch.randn(5, 64).to(dtype)
    module = transformers.models.llama.modeling_llama.LlamaRMSNorm(64, eps=1e-6).to(dtype)
    with torch.no_grad():
        near(add_rms_norm(x, None, module.weight.detach(), 1e-6)[0], module(x))


def test_norm_leaves_its_arguments_alone() -> None:
    x, residual = torch.randn(2, 4, 32)
    before = x.clone(), residual.clone()
    add_rms_norm(x, residual, torch.ones(32), 1e-6)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@each_dtype
@pytest.mark.parametrize(
    ("rows", "heads", "dim"), [(1, 1, 32), (5, 3, 64), (66, 2, 128), (3, 2, 24)]
)
def test_heads_are_rotated_to_the_positions_of_their_rows(
    dtype: torch.dtype, rows: int, heads: int, dim: int
) -> None:
    angles = torch.arange(50)[:, None] * 0.8 ** torch.arange(dim // 2)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    positions = torch.randint(50, (rows,))
    x = torch.randn(rows, heads + 2, dim).to(dtype)[:, 1:-1]
    near(rotate_heads(x, cos, sin, positions), rotate_heads_reference(x, cos, sin, positions))


def test_channels_beyond_the_rotated_ones_stay() -> None:
    x = torch.randn(4, 2, 64)
    table = torch.rand(9, 32)
    turned = rotate_heads(x, table, table, torch.tensor([0, 3, 8, 8]))
    assert torch.equal(turned[..., 32:], x[..., 32:])


@each_dtype
@each_shape
def test_gate_is_silu_times_up(dtype: torch.dtype, rows: int, width: int) -> None:
    x = (8 * torch.randn(rows, 2 * width)).to(dtype)
    near(silu_gate(x), silu_gate_reference(x))


def test_numbers_that_are_none_stay_none() -> None:
    x = torch.randn(3, 64)
    x[1, 3] = float("nan")
    assert silu_gate(x)[1, 3].isnan()
    assert silu_gate(x)[0].isfinite().all()
    normed, _ = add_rms_norm(x, None, torch.ones(64), 1e-6)
    assert normed[1].isnan().all()
    assert normed[2].isfinite().all()


@each_interpreted
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (7, 50), (2, 4100)])
@pytest.mark.parametrize("has_residual", [True, False])
def test_triton_s_norm(dtype: torch.dtype, rows: int, width: int, has_residual: bool) -> None:
    x, residual = torch.randn(2, rows, width).to(dtype)
    weight = (torch.rand(width) + 0.5).to(dtype)
    added = residual if has_residual else None
    got, wanted = (
        norm(x, added, weight, 1e-5) for norm in (add_rms_norm_triton, add_rms_norm_reference)
    )
    near(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@each_interpreted
@pytest.mark.parametrize(
    ("rows", "heads", "dim", "rotary"),
    [
        (1, 1, 32, 32),
        (5, 3, 64, 64),
        (2, 9, 128, 64),
        (3, 2, 80, 80),
        (1, 1, 96, 96),
        (1, 5, 256, 256),
    ],
)
def test_triton_s_rotation(
    dtype: torch.dtype, rows: int, heads: int, dim: int, rotary: int
) -> None:
    angles = torch.arange(50)[:, None] * 0.8 ** torch.arange(rotary // 2)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    positions = torch.randint(50, (rows,))
    for x in (
        torch.randn(rows, heads + 2, dim).to(dtype)[:, 1:-1],
        torch.randn(heads, rows, dim).to(dtype).transpose(0, 1),
    ):
        got = rotate_heads_triton(x, cos, sin, positions)
        near(got, rotate_heads_reference(x, cos, sin, positions))
        assert torch.equal(got[..., rotary:], x[..., rotary:])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@each_interpreted
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 2051)])
def test_triton_s_gate(dtype: torch.dtype, rows: int, width: int) -> None:
    x = (8 * torch.randn(rows, 2 * width)).to(dtype)
    near(silu_gate_triton(x), silu_gate_reference(x))
    x[0, 0] = float("nan")
    assert silu_gate_triton(x)[0, 0].isnan()


def test_triton_takes_no_rows() -> None:
    x, table = torch.randn(0, 64), torch.ones(3, 32)
    assert add_rms_norm_triton(x, None, torch.ones(64), 1e-6)[0].shape == (0, 64)
    assert rotate_heads_triton(x.view(0, 2, 32), table, table, torch.zeros(0).long()).numel() == 0
    assert silu_gate_triton(x).shape == (0, 32)
