"""Dense attention with its softmax sum: against its definition, and merged from two parts."""

import pytest
import torch

from kvstrata.kernels.attend_blocks import merge_attention
from kvstrata.kernels.attend_dense import attend_dense, attend_dense_reference

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def tensors(
    group: int, rows: int, cached: int, dim: int = 64, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    shapes = ((3 * group, rows, dim), (3, cached, dim), (3, cached, dim))
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 64, 80])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("rows", "cached"), [(1, 1), (1, 70), (33, 5), (65, 130)])
def test_it_equals_its_definition(
    dtype: torch.dtype, dim: int, group: int, rows: int, cached: int
) -> None:
    q, k, v = tensors(group, rows, cached, dim, dtype)
    for got, wanted in zip(
        attend_dense(q, k, v, 0.2), attend_dense_reference(q, k, v, 0.2), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_causal_attention_equals_its_definition(dtype: torch.dtype, group: int, rows: int) -> None:
    q, k, v = tensors(group, rows, rows, dtype=dtype)
    got = attend_dense(q, k, v, 0.2, is_causal=True)
    wanted = attend_dense_reference(q, k, v, 0.2, is_causal=True)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_a_chunk_and_what_lies_before_it_merge() -> None:
    q, k, v = tensors(3, 90, 90)
    wanted = attend_dense(q, k, v, 0.2, is_causal=True)
    late = q[:, 40:]
    merged = merge_attention(
        [
            attend_dense(late, k[:, :40], v[:, :40], 0.2),
            attend_dense(late, k[:, 40:], v[:, 40:], 0.2, is_causal=True),
        ]
    )
    torch.testing.assert_close(merged[0], wanted[0][:, 40:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged[1], wanted[1][:, 40:], rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    q, k, v = tensors(2, 4, 6)
    for wrong in ((q, k[:2], v), (q[..., :8], k, v), (q[:5], k, v)):
        with pytest.raises(ValueError, match="belong together"):
            attend_dense(*wrong, 1.0)
    with pytest.raises(ValueError, match="as many keys"):
        attend_dense(q, k, v, 1.0, is_causal=True)
    with pytest.raises(ValueError, match="at least one"):
        attend_dense(q, k[:, :0], v[:, :0], 1.0)
