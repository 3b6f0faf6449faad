"""Blocks of the calibrated codec that lack tokens: smaller by what they lack, else unchanged."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.codec import SelectiveCodec
from kvstrata.methods.left_out import compact_segment, spread_segment
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from tests.methods.blocks import BASE, open_all, round_trip, seal_all, shape_of
from tests.methods.profiles import blocks_of, make_profile

SHAPES = [(1, 1, 32, 1), (2, 3, 64, 3), (3, 1, 24, 2)]
each_shape = pytest.mark.parametrize(("layers", "heads", "dim", "count"), SHAPES, ids=str)


def some(blocks, share: float) -> torch.Tensor:
    kept = torch.rand(blocks.saliency.shape) < share
    kept[0, 0, 0] = False  # one head without any token
    kept[0, 0, 0, 7] = True
    return kept


@each_shape
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_kept_tokens_read_as_in_a_whole_block_and_the_masks_tell_them(
    layers: int, heads: int, dim: int, count: int, share: float
):
    codec = CalibratedCodec(make_profile(layers, heads, dim), 0.05)
    assert isinstance(codec, SelectiveCodec)
    blocks = blocks_of(codec.profile, count)
    blocks = replace(blocks, saliency=torch.ones_like(blocks.saliency))
    kept = some(blocks, share)
    frames = open_all(seal_all(codec, replace(blocks, kept=kept)))
    found = codec.kept(frames, shape_of(blocks))
    assert found is not None
    assert torch.equal(found, kept)
    keys, values = codec.decode(frames, shape_of(blocks))
    whole_keys, _ = round_trip(codec, blocks)
    assert torch.equal(keys[kept], whole_keys[kept])  # V has a bias of its base tokens
    assert values.isfinite().all()
    error = (values - blocks.values)[kept].square().mean()
    assert error < 1.5 * (round_trip(codec, blocks)[1] - blocks.values)[kept].square().mean() + 1e-6


def test_what_lacks_no_token_is_written_as_ever():
    codec = CalibratedCodec(make_profile(), 0.05)
    blocks = blocks_of(codec.profile, 2)
    everything = replace(blocks, kept=torch.ones_like(blocks.saliency, dtype=torch.bool))
    sealed = seal_all(codec, blocks)
    assert [b.frames for b in seal_all(codec, everything)] == [b.frames for b in sealed]
    assert codec.kept(open_all(sealed), shape_of(blocks)) is None


def test_bytes_fall_with_what_is_left_out():
    codec = CalibratedCodec(make_profile(2, 3, 64), 0.02)
    blocks = blocks_of(codec.profile, 4)
    sizes = []
    for share in (1.0, 0.5, 0.25):
        kept = torch.rand(blocks.saliency.shape) < share
        segments = codec.encode(replace(blocks, kept=kept))
        sizes.append(sum(len(s) for b in segments for part in b.values() for s in part.values()))
    fixed = 4 * 2 * (4 * 3 * 8 + 64 + 3 * 32 + 3)  # masks, tags and biases stay
    assert sizes[1] - fixed < 0.56 * (sizes[0] - fixed)
    assert sizes[2] - fixed < 0.31 * (sizes[0] - fixed)


def test_a_token_that_is_left_out_changes_no_byte():
    codec = CalibratedCodec(make_profile(2, 2, 32), 0.05)
    blocks = blocks_of(codec.profile, 2)
    kept = some(blocks, 0.5)
    wild = blocks.keys.masked_fill(~kept[..., None], 1e3)
    given = replace(blocks, keys=wild, values=blocks.values + 9 * ~kept[..., None], kept=kept)
    first = seal_all(codec, replace(blocks, kept=kept))
    assert [b.frames for b in seal_all(codec, given)] == [b.frames for b in first]


def test_segments_come_back_to_the_bit():
    rng = np.random.default_rng(0)
    heads, words = 2, (np.array([3, 0]), np.array([1, 5]))
    masks = rng.integers(0, 2**64, (2, 2, heads), np.uint64)
    masks[:, 0, 0] = 0
    rest = rng.integers(0, 256, 11, np.uint8).tobytes()
    dense = masks.tobytes() + rng.integers(0, 2**64, 9, np.uint64).tobytes() + rest
    packed = compact_segment(dense, words)
    assert len(packed) < len(dense)
    assert packed.endswith(rest)
    spread = bytes(spread_segment(packed, words))
    assert len(spread) == len(dense)
    assert compact_segment(spread, words) == packed
    left_out = masks[0] & masks[1]
    at = masks.nbytes
    planes = [np.frombuffer(x[at : at + 72], "<u8") for x in (dense, spread)]
    keep = np.concatenate([np.repeat(~left_out[side], words[side]) for side in (0, 1)])
    assert (planes[1] == planes[0] & keep).all()


def test_a_segment_that_is_too_short_for_its_masks_is_refused():
    codec = CalibratedCodec(make_profile(1, 2, 32), 0.02)
    blocks = blocks_of(codec.profile, 1)
    (sealed,) = seal_all(codec, replace(blocks, kept=some(blocks, 0.5)))
    frame = Frame.open(sealed.frames[BASE])
    (layer,) = frame.segments()
    whole = bytes(frame.segments()[layer])
    for size in (0, 63, 64, 80, len(whole) - 1, len(whole) + 1):

        class Damaged:
            header = frame.header

            def segments(self) -> dict[int, memoryview]:
                return {layer: memoryview((whole + b"\0")[:size])}  # noqa: B023

        with pytest.raises(CorruptFrameError):
            codec.decode([{BASE: Damaged()}], shape_of(blocks))
        if size < 64:
            with pytest.raises(CorruptFrameError):
                codec.kept([{BASE: Damaged()}], shape_of(blocks))
