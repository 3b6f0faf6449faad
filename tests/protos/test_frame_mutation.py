"""Flipped bytes in real frames: found, or without any effect."""

import random

import pytest
import torch

from kvstrata.methods import BlockCodec, ExactCodec, FallbackCodec
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from tests.methods.blocks import open_all, random_blocks, seal_all, shape_of

FLIPS_PER_CODEC = 5_000


@pytest.mark.parametrize("codec", [FallbackCodec(), ExactCodec()], ids=lambda codec: codec.name)
def test_every_flipped_byte_is_found_or_harmless(codec: BlockCodec) -> None:
    blocks = random_blocks(3 - codec.first_layer, 2, 32, 2, torch.bfloat16)
    shape = shape_of(blocks)
    sealed = seal_all(codec, blocks)
    opened = open_all(sealed)
    keys, values = codec.decode(opened, shape)
    targets = [(n, s, data) for n, block in enumerate(sealed) for s, data in block.frames.items()]
    generator = random.Random(2026)
    harmless = 0
    for _ in range(FLIPS_PER_CODEC):
        n, stratum, data = generator.choice(targets)
        damaged = bytearray(data)
        damaged[generator.randrange(len(data))] ^= generator.randrange(1, 256)
        try:
            frame = Frame.open(damaged)
            frame.verify()
        except CorruptFrameError:
            continue
        harmless += 1
        assert frame.header == opened[n][stratum].header
        assert frame.segments() == opened[n][stratum].segments()
        read_keys, read_values = codec.decode([{**opened[n], stratum: frame}], shape)
        assert torch.equal(read_keys, keys[:, :, n : n + 1])
        assert torch.equal(read_values, values[:, :, n : n + 1])
    # Padding is the only part that no checksum covers: some flips must have hit it, most must not.
    assert 0 < harmless < FLIPS_PER_CODEC // 10


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
