"""Masks and saliency read without the codec are those that the codecs wrote."""

import pytest
import torch

from kvstrata.kernels.token_masks import to_mask
from kvstrata.methods import BlockCodec, ExactCodec, FallbackCodec, KVBlocks
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.predicted import PredictedCodec
from kvstrata.methods.saliency_tag import encode_tags
from kvstrata.protos.block_tokens import LayerTokens, read_layer_tokens
from kvstrata.protos.errors import CorruptFrameError, NotFoundError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import FrameHeader
from tests.methods.blocks import BASE, EXACT, open_all, random_blocks, seal_all
from tests.methods.predictions import predicting_profile
from tests.methods.profiles import blocks_of, make_profile


def tokens_of(codec: BlockCodec, blocks: KVBlocks) -> list[list[LayerTokens]]:
    """Return what is read of each block and layer."""
    frames = [strata[BASE] for strata in open_all(seal_all(codec, blocks))]
    return [[read_layer_tokens(f.header, s) for s in f.segments().values()] for f in frames]


CODECS = {
    "fallback": lambda profile: FallbackCodec(),
    "calibrated": lambda profile: CalibratedCodec(profile, 0.05),
    "predicted": lambda profile: PredictedCodec(profile, 0.05),
}


@pytest.mark.parametrize("codec_name", CODECS)
def test_saliency_is_what_was_written(codec_name: str):
    profile = predicting_profile(3, 2, 32)
    blocks = blocks_of(profile, count=3)
    codec = CODECS[codec_name](profile)
    found = tokens_of(codec, blocks)
    for n, layers in enumerate(found):
        for layer, tokens in enumerate(layers):
            told = torch.tensor(list(tokens.saliency), dtype=torch.uint8)
            mean = encode_tags(blocks.saliency.mean(1))[layer, n]
            assert (told == mean).all()


def test_masks_of_the_calibrated_codec_tell_every_class():
    profile = make_profile(layers=3, heads=2, dim=32)
    codec = CalibratedCodec(profile, 0.05)
    blocks = blocks_of(profile, count=2)
    found = tokens_of(codec, blocks)
    sinks = found[0][0]
    assert all(mask & 0b1111 == 0b1111 for mask in sinks.escape)
    assert any(mask for layers in found for tokens in layers for mask in tokens.mid)
    for layers in found:
        for tokens in layers:
            rows = zip(tokens.escape, tokens.mid, tokens.dropped, strict=True)
            assert len(tokens.escape) == 4
            assert all(not (e & m or e & d or m & d) for e, m, d in rows)


def test_a_fallback_block_has_its_sinks_as_escapes_and_the_rest_as_mid():
    first, second = tokens_of(FallbackCodec(sink_tokens=3), random_blocks(2, 3, 32, 2))
    everything = int(to_mask(torch.ones(64, dtype=torch.bool))) % (1 << 64)
    for tokens in first:
        assert set(tokens.escape) == {0b111}
        assert set(tokens.mid) == {everything & ~0b111}
    for tokens in second:
        assert (set(tokens.escape), set(tokens.dropped)) == ({0}, {0})


def test_a_codec_without_masks_is_told_and_a_short_segment_refused():
    (strata,) = open_all(seal_all(ExactCodec(), random_blocks(1, 1, 32, 1)))
    frame: Frame = strata[EXACT]
    with pytest.raises(NotFoundError, match="exact/1"):
        read_layer_tokens(frame.header, frame.segment(0))
    for codec, version in (("fallback", 2), ("calibrated", 1)):
        header = FrameHeader(codec=codec, codec_version=version, num_kv_heads=2, head_dim=32)
        for size in (0, 31, 70, 95):
            with pytest.raises(CorruptFrameError):
                read_layer_tokens(header, bytes(size))
        header.num_kv_heads = 1 << 30
        with pytest.raises(CorruptFrameError):
            read_layer_tokens(header, bytes(1000))
