"""Flipped bytes in real frames: each is found."""

import random

import pytest
import torch

from kvstrata.methods import BlockCodec, ExactCodec, FallbackCodec
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from tests.methods.blocks import random_blocks, seal_all

FLIPS_PER_CODEC = 5_000


@pytest.mark.parametrize("codec", [FallbackCodec(), ExactCodec()], ids=lambda codec: codec.name)
def test_every_flipped_byte_is_found(codec: BlockCodec) -> None:
    blocks = random_blocks(3 - codec.first_layer, 2, 32, 2, torch.bfloat16)
    sealed = seal_all(codec, blocks)
    targets = [data for block in sealed for data in block.frames.values()]
    generator = random.Random(2026)
    for _ in range(FLIPS_PER_CODEC):
        damaged = bytearray(generator.choice(targets))
        damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
        with pytest.raises(CorruptFrameError):
            Frame.open(damaged).verify()


def test_a_flipped_byte_between_segments_is_found_and_spares_them() -> None:
    """No checksum covers padding, so it has to be zero."""
    data = next(iter(seal_all(FallbackCodec(), random_blocks(2, 1, 8, 1))[0].frames.values()))
    frame = Frame.open(data)
    first, second = frame.header.segments
    between = range(first.offset + first.length, second.offset)
    for position in (frame.head_bytes, first.offset - 1, *between):
        damaged = bytearray(data)
        damaged[position] ^= 1
        opened = Frame.open(damaged)
        assert opened.segments() == frame.segments()
        with pytest.raises(CorruptFrameError, match="not zero"):
            opened.verify()


@pytest.mark.parametrize("codec", [FallbackCodec(), ExactCodec()], ids=lambda codec: codec.name)
def test_every_flipped_bit_of_prelude_header_and_segments_is_found(codec: BlockCodec) -> None:
    blocks = random_blocks(1, 1, 8, 1, torch.bfloat16)
    for data in seal_all(codec, blocks)[0].frames.values():
        frame = Frame.open(data)
        entry = frame.header.segments[0]
        covered = [*range(frame.head_bytes), *range(entry.offset, entry.offset + entry.length)]
        damaged = bytearray(data)
        for position in covered:
            damaged[position] ^= 1 << (position % 8)
            with pytest.raises(CorruptFrameError):
                Frame.open(damaged).verify()
            damaged[position] ^= 1 << (position % 8)
