"""Sets of tokens as words: bit t is token t, whatever the shape and the strides."""

import pytest
import torch

from kvstrata.kernels.token_masks import count_tokens, to_flags, to_mask

SHAPES = [(1,), (5,), (3, 7), (0, 2), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_are_what_their_bits_say(shape: tuple[int, ...]) -> None:
    flags = torch.rand(*shape, 64) < 0.4
    places = torch.arange(64)
    masks = to_mask(flags)
    assert masks.dtype == torch.int64
    assert masks.shape == shape
    assert torch.equal(masks, (flags.long() << places).sum(-1))
    assert torch.equal(to_flags(masks), flags)
    assert torch.equal(count_tokens(masks), flags.sum(-1))
    if len(shape) > 1:
        assert torch.equal(to_flags(masks.transpose(0, 1)), flags.transpose(0, 1))


def test_flags_are_their_own_and_may_be_broadcast() -> None:
    masks = torch.tensor([-1, 0, 1, -(2**63)])
    flags = to_flags(masks)
    assert flags.sum(-1).tolist() == [64, 0, 1, 1]
    flags[:] = False
    assert masks.tolist() == [-1, 0, 1, -(2**63)]
    assert to_mask(torch.ones((), dtype=torch.bool).expand(2, 64)).tolist() == [-1, -1]
