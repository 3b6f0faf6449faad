"""Gather and scatter by mask: every version against a loop over bits."""

import pytest
import torch

from kvstrata.kernels import token_masks
from kvstrata.kernels.gather import (
    gather_by_mask,
    gather_reference,
    scatter_by_mask,
    scatter_reference,
)
from kvstrata.kernels.gather_numba import gather_numba, scatter_numba
from kvstrata.kernels.gather_triton import gather_triton, scatter_triton
from kvstrata.kernels.token_masks import count_tokens, to_flags

SHAPES = {"one": (1, 1, 1), "odd": (3, 5, 80)} | {
    f"dim{dim}": (2, 1, dim) for dim in (32, 64, 96, 128, 256)
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8]
VERSIONS = {
    "reference": (gather_reference, scatter_reference),
    "numba": (gather_numba, scatter_numba),
    "triton": (gather_triton, scatter_triton),
}
SPECIAL = [0, -1, 1, -(2**63), 2**63 - 1, 0x5555555555555555, 1 << 40, 0xFFFF0000]


def _masks(heads: int, num_blocks: int) -> torch.Tensor:
    masks = torch.randint(-(2**63), 2**63 - 1, (heads, num_blocks))
    flat = masks.view(-1)
    flat[1 : 1 + len(SPECIAL)] = torch.tensor(SPECIAL)[: flat.numel() - 1]
    return masks


def _blocks(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    heads, num_blocks, dim = shape
    return (torch.randn(heads, num_blocks, 64, dim) * 50).to(dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_equals_a_loop(shape, dtype, version):
    gather, scatter = VERSIONS[version]
    blocks, masks = _blocks(shape, dtype), _masks(*shape[:2])
    kept = [
        (head, block, token)
        for head, row in enumerate(masks.tolist())
        for block, mask in enumerate(row)
        for token in range(64)
        if mask >> token & 1
    ]
    counts = count_tokens(masks)
    assert counts.sum() == len(kept)
    rows = torch.full((len(kept), shape[2]), 99, dtype=dtype)
    positions = torch.full((len(kept),), -1)
    gather(blocks, masks, counts, rows, positions)
    assert positions.tolist() == [block * 64 + token for _, block, token in kept]
    assert torch.equal(rows, torch.stack([blocks[at] for at in kept]))
    out = torch.full_like(blocks, 7)
    scatter(rows, masks, counts, out)
    chosen = to_flags(masks)
    assert torch.equal(out[chosen], blocks[chosen])
    assert (out[~chosen] == 7).all()


@pytest.mark.parametrize("by_numpy", [True, False])
def test_bits_are_counted_and_unpacked_with_the_sign(by_numpy, monkeypatch):
    if not by_numpy:
        monkeypatch.delattr(token_masks.np, "bitwise_count", raising=False)  # as on a GPU
    masks = torch.tensor(SPECIAL)
    expected = [(mask % 2**64).bit_count() for mask in SPECIAL]
    assert count_tokens(masks).tolist() == expected
    assert to_flags(masks).sum(-1).tolist() == expected
    assert to_flags(torch.tensor([-(2**63)])).nonzero().tolist() == [[0, 63]]


def test_all_tokens_kept_is_the_identity_bit_for_bit():
    raw = torch.randint(-(2**15), 2**15, (2, 3, 64, 80), dtype=torch.int16)  # NaNs of all kinds
    masks = torch.full((2, 3), -1)
    rows, counts, positions = gather_by_mask(raw.view(torch.bfloat16), masks)
    assert torch.equal(rows.view(torch.int16), raw.view(-1, 80))
    assert (counts == 64).all()
    assert torch.equal(positions, torch.arange(192).repeat(2))
    assert torch.equal(scatter_by_mask(rows, masks).view(torch.int16), raw)


def test_no_tokens_kept_and_no_blocks():
    masks = torch.zeros(2, 3, dtype=torch.int64)
    rows, counts, positions = gather_by_mask(torch.randn(2, 3, 64, 8), masks)
    assert (rows.shape, positions.shape) == ((0, 8), (0,))
    assert torch.equal(counts, masks)
    assert torch.equal(scatter_by_mask(rows, masks), torch.zeros(2, 3, 64, 8))
    rows, counts, _ = gather_by_mask(torch.randn(2, 0, 64, 8), masks[:, :0])
    assert (rows.shape, counts.shape) == ((0, 8), (2, 0))


def test_strided_blocks_and_scatter_into_what_is_there():
    blocks = torch.randn(3, 2, 64, 8).transpose(0, 1)
    masks = _masks(3, 2).T
    rows, counts, positions = gather_by_mask(blocks, masks)
    plain = gather_by_mask(blocks.contiguous(), masks.contiguous())
    assert torch.equal(rows, plain[0])
    assert torch.equal(counts, plain[1])
    assert torch.equal(positions, plain[2])
    out = torch.ones(2, 3, 64, 8)
    assert scatter_by_mask(rows, masks, out) is out
    assert torch.equal(out, torch.where(to_flags(masks)[..., None], blocks, 1.0))


def test_inputs_that_do_not_fit_are_refused():
    blocks, masks = torch.zeros(2, 3, 64, 8), torch.full((2, 3), 3)
    for wrong, said in (
        ((blocks, masks.int()), "int64"),
        ((blocks, masks[0]), "int64"),
        ((blocks[:, :, :63], masks), "heads, blocks, 64"),
        ((blocks, masks[:, :2]), "need blocks of shape"),
        ((blocks.double(), masks), "1, 2 or 4 bytes"),
        ((blocks.to("meta"), masks), "on one device"),
    ):
        with pytest.raises(ValueError, match=said):
            gather_by_mask(*wrong)
    rows = torch.zeros(12, 8)
    with pytest.raises(ValueError, match="keep 12 rows"):
        scatter_by_mask(rows[:11], masks)
    with pytest.raises(ValueError, match="out must be contiguous"):
        scatter_by_mask(rows, masks, torch.zeros(2, 3, 64, 9))
