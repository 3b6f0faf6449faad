"""Calibrated blocks that were damaged: refused as corrupt, or read without leaving their bounds."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.protos import Frame, encode_frame
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame_pb2 import Stratum
from tests.methods.blocks import BASE, MID, open_all, seal_all, shape_of
from tests.methods.profiles import blocks_of, make_profile

PROFILE = make_profile(2, 2, 32)
CODEC = CalibratedCodec(PROFILE, 0.05)
BLOCKS = blocks_of(PROFILE, 2, outliers=0.05)
SHAPE = shape_of(BLOCKS)
FRAMES = open_all(seal_all(CODEC, BLOCKS))
HEADS = PROFILE.shape[1]
MASK_BYTES = 4 * HEADS * 8

Change = Callable[[bytes], bytes]
Opened = dict[Stratum, Frame]


def _changed(frame: Frame, layer: int, change: Change) -> Frame:
    """Return the frame with one segment changed and every checksum right."""
    segments = {i: bytes(part) for i, part in frame.segments().items()}
    segments[layer] = change(segments[layer])
    return Frame.open(encode_frame(frame.header, segments))


def _flip(bits: list[int]) -> Change:
    def change(segment: bytes) -> bytes:
        data = bytearray(segment)
        for bit in bits:
            data[bit // 8 % len(data)] ^= 1 << bit % 8
        return bytes(data)

    return change


def _decode(frames: list[Opened]) -> None:
    keys, values = CODEC.decode(frames, SHAPE)
    for part in (keys, values):
        assert part.shape == (*PROFILE.shape[:2], len(frames), 64, PROFILE.shape[2])


def _outcome(frames: list[Opened]) -> str:
    """Return why decoding failed; empty if it did not."""
    try:
        _decode(frames)
    except CorruptFrameError as error:
        return str(error)
    return ""


def _broken(n: int, stratum: Stratum, layer: int, change: Change) -> list[Opened]:
    frames = [dict(block) for block in FRAMES]
    frames[n][stratum] = _changed(frames[n][stratum], layer, change)
    return frames


blocks = st.integers(0, 1)
layers = st.integers(1, 2)
strata = st.sampled_from([BASE, MID])


@settings(deadline=None, max_examples=100)
@given(n=blocks, layer=layers, bit=st.integers(0, 8 * MASK_BYTES - 1))
def test_one_flipped_bit_of_a_mask_is_corrupt(n: int, layer: int, bit: int) -> None:
    """Whichever it is, an escape or a mid row is missing, or one too many."""
    with pytest.raises(CorruptFrameError, match=r"base|mid"):
        _decode(_broken(n, BASE, layer, _flip([bit])))


@settings(deadline=None, max_examples=80)
@given(
    n=blocks,
    layer=layers,
    flips=st.lists(st.integers(0, 8 * MASK_BYTES - 1), min_size=1, max_size=6),
    with_mid=st.booleans(),
)
def test_masks_never_lead_out_of_bounds(
    n: int, layer: int, flips: list[int], with_mid: bool
) -> None:
    frames = _broken(n, BASE, layer, _flip(flips))
    if not with_mid:
        frames = [{BASE: block[BASE]} for block in frames]
    message = _outcome(frames)
    assert not message or "expected" in message


@settings(deadline=None, max_examples=50)
@given(n=blocks, layer=layers, masks=st.binary(min_size=MASK_BYTES, max_size=MASK_BYTES))
def test_arbitrary_masks_never_lead_out_of_bounds(n: int, layer: int, masks: bytes) -> None:
    for with_mid in (True, False):
        frames = _broken(n, BASE, layer, lambda segment: masks + segment[MASK_BYTES:])
        if not with_mid:
            frames = [{BASE: block[BASE]} for block in frames]
        message = _outcome(frames)
        assert not message or "expected" in message


@settings(deadline=None, max_examples=100)
@given(n=blocks, layer=layers, stratum=strata, data=st.data())
def test_any_other_length_is_corrupt(
    n: int, layer: int, stratum: Stratum, data: st.DataObject
) -> None:
    size = len(FRAMES[n][stratum].segments()[layer])
    length = data.draw(st.integers(0, 2 * size).filter(lambda length: length != size))
    with pytest.raises(CorruptFrameError, match=f"layer {layer - 1}: {length} bytes"):
        _decode(_broken(n, stratum, layer, lambda s: (s + s)[:length]))


@settings(deadline=None, max_examples=50)
@given(n=blocks, layer=layers, stratum=strata, flips=st.lists(st.integers(0, 1 << 20), max_size=9))
def test_what_lies_behind_the_masks_may_be_anything(
    n: int, layer: int, stratum: Stratum, flips: list[int]
) -> None:
    lead = MASK_BYTES if stratum == BASE else 0

    def change(segment: bytes) -> bytes:
        return segment[:lead] + _flip(flips)(segment[lead:])

    _decode(_broken(n, stratum, layer, change))


@pytest.mark.parametrize("stratum", [BASE, MID])
def test_a_flipped_byte_under_its_old_checksum_is_corrupt(stratum: Stratum) -> None:
    sealed = seal_all(CODEC, BLOCKS)
    data = bytearray(sealed[1].frames[stratum])
    segment = FRAMES[1][stratum].header.segments[-1]
    data[segment.offset + segment.length // 2] ^= 1
    with pytest.raises(CorruptFrameError):
        _decode([FRAMES[0], {**FRAMES[1], stratum: Frame.open(bytes(data))}])


@pytest.mark.parametrize("held", [[1], [0, 1], [2, 3], [1, 2, 3], []])
@pytest.mark.parametrize("stratum", [BASE, MID])
def test_other_layers_than_the_profiles_are_corrupt(held: list[int], stratum: Stratum) -> None:
    frame = FRAMES[0][stratum]
    segment = bytes(frame.segments()[1])
    other = Frame.open(encode_frame(frame.header, dict.fromkeys(held, segment)))
    with pytest.raises(CorruptFrameError, match="other layers"):
        _decode([{**FRAMES[0], stratum: other}])


def test_blocks_of_another_profile_are_no_crash() -> None:
    """Scopes keep them apart; if one came anyway, its sizes would tell, or its numbers be wrong."""
    for seed in range(4):
        profile = make_profile(2, 2, 32, seed=seed + 20)
        frames = open_all(seal_all(CalibratedCodec(profile, 0.05), blocks_of(profile, 2)))
        message = _outcome(frames)
        assert not message or "bytes" in message


def test_dropped_tokens_are_read_as_the_mean() -> None:
    """Both bits of a token: this version writes no such, but reads them."""
    profile = PROFILE
    codec = CalibratedCodec(profile, 1e9)
    blocks = blocks_of(profile, 1, first_position=64)
    frames = open_all(seal_all(codec, blocks))
    frame = frames[0][BASE]
    # Masks lie kind by kind, in a kind side by side: bit 9 of head 0 of K in both kinds.
    both = _flip([9, 8 * (2 * HEADS * 8) + 9])
    dropped = {**frames[0], BASE: _changed(frame, 1, both)}
    keys, values = codec.decode([dropped], SHAPE)
    torch.testing.assert_close(keys[0, 0, 0, 9], profile.keys["pre"].mean[0, 0])
    plain = codec.decode(frames, SHAPE)
    torch.testing.assert_close(values, plain[1])
    rest = torch.arange(64) != 9
    torch.testing.assert_close(keys[0, 0, 0, rest], plain[0][0, 0, 0, rest])
