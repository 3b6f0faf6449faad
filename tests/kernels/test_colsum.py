"""Attention column sums: every version against plain softmax over the full matrix."""

import pytest
import torch

from kvstrata.kernels.colsum import column_sums, column_sums_reference
from kvstrata.kernels.colsum_numba import column_sums_numba
from kvstrata.kernels.colsum_triton import column_sums_triton

# layers, query heads, key heads, rows, keys, head_dim
SHAPES = {
    "one": (1, 1, 1, 1, 1, 32),
    "odd": (2, 6, 2, 37, 130, 80),
    "group-of-all": (1, 3, 1, 5, 257, 64),
    "no-group": (1, 2, 2, 9, 64, 96),
    "common": (1, 2, 1, 4, 33, 128),
    "wide": (1, 2, 1, 3, 70, 256),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, loudness: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layers, heads, kv_heads, rows, num_keys, dim = shape
    queries = (torch.randn(layers, heads, rows, dim) * loudness).to(dtype)
    keys = torch.randn(layers, kv_heads, num_keys, dim).to(dtype)
    positions = torch.randint(0, num_keys + num_keys // 8, (rows,)).sort().values
    return queries, keys, positions


def _naive(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, scaling: float
) -> torch.Tensor:
    group = queries.shape[1] // keys.shape[1]
    wide = keys.double().repeat_interleave(group, dim=1)
    logits = queries.double() @ wide.transpose(2, 3) * scaling
    hidden = torch.arange(keys.shape[2]) > positions[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).sum(2).float()


@each_shape
@pytest.mark.parametrize("version", [column_sums_reference, column_sums_numba, column_sums_triton])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_version_equals_the_full_matrix(shape, version, dtype):
    if version is column_sums_triton and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies bf16 as integers")
    inputs = _inputs(shape, dtype)
    torch.testing.assert_close(
        version(*inputs, 0.125), _naive(*inputs, 0.125), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("loudness", [30.0, 3000.0])
@pytest.mark.parametrize("version", [column_sums_reference, column_sums_numba, column_sums_triton])
def test_peaked_attention_does_not_overflow(version, loudness):
    inputs = _inputs((1, 2, 1, 20, 150, 64), loudness=loudness)
    sums = version(*inputs, 0.125)
    # Logits of thousands carry their float32 rounding into the exponent.
    atol = 20 * loudness * 64 * 2.0**-24
    torch.testing.assert_close(sums, _naive(*inputs, 0.125), rtol=0, atol=atol)
    torch.testing.assert_close(sums.sum(-1), torch.full((1, 2), 20.0), rtol=1e-5, atol=0)


def test_the_sums_of_a_head_add_up_to_the_number_of_rows():
    for num_keys in (12, 300):
        queries, keys = torch.randn(3, num_keys, 64), torch.randn(1, num_keys, 64)
        sums = column_sums(queries, keys, torch.arange(num_keys), 0.3)
        assert sums.shape == (3, num_keys)
        torch.testing.assert_close(sums.sum(-1), torch.full((3,), float(num_keys)))


def test_rows_may_come_in_any_order_and_repeat():
    queries, keys, _ = _inputs((1, 2, 1, 6, 40, 64))
    positions = torch.tensor([30, 2, 39, 2, 17, 0])
    sums = column_sums(queries, keys, positions, 0.2)
    torch.testing.assert_close(sums, _naive(queries, keys, positions, 0.2))
    assert (positions == torch.tensor([30, 2, 39, 2, 17, 0])).all()


@pytest.mark.parametrize("far", [torch.iinfo(torch.int32).max, torch.iinfo(torch.int64).max])
def test_a_row_far_beyond_the_keys_sees_all_of_them(far):
    queries, keys, _ = _inputs((1, 2, 1, 3, 40, 64))
    dtype = torch.int32 if far < 2**31 else torch.int64
    sums = column_sums(queries, keys, torch.tensor([far, 3, far], dtype=dtype), 0.2)
    torch.testing.assert_close(sums, _naive(queries, keys, torch.tensor([39, 3, 39]), 0.2))


def test_many_keys_pass_through_several_tiles_and_few_heads_share_threads():
    inputs = _inputs((1, 2, 1, 75, 9000, 32))
    torch.testing.assert_close(
        column_sums(*inputs, 0.2), _naive(*inputs, 0.2), rtol=2e-5, atol=2e-5
    )


def test_strided_tensors_give_what_contiguous_ones_do():
    queries, keys = torch.randn(5, 2, 4, 64).transpose(0, 2), torch.randn(30, 4, 2, 64)
    keys = keys.permute(1, 2, 0, 3)
    positions = torch.tensor([3, 9, 11, 20, 29])
    plain = column_sums(queries.contiguous(), keys.contiguous(), positions, 0.2)
    assert torch.equal(column_sums(queries, keys, positions, 0.2), plain)


def test_no_rows_give_zeros():
    sums = column_sums(torch.zeros(2, 0, 8), torch.zeros(1, 5, 8), torch.zeros(0).long(), 1.0)
    assert torch.equal(sums, torch.zeros(2, 5))


@pytest.mark.parametrize("version", [column_sums_reference, column_sums_numba])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(version, bad):
    queries, keys, positions = _inputs((1, 2, 1, 9, 64, 64))
    positions[:] = 60
    broken = keys.clone()
    broken[0, 0, 50, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        version(queries, broken, positions, 1.0)
    broken = queries.clone()
    broken[0, 1, 8, 63] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        version(broken, keys, positions, 1.0)


def test_inputs_that_do_not_fit_are_refused():
    queries, keys, positions = torch.zeros(4, 3, 8), torch.zeros(2, 9, 8), torch.arange(3)
    for wrong, said in (
        ((queries[:3], keys, positions), "multiple of key heads"),
        ((queries[..., :4], keys, positions), "layers and head_dim"),
        ((queries, keys[:, :0], positions), "at least one key"),
        ((queries, keys.half(), positions), "float32 and torch.float16"),
        ((queries.double(), keys.double(), positions), "must both be"),
        ((queries, keys, positions[:2]), "3 rows need as many"),
        ((queries, keys, positions.float()), "integer positions"),
        ((queries, keys, positions - 1), "one is -1"),
        ((queries[0], keys[0], positions), "both need"),
        ((queries, keys.to("meta"), positions), "on one device"),
    ):
        with pytest.raises(ValueError, match=said):
            column_sums(*wrong, 1.0)
