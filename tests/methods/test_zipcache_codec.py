"""ZipCache's codec as published: every number within its own step, exact where nothing is lost."""

from dataclasses import replace

import pytest
import torch

from kvstrata.kernels.paper_quantizers import (
    dequantize_channelwise,
    dequantize_separable,
    quantize_channelwise,
    quantize_separable,
)
from kvstrata.methods.codec import KVBlocks
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from tests.methods.blocks import BASE, bits, open_all, random_blocks, round_trip, seal_all, shape_of

DEFAULT = ZipCacheCodec(ZipCache())
CODECS = {
    "default": DEFAULT,
    "shared": ZipCacheCodec(ZipCache(share_heads=True)),
    "pre": ZipCacheCodec(ZipCache(), pre_rope=True),
    "8-1": ZipCacheCodec(ZipCache(high_bits=8, low_bits=1)),
    "16-2": ZipCacheCodec(ZipCache(salient=0.2, high_bits=16)),
    "all": ZipCacheCodec(ZipCache(salient=1.0)),
    "none": ZipCacheCodec(ZipCache(salient=0.0)),
}
SHAPES = {"one": (1, 1, 16, 1), "odd": (3, 2, 24, 3), "wide": (2, 1, 64, 2)}
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def salient_of(codec: ZipCacheCodec, blocks: KVBlocks) -> torch.Tensor:
    """Return the classes by their definition: the least salient of all tokens of a head."""
    scores = blocks.saliency.flatten(2)
    if codec.stage.share_heads:
        scores = scores.mean(1, keepdim=True).expand_as(scores)
    count = scores.shape[-1] - int((1 - codec.stage.salient) * scores.shape[-1] + 1e-9)
    order = scores.argsort(-1, descending=True)[..., :count]
    return (
        torch.zeros(scores.shape, dtype=torch.bool)
        .scatter(-1, order, True)
        .view(blocks.saliency.shape)
    )


@each_codec
@each_shape
def test_z6_no_number_is_off_by_more_than_half_a_step_of_its_class(codec, shape):
    blocks = random_blocks(*shape)
    keys, values = round_trip(codec, blocks)
    salient = salient_of(codec, blocks)
    for members, width in ((salient, codec.stage.high_bits), (~salient, codec.stage.low_bits)):
        if width == 16:
            assert torch.equal(keys[members], blocks.keys[members])
            assert torch.equal(values[members], blocks.values[members])
            continue
        hidden = ~members[..., None]
        low = blocks.keys.masked_fill(hidden, torch.inf).amin(-2, keepdim=True)
        high = blocks.keys.masked_fill(hidden, -torch.inf).amax(-2, keepdim=True)
        step = (high - low) / (2**width - 1)
        slack = 2e-3 * (high - low) + 1e-3 * low.abs() + 1e-5  # parameters are fp16
        error = (keys - blocks.keys).abs() - (step / 2 + slack)
        assert (error.masked_fill(hidden, -1.0) <= 0).all()
        scale = blocks.values.abs().amax(-2, keepdim=True).sqrt()
        scaled = blocks.values / scale
        dims = (1, 4) if codec.stage.share_heads else (4,)
        span = scaled.amax(dims, keepdim=True) - scaled.amin(dims, keepdim=True)
        bound = scale * (span / (2**width - 1) / 2 + 3e-3 * span)
        error = (values - blocks.values).abs() - bound
        assert (error.masked_fill(hidden, -1.0) <= 0).all()


def test_z9_sixteen_bits_restore_every_bit():
    codec = ZipCacheCodec(ZipCache.neutral())
    assert codec.lossless
    assert not DEFAULT.lossless
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        blocks = random_blocks(2, 2, 32, 2, dtype)
        keys, values = round_trip(codec, blocks)
        assert torch.equal(bits(keys), bits(blocks.keys))
        assert torch.equal(bits(values), bits(blocks.values))


def test_one_class_alone_reads_as_the_published_quantisers_do():
    blocks = random_blocks(1, 1, 64, 1)
    keys, values = round_trip(ZipCacheCodec(ZipCache(salient=1.0)), blocks)
    expected = dequantize_channelwise(quantize_channelwise(blocks.keys[0, 0, 0], 4))
    step = quantize_channelwise(blocks.keys[0, 0, 0], 4).step
    assert ((keys[0, 0, 0] - expected).abs() <= step * 1.05).all()  # ties, and fp16 parameters
    assert ((keys[0, 0, 0] - expected).abs() > step * 0.1).float().mean() < 0.02
    expected = dequantize_separable(*quantize_separable(blocks.values[0, 0, 0], 4))
    assert (values[0, 0, 0] - expected).abs().mean() < 0.01


def test_z7_what_was_read_is_stored_again_unchanged():
    blocks = random_blocks(2, 2, 32, 3)
    once = round_trip(DEFAULT, blocks)
    twice = round_trip(DEFAULT, replace(blocks, keys=once[0], values=once[1]))
    # The extremes of a channel stay what they are, so its range and codes come back.
    torch.testing.assert_close(twice[0], once[0], atol=5e-3, rtol=5e-3)


@each_codec
def test_sizes_are_what_the_layout_says(codec):
    layers, heads, dim, num_blocks = 2, 3, 64, 4
    blocks = random_blocks(layers, heads, dim, num_blocks)
    segments = codec.encode(blocks)
    stage = codec.stage
    total = sum(len(s) for block in segments for s in block[BASE].values())
    num_salient = int(salient_of(codec, blocks).sum())
    num_other = layers * heads * num_blocks * 64 - num_salient
    width = {16: 32}  # the test's numbers are float32
    codes = (
        2
        * dim
        * (
            num_salient * width.get(stage.high_bits, stage.high_bits)
            + num_other * width.get(stage.low_bits, stage.low_bits)
        )
    )
    classes = sum(b != 16 for b in (stage.high_bits, stage.low_bits))
    tokens = 64 * (1 if stage.share_heads else heads)
    parameters = 16 * (2 * classes * heads * dim + heads * dim + 2 * tokens)
    marks = 2 * 64 * heads + 8 * 64
    assert 8 * total == codes + layers * num_blocks * (parameters + marks)


def test_equal_blocks_give_equal_bytes_and_others_in_the_call_only_share_the_ranking():
    blocks = random_blocks(2, 2, 32, 3)
    assert [s.frames for s in seal_all(DEFAULT, blocks)] == [
        s.frames for s in seal_all(DEFAULT, random_blocks(2, 2, 32, 3))
    ]


def test_values_that_fp16_cannot_bound_are_refused():
    blocks = random_blocks(1, 1, 16, 1)
    for wrong in (torch.inf, torch.nan, 1e9):
        keys = blocks.keys.clone()
        keys[0, 0, 0, 3, 3] = wrong
        with pytest.raises(ValueError, match="fp16"):
            DEFAULT.encode(replace(blocks, keys=keys))
    constant = replace(
        blocks, keys=torch.zeros_like(blocks.keys), values=torch.ones_like(blocks.values)
    )
    keys, values = round_trip(DEFAULT, constant)
    assert torch.equal(keys, constant.keys)
    torch.testing.assert_close(values, constant.values)


@each_codec
def test_a_segment_of_another_size_is_refused(codec):
    blocks = random_blocks(2, 2, 16, 1)
    (sealed,) = seal_all(codec, blocks)
    frame = Frame.open(sealed.frames[BASE])
    held = frame.segments()
    for size in (0, 10, len(held[1]) - 1, len(held[1]) + 1):
        cut = {**held, 1: memoryview((bytes(held[1]) + b"\0")[:size])}

        class Damaged:
            header = frame.header

            def segments(self) -> dict[int, memoryview]:
                return cut  # noqa: B023

        with pytest.raises(CorruptFrameError):
            codec.decode([{BASE: Damaged()}], shape_of(blocks))


@each_codec
def test_marks_that_do_not_fit_the_rows_are_refused(codec):
    if codec.stage.high_bits == codec.stage.low_bits:
        return
    blocks = random_blocks(1, 1, 16, 1)
    (sealed,) = seal_all(codec, blocks)
    data = bytearray(codec.encode(blocks)[0][BASE][0])
    data[8] ^= 1  # one token in the other class

    class Damaged:
        header = Frame.open(sealed.frames[BASE]).header

        def segments(self) -> dict[int, memoryview]:
            return {0: memoryview(bytes(data))}

    with pytest.raises(CorruptFrameError):
        codec.decode([{BASE: Damaged()}], shape_of(blocks))


def test_open_all_reads_what_was_sealed():
    blocks = random_blocks(1, 2, 16, 2)
    frames = open_all(seal_all(DEFAULT, blocks))
    keys, _ = DEFAULT.decode(frames, shape_of(blocks))
    assert keys.shape == blocks.keys.shape


@each_codec
def test_r4_tokens_that_are_left_out_cost_nothing_and_touch_nothing(codec):
    blocks = random_blocks(2, 2, 16, 3)
    kept = torch.rand(blocks.saliency.shape) < 0.4
    kept[1, 0, 2] = False  # a head without any token of a block
    wild = blocks.keys.masked_fill(~kept[..., None], 7e4)
    given = replace(blocks, keys=wild, values=blocks.values.masked_fill(~kept[..., None], -9.0))
    sealed = seal_all(codec, replace(given, kept=kept))
    keys, values = codec.decode(open_all(sealed), shape_of(blocks))
    assert torch.equal(codec.kept(open_all(sealed), shape_of(blocks)), kept)
    assert (keys[~kept] == 0).all()
    assert (values[~kept] == 0).all()
    whole = seal_all(codec, blocks)
    assert codec.kept(open_all(whole), shape_of(blocks)) is None
    if codec.stage.share_heads:
        return
    # Another value of a token that is not stored changes no byte.
    again = seal_all(codec, replace(blocks, kept=kept))
    assert [b.frames for b in again] == [b.frames for b in sealed]
    assert sum(b.num_bytes for b in sealed) < sum(b.num_bytes for b in whole)


def test_r3_the_salient_share_is_one_of_survivors():
    blocks = random_blocks(1, 2, 16, 4)
    kept = torch.zeros(blocks.saliency.shape, dtype=torch.bool)
    kept[0, 0, :, ::2] = True
    kept[0, 1, 0, :10] = True
    frames = open_all(seal_all(DEFAULT, replace(blocks, kept=kept)))
    masks = [f[BASE].segments()[0][:32] for f in frames]
    salient = torch.stack([torch.frombuffer(bytearray(m), dtype=torch.int64)[2:] for m in masks])
    counts = [sum((x % 2**64).bit_count() for x in head.tolist()) for head in salient.T]
    assert counts == [128 - int(0.4 * 128 + 1e-9), 6]


def test_classes_that_a_stage_chose_are_taken_as_they_are():
    blocks = random_blocks(1, 1, 16, 1)
    salient = torch.zeros(blocks.saliency.shape, dtype=torch.bool)
    salient[..., :5] = True
    codec = ZipCacheCodec(ZipCache(high_bits=16))
    keys, _ = round_trip(codec, replace(blocks, salient=salient))
    exact = (keys == blocks.keys).all(-1)
    assert torch.equal(exact & salient, salient)
    assert not exact[..., 5:].all(-1).any()
