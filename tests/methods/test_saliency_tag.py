"""Saliency in one byte."""

import pytest
import torch

from kvstrata.methods.saliency_tag import decode_tags, encode_tags


def test_tags_come_back_within_half_a_step_of_an_eighth_of_an_octave() -> None:
    saliency = torch.exp2(torch.linspace(-31.75, 0, 4001))
    ratio = decode_tags(encode_tags(saliency)) / saliency
    assert (ratio.log2().abs() <= 1 / 16 + 1e-4).all()


def test_every_tag_is_its_own_round_trip() -> None:
    tags = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_tags(decode_tags(tags)), tags)


@pytest.mark.parametrize(
    ("saliency", "tag"),
    [
        (1.0, 255),
        (0.5, 247),
        (2.0**-31, 7),
        (2.0, 255),
        (float("inf"), 255),
        (1e-12, 1),
        (1e-44, 1),
        (0.0, 0),
        (-0.0, 0),
        (-1.0, 0),
        (float("nan"), 0),
        (float("-inf"), 0),
    ],
)
def test_tags_are_these(saliency: float, tag: int) -> None:
    assert encode_tags(torch.tensor([saliency])).tolist() == [tag]


def test_unknown_is_zero_and_more_is_more() -> None:
    values = decode_tags(torch.arange(256, dtype=torch.uint8))
    assert values[0] == 0
    assert values[1] > 0
    assert values[255] == 1
    assert (values.diff() > 0).all()


def test_shape_is_kept() -> None:
    tags = encode_tags(torch.rand(2, 3, 64))
    assert (tags.shape, tags.dtype) == ((2, 3, 64), torch.uint8)
    assert decode_tags(tags).dtype == torch.float32
