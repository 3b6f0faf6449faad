"""Masks of 64 tokens: flags to words and back, and how many, on a CPU and on a GPU."""

import pytest
import torch

from kvstrata.kernels.token_masks import (
    count_tokens,
    count_tokens_reference,
    to_flags,
    to_flags_reference,
    to_mask,
    to_mask_reference,
    token_classes,
)
from kvstrata.kernels.token_masks_numba import to_flags_numba, to_mask_numba
from kvstrata.kernels.token_masks_triton import (
    count_tokens_triton,
    to_flags_triton,
    to_mask_triton,
)

MASKS = (to_mask, to_mask_reference, to_mask_numba, to_mask_triton)
FLAGS = (to_flags, to_flags_reference, to_flags_numba, to_flags_triton)
COUNTS = (count_tokens, count_tokens_reference, count_tokens_triton)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 5), (2, 3, 7)], ids=str)
def test_flags_come_back(shape: tuple[int, ...], share: float) -> None:
    flags = torch.rand(*shape, 64) < share
    words = [sum(1 << t for t in range(64) if row[t]) for row in flags.view(-1, 64).tolist()]
    wanted = torch.tensor([word - (word >> 63 << 64) for word in words], dtype=torch.int64)
    for pack in MASKS:
        masks = pack(flags)
        assert masks.dtype == torch.int64
        assert torch.equal(masks, wanted.view(shape))
    for unpack in FLAGS:
        told = unpack(masks)
        assert told.dtype == torch.bool
        assert torch.equal(told, flags)
    for count in COUNTS:
        counts = count(masks)
        assert counts.dtype == torch.int64
        assert torch.equal(counts, flags.sum(-1))


def test_strided_masks_and_flags_are_read_as_they_are() -> None:
    flags = torch.rand(64, 5, 3) < 0.4
    strided = flags.permute(2, 1, 0)
    for pack in MASKS:
        assert torch.equal(pack(strided), to_mask_reference(strided.contiguous()))
    masks = to_mask(strided).T
    for unpack in FLAGS:
        assert torch.equal(unpack(masks), strided.transpose(0, 1))
    for count in COUNTS:
        assert torch.equal(count(masks), strided.sum(-1).T)


def test_every_token_is_in_one_class() -> None:
    mid, escape = to_mask(torch.rand(2, 9, 3, 64) < 0.5)
    flags = torch.stack([to_flags(mask) for mask in token_classes(mid, escape)])
    assert (flags.sum(0) == 1).all()


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="flags must be bool"):
        to_mask(torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"not torch.bool \(32,\)"):
        to_mask(torch.zeros(32, dtype=torch.bool))
    with pytest.raises(ValueError, match="masks must be int64"):
        to_flags(torch.zeros(3, dtype=torch.int32))


def test_flags_are_their_own_and_may_be_broadcast() -> None:
    masks = torch.tensor([-1, 0, 1, -(2**63)])
    flags = to_flags(masks)
    assert flags.sum(-1).tolist() == [64, 0, 1, 1]
    flags[:] = False
    assert masks.tolist() == [-1, 0, 1, -(2**63)]
    assert to_mask(torch.ones((), dtype=torch.bool).expand(2, 64)).tolist() == [-1, -1]
