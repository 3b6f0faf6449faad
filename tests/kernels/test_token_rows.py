"""Attention over rows kept by token: against its definition, for any mixture of lengths."""

import pytest
import torch

from kvstrata.kernels.row_pages_numba import SPLIT_ROWS
from kvstrata.kernels.token_rows import (
    TokenRows,
    TokenTable,
    attend_tokens,
    attend_tokens_reference,
)
from kvstrata.kernels.token_rows_triton import SPLIT_TOKENS, attend_tokens_triton

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case(
    lengths: list[int], heads: int, group: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, TokenTable, TokenRows, float]:
    keys, values = torch.randn(2, 50, heads, dim).to(dtype)
    angles = torch.arange(max(lengths))[:, None] * 0.9 ** torch.arange(dim // 2)
    table = TokenTable(keys, values, angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    ids = torch.randint(50, (sum(lengths),), dtype=torch.int32)
    rows = TokenRows(ids, torch.tensor([0, *lengths]).cumsum(0))
    return torch.randn(len(lengths), heads * group, dim).to(dtype), table, rows, dim**-0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize("dim", [8, 32, 64, 96])
def test_it_equals_its_definition(dtype: torch.dtype, group: int, dim: int) -> None:
    arguments = case([1, 64, 130, 7], 2, group, dim, dtype)
    for got, wanted in zip(
        attend_tokens(*arguments), attend_tokens_reference(*arguments), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_long_sequences_are_split_and_merged() -> None:
    arguments = case([2 * SPLIT_ROWS + 5, 3], 1, 2, 32)
    for got, wanted in zip(
        attend_tokens(*arguments), attend_tokens_reference(*arguments), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize(
    ("lengths", "heads", "group", "dim", "dtype"),
    [
        ([1], 1, 1, 32, torch.float32),
        ([1, 64, 130, 7], 2, 3, 64, torch.float16),  # the interpreter multiplies no bf16
        ([33], 1, 4, 80, torch.float32),
        ([17, 5], 2, 5, 96, torch.float16),
        ([40], 1, 8, 128, torch.float32),
        ([3], 1, 17, 256, torch.float32),
        ([SPLIT_TOKENS + 9, 2], 1, 1, 8, torch.float32),
    ],
    ids=str,
)
def test_triton_s_equals_its_definition(
    lengths: list[int], heads: int, group: int, dim: int, dtype: torch.dtype
) -> None:
    arguments = case(lengths, heads, group, dim, dtype)
    for got, wanted in zip(
        attend_tokens_triton(*arguments), attend_tokens_reference(*arguments), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_equal_tokens_at_other_positions_have_other_keys() -> None:
    queries, table, rows, scaling = case([40], 1, 1, 32)
    same = TokenRows(torch.full_like(rows.token_ids, 3), rows.ends)
    out, _ = attend_tokens(queries, table, same, scaling)
    torch.testing.assert_close(out[0, 0], table.values[3, 0], rtol=1e-5, atol=1e-5)
    _, lse = attend_tokens(queries, table, same, scaling)
    keys = table.keys[3, 0].double()
    at_start = float(queries[0, 0].double() @ keys) * scaling
    assert abs(float(lse[0, 0]) - at_start - float(torch.tensor(40.0).log())) > 1e-3
