"""Escaped tokens: int8 rows that come back in their places, on a GPU as in the reference."""

from collections.abc import Callable

import pytest
import torch

from kvstrata.kernels.escape_rows import (
    EscapeRows,
    pack_escape_rows,
    pack_escape_rows_reference,
    row_starts,
    scatter_escape_rows,
    scatter_escape_rows_reference,
    unpack_escape_rows_reference,
)
from kvstrata.kernels.escape_rows_numba import (
    pack_escape_rows_numba,
    scatter_escape_rows_numba,
    unpack_escape_rows_numba,
)
from kvstrata.kernels.escape_rows_triton import (
    pack_escape_rows_triton,
    scatter_escape_rows_triton,
    unpack_escape_rows_triton,
)
from kvstrata.kernels.token_masks import to_flags, to_mask
from tests.kernels.calibrated_layer import make_layer


def test_escapes_come_back_in_their_places() -> None:
    layer = make_layer(3, 4, 80)
    rows = pack_escape_rows(layer.tokens, layer.classes.escape)
    out = torch.zeros_like(layer.tokens)
    scatter_escape_rows(rows, out)
    flags = to_flags(layer.classes.escape)
    assert not out[~flags].any()
    assert rows.block_offsets.tolist()[-1] == int(flags.sum()) == len(rows.scales)
    # An int8 step is at most norm / 127, and half of it in each of D turned channels.
    norm = layer.tokens[flags].norm(dim=-1)
    assert ((out - layer.tokens)[flags].norm(dim=-1) <= norm / 127 * 0.51 * 80**0.5).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize(
    ("heads", "blocks", "dim", "dtype"),
    [
        (1, 1, 32, torch.float32),
        (3, 2, 64, torch.bfloat16),
        (2, 3, 80, torch.float16),
        (1, 2, 96, torch.float32),
        (1, 1, 128, torch.bfloat16),
        (1, 1, 256, torch.float32),
        (1, 2, 7, torch.float32),
    ],
    ids=str,
)
def test_triton_s_escapes_are_the_reference_s(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    """A product with the matrix adds up in another order: a last place of the scale, one code."""
    x = 3 * torch.randn(heads, blocks, 64, dim).to(dtype)
    x[0, 0, 0] = 0
    masks = to_mask(torch.rand(heads, blocks, 64) < 0.1)
    masks[0, 0] |= 1 | -1 << 63
    for tokens in (x, x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
        codes, scales = pack_escape_rows_triton(tokens, masks)
        expected, expected_scales = pack_escape_rows_reference(x, masks)
        torch.testing.assert_close(scales, expected_scales, rtol=2**-7, atol=0)
        assert scales.dtype == torch.bfloat16
        assert codes.dtype == torch.int8
        assert (codes.int() - expected).abs().max() <= 1
        assert (codes == expected).float().mean() > 0.99
    rows = EscapeRows(masks, expected_scales, expected, row_starts(masks)[::heads])
    read = unpack_escape_rows_triton(rows)
    torch.testing.assert_close(read, unpack_escape_rows_reference(rows))
    told = torch.zeros_like(x)
    scatter_escape_rows_reference(rows, told)
    for found in (torch.zeros_like(x), torch.zeros_like(x).mT.contiguous().mT):
        scatter_escape_rows_triton(rows, found)
        assert not found[~to_flags(masks)].any()
        # The interpreter cuts bf16 off where a GPU rounds it.
        torch.testing.assert_close(found, told, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "blocks", "dim", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (1, 1, 32, torch.float32),
        (3, 40, 64, torch.bfloat16),
        (2, 3, 80, torch.float16),
        (1, 2, 96, torch.float32),
        (1, 1, 128, torch.bfloat16),
        (1, 1, 256, torch.float32),
        (1, 2, 7, torch.float32),
    ],
    ids=str,
)
def test_numba_s_escapes_have_the_reference_s_bits(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    x = 3 * torch.randn(heads, blocks, 64, dim).to(dtype)
    x[0, 0, 0] = 0
    masks = to_mask(torch.rand(heads, blocks, 64) < 0.1)
    masks[0, 0] |= 1 | -1 << 63
    expected = pack_escape_rows_reference(x, masks)
    for tokens in (x, x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
        for found, wanted in zip(pack_escape_rows_numba(tokens, masks), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    codes, scales = expected
    rows = EscapeRows(masks, scales, codes, row_starts(masks)[::heads])
    assert torch.equal(unpack_escape_rows_numba(rows), unpack_escape_rows_reference(rows))
    told, found = torch.zeros_like(x), torch.zeros_like(x)
    scatter_escape_rows_reference(rows, told)
    scatter_escape_rows_numba(rows, found)
    assert torch.equal(found, told)
    strided = torch.zeros_like(x).mT.contiguous().mT
    scatter_escape_rows(rows, strided)
    assert torch.equal(strided, told)


def test_triton_rounds_escapes_as_the_reference_does() -> None:
    """An odd dim is not turned, so nothing may differ; ties go to even."""
    x = torch.randn(1, 1, 64, 7)
    x[0, 0, 0] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -127])
    x[0, 0, 1] = 127 * (1 + 1 / 256)
    x[0, 0, 2] = 127 * (1 + 3 / 256)
    masks = torch.full((1, 1), -1)
    found, expected = pack_escape_rows_triton(x, masks), pack_escape_rows_reference(x, masks)
    for mine, told in zip(found, expected, strict=True):
        assert torch.equal(mine, told)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("pack", [pack_escape_rows_triton, pack_escape_rows_numba])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_escapes_that_are_not_finite_are_refused(bad: float, pack: Callable[..., object]) -> None:
    x = torch.randn(2, 1, 64, 80)
    x[1, 0, 5, 79] = bad
    masks = torch.tensor([[3], [1]])
    pack(x, masks)
    masks[1] |= 1 << 5
    with pytest.raises(ValueError, match="not finite"):
        pack(x, masks)


@pytest.mark.parametrize(
    ("pack", "unpack", "scatter"),
    [
        (pack_escape_rows_triton, unpack_escape_rows_triton, scatter_escape_rows_triton),
        (pack_escape_rows_numba, unpack_escape_rows_numba, scatter_escape_rows_numba),
    ],
)
def test_no_escapes_are_no_rows(
    pack: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    unpack: Callable[..., torch.Tensor],
    scatter: Callable[..., None],
) -> None:
    x, masks = torch.randn(2, 1, 64, 32), torch.zeros(2, 1, dtype=torch.int64)
    codes, scales = pack(x, masks)
    assert codes.shape == (0, 32)
    rows = EscapeRows(masks, scales, codes, row_starts(masks)[::2])
    assert unpack(rows).shape == (0, 32)
    before = x.clone()
    scatter(rows, x)
    assert torch.equal(x, before)
