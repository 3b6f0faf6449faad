"""Which subsets of strata can be read, and what every codec does."""

from itertools import chain, combinations
from typing import Any

import pytest
import torch

from kvstrata.methods import BlockCodec, ExactCodec, FallbackCodec, KVBlocks
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.codec import Segments, readable
from kvstrata.methods.framing import precision_name
from kvstrata.protos import BLOCK_TOKENS, Frame, encode_frame
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame_pb2 import Stratum
from tests.methods.blocks import open_all, round_trip, seal_all, shape_of
from tests.methods.profiles import blocks_of, make_profile

BASE, MID, FINE, EXACT = (
    Stratum.STRATUM_BASE,
    Stratum.STRATUM_MID,
    Stratum.STRATUM_FINE,
    Stratum.STRATUM_EXACT,
)
LATER: Any = 9  # what a later release may add
TABLE: dict[tuple[Stratum, ...], tuple[Stratum, ...]] = {
    (): (),
    (BASE,): (BASE,),
    (MID,): (),
    (FINE,): (),
    (BASE, MID): (BASE, MID),
    (BASE, FINE): (BASE,),
    (MID, FINE): (),
    (BASE, MID, FINE): (BASE, MID, FINE),
}


def test_the_table_is_complete() -> None:
    lossy = (BASE, MID, FINE)
    subsets = chain.from_iterable(combinations(lossy, size) for size in range(4))
    assert set(subsets) == set(TABLE)


@pytest.mark.parametrize(("held", "best"), TABLE.items(), ids=str)
def test_the_best_subset_is_consecutive_from_base_on(
    held: tuple[Stratum, ...], best: tuple[Stratum, ...]
) -> None:
    assert readable(set(held)) == best
    assert readable({*held, EXACT}) == (EXACT,)


def test_a_stratum_of_a_later_release_is_ignored() -> None:
    assert readable({BASE, LATER}) == (BASE,)
    assert readable({LATER}) == ()


def test_precisions_are_named_by_their_strata() -> None:
    names = [precision_name(read) for read in ([EXACT], [MID, BASE], [BASE])]
    assert names == ["exact", "base+mid", "base"]


PROFILE = make_profile(2, 2, 32)
CODECS: dict[str, BlockCodec] = {
    "exact": ExactCodec(),
    "fallback": FallbackCodec(),
    "calibrated": CalibratedCodec(PROFILE, 0.05),
    "calibrated frame": CalibratedCodec(PROFILE, 0.05, "frame"),
}
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def _blocks(
    dtype: torch.dtype = torch.float32, count: int = 3, first_position: int = 0
) -> KVBlocks:
    return blocks_of(PROFILE, count, dtype, first_position=first_position)


def _part(blocks: KVBlocks, chosen: list[int]) -> KVBlocks:
    return KVBlocks(
        blocks.keys[:, :, chosen],
        blocks.values[:, :, chosen],
        blocks.saliency[:, :, chosen],
        blocks.first_position + BLOCK_TOKENS * chosen[0],
    )


def _plain(encoded: list[Segments]) -> list[Any]:
    return [
        {stratum: {i: bytes(part) for i, part in layers.items()} for stratum, layers in one.items()}
        for one in encoded
    ]


@each_codec
@each_dtype
def test_blocks_come_back_in_shape_and_near(codec: BlockCodec, dtype: torch.dtype) -> None:
    blocks = blocks_of(PROFILE, 3, dtype, form=getattr(codec, "form", "pre"))
    for read, put in zip(round_trip(codec, blocks), (blocks.keys, blocks.values), strict=True):
        assert (read.shape, read.dtype) == (put.shape, dtype)
        error = (read.double() - put.double()).square().mean() / put.double().var()
        assert error < (1e-12 if codec.lossless else 0.1)


@each_codec
def test_segments_are_every_stratum_of_every_layer(codec: BlockCodec) -> None:
    encoded = codec.encode(_blocks())
    assert len(encoded) == 3
    for block in encoded:
        assert tuple(block) == codec.strata
        assert all(list(layers) == [0, 1] for layers in block.values())
    for frames in open_all(seal_all(codec, _blocks())):
        for frame in frames.values():
            first = codec.first_layer
            assert [s.layer for s in frame.header.segments] == [first, first + 1]
            assert (frame.header.codec, frame.header.rope) == (codec.name, codec.rope)


@each_codec
def test_encoding_is_deterministic_and_leaves_its_input_alone(codec: BlockCodec) -> None:
    blocks = _blocks(torch.bfloat16)
    kept = [part.clone() for part in (blocks.keys, blocks.values, blocks.saliency)]
    assert _plain(codec.encode(blocks)) == _plain(codec.encode(blocks))
    for part, before in zip((blocks.keys, blocks.values, blocks.saliency), kept, strict=True):
        assert torch.equal(part, before)


@each_codec
def test_blocks_read_alike_in_any_company(codec: BlockCodec) -> None:
    blocks = _blocks()
    frames, shape = open_all(seal_all(codec, blocks)), shape_of(blocks)
    together = codec.decode(frames, shape)
    for order in ([0], [1], [2], [2, 0], [1, 1, 2, 0]):
        mixed = codec.decode([frames[n] for n in order], shape)
        for a, b in zip(mixed, together, strict=True):
            torch.testing.assert_close(a, b[:, :, order], rtol=1e-5, atol=1e-5)


@each_codec
def test_blocks_written_alone_read_as_well_as_those_written_together(codec: BlockCodec) -> None:
    blocks = _blocks()
    blocks.saliency.zero_()
    together = round_trip(codec, blocks)
    for chosen in ([0], [1, 2]):
        for a, b in zip(round_trip(codec, _part(blocks, chosen)), together, strict=True):
            torch.testing.assert_close(a, b[:, :, chosen], rtol=1e-4, atol=1e-4)


@each_codec
def test_strided_blocks_are_taken(codec: BlockCodec) -> None:
    blocks = _blocks()
    turned = [
        part.permute(2, 3, 1, 0, 4).contiguous().permute(3, 2, 0, 1, 4)
        for part in (blocks.keys, blocks.values)
    ]
    assert not turned[0].is_contiguous()
    strided = KVBlocks(turned[0], turned[1], blocks.saliency, 0)
    assert _plain(codec.encode(strided)) == _plain(codec.encode(blocks))


@each_codec
def test_no_blocks_are_no_segments(codec: BlockCodec) -> None:
    assert codec.encode(_blocks(count=0)) == []


@each_codec
@pytest.mark.parametrize("cut", [1, 8, 200])
def test_a_segment_cut_short_or_too_long_is_corrupt(codec: BlockCodec, cut: int) -> None:
    blocks = _blocks()
    shape = shape_of(blocks)
    frames = open_all(seal_all(codec, blocks))
    for stratum in codec.strata:
        for changed in (lambda s: s[:-cut], lambda s: s + bytes(cut), lambda _: b""):
            frame = frames[1][stratum]
            segments = {i: bytes(part) for i, part in frame.segments().items()}
            assert segments[codec.first_layer]
            segments[codec.first_layer] = changed(segments[codec.first_layer])
            broken = Frame.open(encode_frame(frame.header, segments))
            with pytest.raises(CorruptFrameError):
                codec.decode([frames[0], {**frames[1], stratum: broken}], shape)
