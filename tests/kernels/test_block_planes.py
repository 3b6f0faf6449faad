"""Planes of blocks and rows of tokens: bytes are those of the reference, errors stay in cells."""

import pytest
import torch

from kvstrata.kernels.block_planes import (
    MidRows,
    PlaneLayout,
    decode_block_planes,
    decode_block_planes_reference,
    encode_block_planes,
    encode_block_planes_reference,
    fine_codes,
)
from kvstrata.kernels.block_planes_numba import (
    decode_block_planes_numba,
    encode_block_planes_numba,
)
from kvstrata.kernels.block_planes_triton import (
    decode_block_planes_triton,
    encode_block_planes_triton,
)
from kvstrata.kernels.mid_rows import pack_mid_rows, pack_mid_rows_reference
from kvstrata.kernels.mid_rows_numba import pack_mid_rows_numba
from kvstrata.kernels.mid_rows_triton import pack_mid_rows_triton
from kvstrata.kernels.sign_codes import fine_levels, thresholds
from kvstrata.kernels.token_masks import count_tokens, to_flags, to_mask
from tests.kernels.calibrated_layer import DIMS, make_layout

SHAPES = [(1, 1, dim) for dim in DIMS] + [(3, 5, 64), (2, 3, 80)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_shape = pytest.mark.parametrize(("heads", "blocks", "dim"), SHAPES)


def make(heads: int, blocks: int, dim: int) -> tuple[torch.Tensor, PlaneLayout, torch.Tensor]:
    y = 1.5 * torch.randn(heads, blocks, 64, dim)
    y.view(-1)[:6] = torch.tensor([0.0, -0.0, -1e-9, 9.0, -9.0, 1e4])
    return y, make_layout(heads, dim), torch.rand(heads, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_shape
def test_fast_words_and_errors_are_the_reference_s(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    y, layout, weights = make(heads, blocks, dim)
    words, error = encode_block_planes_numba(y.to(dtype), layout, weights)
    expected, expected_error = encode_block_planes_reference(y.to(dtype), layout, weights)
    assert torch.equal(words, expected)
    torch.testing.assert_close(error, expected_error, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@each_shape
def test_fast_rows_and_values_are_the_reference_s(
    heads: int, blocks: int, dim: int, share: float, dtype: torch.dtype
) -> None:
    y, layout, weights = make(heads, blocks, dim)
    words, _ = encode_block_planes(y, layout, weights)
    masks = to_mask(torch.rand(heads, blocks, 64) < share)
    mid = pack_mid_rows(y, masks, layout)
    starts = layout.mid_starts(masks)
    assert torch.equal(pack_mid_rows_numba(y, masks, layout, starts), mid.rows)
    assert torch.equal(pack_mid_rows_reference(y, masks, layout, starts), mid.rows)
    for rows in (None, mid):
        found = decode_block_planes_numba(words, layout, rows, dtype)
        expected = decode_block_planes_reference(words, layout, rows, dtype)
        assert found.shape == (heads, blocks * 64, layout.num_kept(refined=rows is not None))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "blocks", "dim"), [(1, 1, 32), (2, 3, 80)])
def test_triton_s_words_and_values_are_the_reference_s(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    y, layout, weights = make(heads, blocks, dim)
    words, error = encode_block_planes_triton(y.to(dtype), layout, weights)
    expected, expected_error = encode_block_planes_reference(y.to(dtype), layout, weights)
    assert torch.equal(words, expected)
    torch.testing.assert_close(error, expected_error, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "blocks", "dim", "share"),
    [(1, 1, 32, 0.3), (2, 3, 80, 0.3), (1, 2, 24, 1.0), (3, 1, 64, 0.0), (2, 1, 256, 0.5)],
)
def test_triton_s_rows_and_values_are_the_reference_s(
    heads: int, blocks: int, dim: int, share: float, dtype: torch.dtype
) -> None:
    y, layout, weights = make(heads, blocks, dim)
    words, _ = encode_block_planes_reference(y, layout, weights)
    masks = to_mask(torch.rand(heads, blocks, 64) < share)
    masks[-1, -1] |= -1 << 63  # where the share is 0, the last token alone has a row
    mid = pack_mid_rows(y.to(dtype), masks, layout)
    starts = layout.mid_starts(masks)
    assert torch.equal(pack_mid_rows_triton(y.to(dtype), masks, layout, starts), mid.rows)
    for rows in (None, mid):
        found = decode_block_planes_triton(words, layout, rows, dtype)
        told = decode_block_planes_reference(words, layout, rows, dtype)
        # The interpreter cuts bf16 off where a GPU rounds it.
        torch.testing.assert_close(found, told, rtol=0 if dtype == torch.float32 else 2**-7, atol=0)


def test_what_comes_back_lies_in_the_cell_of_what_went_in() -> None:
    y, layout, weights = make(2, 2, 64)
    words, error = encode_block_planes(y, layout, weights)
    every = torch.full((2, 2), -1, dtype=torch.int64)
    full = PlaneLayout(layout.widths, torch.tensor([64, 64]))
    fine = decode_block_planes(words, full, pack_mid_rows(y, every, full)).view(y.shape)
    base = decode_block_planes(words, full)
    for h in range(2):
        for c in range(64):
            width = int(layout.widths[h, c])
            levels = fine_levels(width)
            codes = torch.bucketize(fine[h, ..., c].contiguous(), levels - 1e-6) - 1
            borders = torch.tensor([-torch.inf, *thresholds(width), torch.inf])
            grid = 1.01 / 128  # borders lie on a grid
            assert (y[h, ..., c] >= borders[codes] - grid).all()
            assert (y[h, ..., c] <= borders[codes + 1] + grid).all()
    rest = y.clone()
    rest[..., : base.shape[-1]] -= base.view(2, 2, 64, -1)
    expected = (weights[:, None, None] * rest.square()).sum(-1)
    torch.testing.assert_close(error, expected, rtol=1e-5, atol=1e-5)


def test_words_lie_where_the_layout_says() -> None:
    widths = torch.tensor([[2, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    layout = PlaneLayout(widths, torch.tensor([8, 0]))
    assert layout.num_words == 4
    assert layout.words_per_head.tolist() == [3, 1]
    assert layout.word_offsets[:, :2].tolist() == [[0, 2], [3, 4]]
    assert layout.mid_row_bytes.tolist() == [2, 0]
    y = torch.full((2, 1, 64, 8), -1.0)
    y[0, 0, 5, 0], y[0, 0, 63, 0], y[0, 0, 6, 1] = 2.0, 0.1, 1.0
    words, _ = encode_block_planes(y, layout, torch.ones(2, 8))
    top = 1 << 5 | -(1 << 63)
    # plane 1 of -1 is 0 (level -1.51), of 2 it is 1, of .1 it is 0
    assert words.tolist() == [[top, 1 << 6, 1 << 5, 0]]
    rows = pack_mid_rows(y, torch.tensor([[1 << 6], [0]]), layout)
    quarters = fine_codes(y, layout)[0, 0, 6] & 3
    assert rows.rows.numel() == 2
    assert [int(rows.rows[bit]) for bit in (0, 1)] == [
        sum((int(q) >> (1 - bit) & 1) << i for i, q in enumerate(quarters)) for bit in (0, 1)
    ]


def test_no_blocks_and_no_bits_are_fine() -> None:
    layout = PlaneLayout(torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    y = torch.randn(2, 3, 64, 64)
    words, error = encode_block_planes(y, layout, torch.ones(2, 64))
    assert words.shape == (3, 0)
    torch.testing.assert_close(error, y.square().sum(-1))
    assert not decode_block_planes(words, layout).any()
    words, error = encode_block_planes(y[:, :0], make_layout(2, 64), torch.ones(2, 64))
    assert words.shape[0] == error.shape[1] == 0
    assert decode_block_planes(words, make_layout(2, 64)).shape[1] == 0


def test_strided_components_are_read_like_contiguous_ones() -> None:
    y, layout, weights = make(3, 4, 64)
    strided = y.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    for found, expected in zip(
        encode_block_planes(strided, layout, weights),
        encode_block_planes(y, layout, weights),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("component", [0, 63])
def test_what_is_not_finite_is_refused(bad: float, component: int) -> None:
    y, layout, weights = make(2, 2, 64)
    y[1, 1, 40, component] = bad
    with pytest.raises(ValueError, match="NaN, infinite"):
        encode_block_planes(y, layout, weights + 0.01)


def test_rows_that_do_not_fit_their_masks_are_refused() -> None:
    y, layout, weights = make(2, 3, 64)
    layout = PlaneLayout(layout.widths, torch.tensor([64, 8]))
    words, _ = encode_block_planes(y, layout, weights)
    mid = pack_mid_rows(y, torch.tensor([[1, 3, 0], [7, 0, 1]]), layout)
    broken = {
        "bytes of mid rows": MidRows(mid.masks, mid.rows[:-1], mid.block_offsets),
        "do not fit the masks": MidRows(mid.masks | 8, mid.rows, mid.block_offsets),
        "mid block offsets": MidRows(mid.masks, mid.rows, mid.block_offsets[:-1]),
        "mid rows must": MidRows(mid.masks, mid.rows.int(), mid.block_offsets),
        "mid masks": MidRows(mid.masks[:1], mid.rows, mid.block_offsets),
        "fit": MidRows(mid.masks, mid.rows, mid.block_offsets + 1),
    }
    for match, rows in broken.items():
        with pytest.raises(ValueError, match=match):
            decode_block_planes(words, layout, rows)
    with pytest.raises(ValueError, match="words must be"):
        decode_block_planes(words[:, :-1], layout)
    with pytest.raises(ValueError, match="components must be"):
        encode_block_planes(y[:, :, :32], layout, weights)
    with pytest.raises(ValueError, match="weights must be"):
        encode_block_planes(y, layout, weights.double())


@pytest.mark.parametrize(
    ("widths", "counts", "match"),
    [
        ([[1, 2]], [0], "must not increase"),
        ([[7, 2]], [0], "limit is 6"),
        ([[2, 1]], [1], "multiples of 8"),
        ([[2, 1]], [8], "up to 2"),
        ([[2, 1]], [0, 0], "1 integers"),
    ],
)
def test_impossible_layouts_are_refused(
    widths: list[list[int]], counts: list[int], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        PlaneLayout(torch.tensor(widths, dtype=torch.uint8), torch.tensor(counts))


def test_masks_count_and_come_back() -> None:
    flags = torch.rand(3, 7, 64) < 0.5
    flags[0, 0], flags[0, 1] = True, False
    masks = to_mask(flags)
    assert torch.equal(to_flags(masks), flags)
    assert torch.equal(count_tokens(masks), flags.sum(-1))
