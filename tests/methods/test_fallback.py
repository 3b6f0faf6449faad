"""The fallback codec: errors as theory says, sinks apart, and a layout read back by hand."""

import math
import struct

import pytest
import torch

from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.quantize import LEVELS, LEVELS_PER_SIGMA, THRESHOLDS
from kvstrata.methods import BlockShape, FallbackCodec, KVBlocks
from kvstrata.methods.saliency_tag import decode_tags
from kvstrata.protos import BLOCK_TOKENS, Frame, encode_frame
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame_pb2 import FrameHeader, Stratum
from tests.methods.blocks import (
    BASE,
    MID,
    bits,
    open_all,
    random_blocks,
    round_trip,
    seal_all,
    shape_of,
)

BASE_ERROR = 0.1175  # of a 2-bit Lloyd-Max quantiser of a unit Gaussian

SHAPES = [
    # stored layers, heads, head_dim, blocks, dtype
    (1, 1, 32, 1, torch.float32),
    (2, 2, 64, 3, torch.bfloat16),
    (3, 3, 64, 1, torch.float16),
    (1, 3, 80, 3, torch.float32),
    (2, 1, 128, 1, torch.bfloat16),
    (1, 2, 80, 1, torch.float16),
]
OUTPUT_ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}

each_shape = pytest.mark.parametrize(("layers", "heads", "dim", "count", "dtype"), SHAPES, ids=str)


def _nested_error() -> float:
    """Return the mean squared error of the 4-bit tables on a unit Gaussian, by integration.

    Scales are rounded evenly by up to 1/32 of an octave, which stretches cells and levels alike.
    """

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    error, width = 0.0, 1e-2
    stretches = [2 ** (i / 8 / 32) for i in range(-8, 9)]
    for stretch in stretches:
        levels = [stretch * level / LEVELS_PER_SIGMA for level in LEVELS]
        borders = [0.0, *(stretch * border / LEVELS_PER_SIGMA for border in THRESHOLDS), 8.0]
        for low, level, high in zip(borders, levels, borders[1:], strict=False):
            steps = max(1, round((high - low) / width))
            inside = [low + (high - low) * (i + 0.5) / steps for i in range(steps)]
            error += 2 * sum((x - level) ** 2 * density(x) for x in inside) * (high - low) / steps
    return error / len(stretches)


def _relative_error(read: torch.Tensor, put: torch.Tensor) -> float:
    return float((read.double() - put.double()).square().mean() / put.double().square().mean())


def _segments(codec: FallbackCodec, blocks: KVBlocks) -> list[dict[int, dict[int, bytes]]]:
    """Return every block's segments as plain bytes."""
    return [
        {stratum: {i: bytes(part) for i, part in layers.items()} for stratum, layers in one.items()}
        for one in codec.encode(blocks)
    ]


@each_shape
def test_keys_err_by_half_a_step_and_the_rounding_of_parameters(
    layers: int, heads: int, dim: int, count: int, dtype: torch.dtype
) -> None:
    blocks = random_blocks(layers, heads, dim, count, dtype)
    keys, values = round_trip(FallbackCodec(0), blocks)
    assert keys.shape == values.shape == blocks.keys.shape
    assert keys.dtype == values.dtype == dtype
    put = blocks.keys.float()
    low, high = put.amin(-2, keepdim=True), put.amax(-2, keepdim=True)
    # fp16 holds the minimum and the step to 2^-11 of themselves.
    rounding = (low.abs() + (high - low)) * 2.0**-11
    step = ((high - low) / 31 + low.abs() * 2.0**-11 / 31) * (1 + 2.0**-11)
    bound = step / 2 + rounding + (put.abs() + step) * OUTPUT_ROUNDING[dtype]
    assert ((keys.float() - put).abs() <= bound).all()
    coarse, _ = round_trip(FallbackCodec(0), blocks, [BASE])
    # The centre of eight fine values is three steps and a half from the outermost of them.
    bound = 4 * step + rounding + (put.abs() + 4 * step) * OUTPUT_ROUNDING[dtype]
    assert ((coarse.float() - put).abs() <= bound).all()


@each_shape
def test_values_err_as_the_theory_of_nested_lloyd_max_says(
    layers: int, heads: int, dim: int, count: int, dtype: torch.dtype
) -> None:
    blocks = random_blocks(layers, heads, dim, count, dtype)
    _, values = round_trip(FallbackCodec(0), blocks)
    assert _relative_error(values, blocks.values) == pytest.approx(_nested_error(), rel=0.15)
    _, coarse = round_trip(FallbackCodec(0), blocks, [BASE])
    assert _relative_error(coarse, blocks.values) == pytest.approx(BASE_ERROR, rel=0.15)


@each_shape
def test_base_alone_is_coarser_but_unbiased_and_mid_refines_it(
    layers: int, heads: int, dim: int, count: int, dtype: torch.dtype
) -> None:
    blocks = random_blocks(layers, heads, dim, count, dtype)
    fine, coarse = (
        round_trip(FallbackCodec(0), blocks),
        round_trip(FallbackCodec(0), blocks, [BASE]),
    )
    for put, better, worse in zip((blocks.keys, blocks.values), fine, coarse, strict=True):
        assert _relative_error(better, put) < _relative_error(worse, put) / 5
        for read in (better, worse):
            errors = read.double() - put.double()
            assert errors.mean().abs() <= 5 * errors.std() / errors.numel() ** 0.5 + 1e-3
    # Reading a centroid neither shrinks nor stretches: <x, read> = <read, read>.
    for read in (fine[1].double(), coarse[1].double()):
        slope = (blocks.values.double() * read).sum() / read.square().sum()
        assert slope.item() == pytest.approx(1, abs=0.02)


def test_outlying_channels_of_keys_cost_the_others_nothing() -> None:
    blocks = random_blocks(1, 1, 64, 1)
    blocks.keys[..., 5] *= 1000
    keys, _ = round_trip(FallbackCodec(0), blocks)
    others = [c for c in range(64) if c != 5]
    quiet, _ = round_trip(FallbackCodec(0), random_blocks(1, 1, 64, 1))
    assert torch.equal(keys[..., others], quiet[..., others])


@pytest.mark.parametrize("sinks", [0, 4, 64])
@pytest.mark.parametrize("dim", [32, 80, 128])
def test_sinks_err_by_half_an_int8_step_in_the_hadamard_domain(sinks: int, dim: int) -> None:
    blocks = random_blocks(2, 2, dim, 2)
    blocks.keys[:, :, 0, :4] *= 50
    blocks.values[:, :, 0, :4] *= 50
    read = round_trip(FallbackCodec(sinks), blocks)
    coarse = round_trip(FallbackCodec(sinks), blocks, [BASE])
    for got, base, put in zip(read, coarse, (blocks.keys, blocks.values), strict=True):
        assert torch.equal(got[:, :, 0, :sinks], base[:, :, 0, :sinks])
        turned = (put @ hadamard(dim))[:, :, 0, :sinks]
        error = ((got - put) @ hadamard(dim))[:, :, 0, :sinks]
        largest = turned.abs().amax(-1, keepdim=True)
        # Half a step of largest / 127, a bf16 scale rounded by 2^-9, and float32 arithmetic.
        bound = largest * (0.5 / 127 * (1 + 2.0**-8) + 2.0**-8 + 2.0**-18)
        assert (error.abs() <= bound).all()


def test_sinks_do_not_widen_the_range_of_the_other_keys() -> None:
    blocks = random_blocks(1, 2, 64, 1)
    loud = KVBlocks(blocks.keys.clone(), blocks.values, blocks.saliency, 0)
    loud.keys[..., :4, :] *= 1000
    quiet_keys, _ = round_trip(FallbackCodec(4), blocks)
    loud_keys, _ = round_trip(FallbackCodec(4), loud)
    assert torch.equal(loud_keys[..., 4:, :], quiet_keys[..., 4:, :])


def _fixed_bytes(heads: int, dim: int) -> int:
    parameters = 4 * heads * dim + 2 * heads + 64 * heads
    return 16 * heads + 64 + parameters + 2 * heads * 64 * dim // 4


def _mid_bytes(heads: int, dim: int) -> int:
    return heads * 64 * dim * (3 + 2) // 8


@pytest.mark.parametrize("sinks", [0, 4, 64])
@pytest.mark.parametrize("first_position", [0, 64, 640])
def test_only_the_first_block_of_a_sequence_has_escapes(sinks: int, first_position: int) -> None:
    heads, dim = 3, 32
    blocks = random_blocks(2, heads, dim, 2, first_position=first_position)
    for n, one in enumerate(_segments(FallbackCodec(sinks), blocks)):
        escapes = 2 * heads * sinks if n == 0 and first_position == 0 else 0
        assert {len(s) for s in one[BASE].values()} == {
            _fixed_bytes(heads, dim) + escapes * (2 + dim)
        }
        assert {len(s) for s in one[MID].values()} == {_mid_bytes(heads, dim)}


@pytest.mark.parametrize("sinks", [0, 4, 64])
def test_the_masks_tell_the_sinks_of_every_head(sinks: int) -> None:
    heads = 3
    blocks = random_blocks(2, heads, 32, 2)
    for n, one in enumerate(_segments(FallbackCodec(sinks), blocks)):
        for segment in one[BASE].values():
            masks = struct.unpack_from(f"<{2 * heads}Q", segment)
            assert set(masks) == {(1 << sinks) - 1 if n == 0 else 0}


def test_a_base_segment_can_be_read_by_its_description() -> None:
    heads, dim = 2, 16
    blocks = random_blocks(1, heads, dim, 1, seed=3)
    segments = _segments(FallbackCodec(4), blocks)[0]
    base, mid = segments[BASE][0], segments[MID][0]
    cursor = 16 * heads + 64
    minimum = struct.unpack_from(f"<{heads * dim}e", base, cursor)
    cursor += 2 * heads * dim
    step = struct.unpack_from(f"<{heads * dim}e", base, cursor)
    cursor += 2 * heads * dim
    peak = struct.unpack_from(f"<{heads}e", base, cursor)
    cursor += 2 * heads
    scale_codes = struct.unpack_from(f"<{heads * 64}B", base, cursor)
    cursor += heads * 64

    def code(planes: bytes, at: int, head: int, element: int, bits: int = 2) -> int:
        row = 64 * dim * bits // 8
        slot, byte = divmod(element, row)
        return planes[at + head * row + byte] >> (bits * slot) & (2**bits - 1)

    half = heads * 64 * dim // 4
    assert len(mid) == half + half // 2 + half
    keys, values = round_trip(FallbackCodec(4), blocks)
    turned = values @ hadamard(dim)
    for head, token, channel in [(0, 4, 0), (0, 63, 15), (1, 17, 7), (1, 40, 8)]:
        element = token * dim + channel
        high, low = code(base, cursor, head, element), code(mid, 0, head, element)
        last = code(mid, half, head, element, bits=1)
        at = head * dim + channel
        expected = minimum[at] + step[at] * (8 * high + 2 * low + last)
        assert keys[0, head, 0, token, channel].item() == pytest.approx(expected, rel=1e-5)
        element = (token // 16 * dim + channel) * 16 + token % 16
        high = code(base, cursor + half, head, element)
        low = code(mid, half + half // 2, head, element)
        scale = peak[head] * 2 ** (-scale_codes[head * 64 + token] / 16)
        size = LEVELS[4 * (high & 1) + low] / LEVELS_PER_SIGMA * scale
        expected = -size if high & 2 else size
        assert turned[0, head, 0, token, channel].item() == pytest.approx(expected, rel=1e-4)
    # The tail: bf16 scales of keys then values, then their codes; heads, then tokens ascending.
    cursor += 2 * half
    count = 2 * heads * 4
    raw = struct.unpack_from(f"<{count}H", base, cursor)
    scales = [struct.unpack("<f", struct.pack("<I", s << 16))[0] for s in raw]
    codes = struct.unpack_from(f"<{count * dim}b", base, cursor + 2 * count)
    assert len(base) == cursor + count * (2 + dim)
    both = torch.stack([keys, values])[:, 0, :, 0, :4].reshape(count, dim) @ hadamard(dim)
    expected_rows = torch.tensor(codes).view(count, dim) * torch.tensor(scales)[:, None]
    torch.testing.assert_close(both, expected_rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 2])
def test_axes_of_one_are_written_and_read_like_others(layers: int, heads: int, count: int) -> None:
    blocks = random_blocks(2, 3, 32, 2)
    whole = round_trip(FallbackCodec(), blocks)
    whole_base = round_trip(FallbackCodec(), blocks, [BASE])
    some = KVBlocks(
        blocks.keys[:layers, :heads, :count],
        blocks.values[:layers, :heads, :count],
        blocks.saliency[:layers, :heads, :count],
        0,
    )
    for strata, expected in ((None, whole), ([BASE], whole_base)):
        for read, wide in zip(round_trip(FallbackCodec(), some, strata), expected, strict=True):
            torch.testing.assert_close(read, wide[:layers, :heads, :count])


@pytest.mark.parametrize("dim", [8, 24, 40])
def test_a_head_dimension_needs_to_be_a_multiple_of_8_only(dim: int) -> None:
    blocks = random_blocks(1, 2, dim, 2)
    keys, _ = round_trip(FallbackCodec(0), blocks)
    assert _relative_error(keys, blocks.keys) < 0.005


@pytest.mark.parametrize("dim", [4, 12, 20])
def test_a_head_dimension_that_leaves_bytes_unfilled_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        FallbackCodec().encode(random_blocks(1, 2, dim, 2))


def test_a_loud_token_costs_the_values_of_others_nothing() -> None:
    blocks = random_blocks(1, 2, 64, 1)
    _, quiet = round_trip(FallbackCodec(0), blocks)
    loud = KVBlocks(blocks.keys, blocks.values.clone(), blocks.saliency, 0)
    loud.values[..., 9, :] *= 4096  # 12 octaves: far more than heads have, less than codes reach
    _, read = round_trip(FallbackCodec(0), loud)
    others = [t for t in range(BLOCK_TOKENS) if t != 9]
    error = _relative_error(read[..., others, :], blocks.values[..., others, :])
    assert error == pytest.approx(
        _relative_error(quiet[..., others, :], blocks.values[..., others, :]), rel=0.1
    )


def test_values_whose_peak_exceeds_fp16_are_refused() -> None:
    blocks = random_blocks(1, 2, 32, 2)
    blocks.values[0, 1, 1, 40] *= 2e5
    with pytest.raises(ValueError, match="values are not finite or exceed the range of fp16"):
        FallbackCodec().encode(blocks)


def test_saliency_is_stored_with_base() -> None:
    blocks = random_blocks(2, 3, 32, 2)
    blocks.saliency[0, :, 0, :4] = torch.tensor([0.0, float("nan"), 1.0, 1e-9])
    for n, one in enumerate(_segments(FallbackCodec(), blocks)):
        for layer, segment in one[BASE].items():
            tags = torch.tensor(list(segment[16 * 3 : 16 * 3 + 64]), dtype=torch.uint8)
            read, put = decode_tags(tags), blocks.saliency[layer, :, n].mean(0)
            known = put > 0
            assert ((read[known] / put[known]).log2().abs() <= 1 / 8).all()
            assert (read[~known] == 0).all()


@pytest.mark.parametrize(
    ("heads", "dim", "most"), [(3, 64, 4.94), (8, 128, 4.85)], ids=["3 x 64", "8 x 128"]
)
def test_a_block_costs_few_bits_per_element(heads: int, dim: int, most: float) -> None:
    blocks = random_blocks(8, heads, dim, 3, torch.bfloat16)
    elements = 2 * blocks.keys[:, :, 0].numel()
    first, *others = [8 * block.num_bytes / elements for block in seal_all(FallbackCodec(), blocks)]
    told = 8 * 8 * (_fixed_bytes(heads, dim) + _mid_bytes(heads, dim)) / elements
    assert all(told < rate <= most for rate in others)
    assert all(rate - told <= 0.06 for rate in others)  # headers and padding
    assert others[0] == pytest.approx(others[1], abs=0.02)  # token ids are varints
    # Four sinks of 64 tokens at a bf16 scale and int8 on top of their dense codes.
    assert first - others[0] == pytest.approx(4 / 64 * (8 + 16 / dim), rel=0.05)


def test_the_same_blocks_give_the_same_bytes_alone_and_together() -> None:
    drawn = random_blocks(2, 2, 64, 3, torch.bfloat16)
    # Small integers make every sum of the Hadamard transform exact, in whatever order it is taken.
    blocks = KVBlocks(drawn.keys.round(), (8 * drawn.values).round(), drawn.saliency, 0)
    together = _segments(FallbackCodec(), blocks)
    assert _segments(FallbackCodec(), blocks) == together
    for n in range(3):
        one = KVBlocks(
            blocks.keys[:, :, n : n + 1],
            blocks.values[:, :, n : n + 1],
            blocks.saliency[:, :, n : n + 1],
            64 * n,
        )
        assert _segments(FallbackCodec(), one) == [together[n]]


def test_blocks_decode_in_any_company() -> None:
    blocks = random_blocks(2, 2, 32, 3)
    frames = open_all(seal_all(FallbackCodec(), blocks))
    keys, values = FallbackCodec().decode(frames, shape_of(blocks))
    some_keys, some_values = FallbackCodec().decode([frames[2], frames[0]], shape_of(blocks))
    # Another batch may sum the inverse transform in another order.
    torch.testing.assert_close(some_keys, keys[:, :, [2, 0]])
    torch.testing.assert_close(some_values, values[:, :, [2, 0]])


def test_strided_input_gives_the_bytes_of_contiguous_input() -> None:
    wide = random_blocks(2, 2, 64, 2)
    strided = KVBlocks(wide.keys[..., ::2], wide.values[..., 32:], wide.saliency, 0)
    dense = KVBlocks(strided.keys.contiguous(), strided.values.contiguous(), wide.saliency, 0)
    before = bits(strided.keys).clone()
    assert _segments(FallbackCodec(), strided) == _segments(FallbackCodec(), dense)
    assert torch.equal(bits(strided.keys), before)


def test_zero_blocks_read_as_nearly_zero() -> None:
    zeros = torch.zeros(1, 1, 1, BLOCK_TOKENS, 32)
    blocks = KVBlocks(zeros, zeros, torch.zeros(1, 1, 1, BLOCK_TOKENS), 64)
    for read in round_trip(FallbackCodec(), blocks):
        assert read.abs().max() < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("token", [0, 63])
def test_values_that_cannot_be_represented_are_refused(bad: float, what: str, token: int) -> None:
    blocks = random_blocks(2, 2, 32, 1)
    getattr(blocks, what)[1, 1, 0, token, 3] = bad
    if (what, token, bad) == ("keys", 0, 3e38):
        keys, _ = round_trip(FallbackCodec(), blocks)  # a sink: int8 with a bf16 scale can hold it
        assert keys[1, 1, 0, 0, 3].item() == pytest.approx(3e38, rel=0.05)
        assert keys.isfinite().all()
    else:
        with pytest.raises(ValueError, match="not finite"):
            FallbackCodec().encode(blocks)


@pytest.mark.parametrize("sinks", [-1, 65, 2**31])
def test_a_sink_count_beyond_a_block_is_refused(sinks: int) -> None:
    with pytest.raises(ValueError, match="sink_tokens must be 0 to 64"):
        FallbackCodec(sinks)


def test_settings_name_the_sink_count() -> None:
    assert FallbackCodec().settings() == "sink_tokens=4"
    assert FallbackCodec(0).settings() == "sink_tokens=0"
    assert (FallbackCodec().first_layer, FallbackCodec().lossless) == (1, False)
    assert FallbackCodec().strata == (BASE, MID)


# --- hostile segments: the frame's checksums hold, the codec's bytes do not ---

HEADS, DIM = 2, 8
SHAPE = BlockShape(HEADS, DIM, torch.float32)
FIXED = _fixed_bytes(HEADS, DIM)
WHOLE = FIXED + 4 * HEADS * 2 * (2 + DIM)  # four sinks per head of keys and of values


def _decode(base: dict[int, bytes], mid: dict[int, bytes] | None = None) -> torch.Tensor:
    frames: dict[Stratum, Frame] = {}
    for stratum, layers in ((BASE, base), (MID, mid)):
        if layers is not None:
            header = FrameHeader(stratum=stratum, num_layers=len(layers))
            frames[stratum] = Frame.open(encode_frame(header, layers))
    return FallbackCodec().decode([frames], SHAPE)[0]


@pytest.fixture
def written() -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Return BASE and MID of a first block with four sinks, layers 1 and 2."""
    one = _segments(FallbackCodec(), random_blocks(2, HEADS, DIM, 1))[0]
    base, mid = ({i + 1: part for i, part in one[s].items()} for s in (BASE, MID))
    return base, mid


def test_the_written_segments_are_read(written: tuple[dict[int, bytes], dict[int, bytes]]) -> None:
    assert _decode(*written).shape == (2, HEADS, 1, BLOCK_TOKENS, DIM)


@pytest.mark.parametrize("size", [0, 47, FIXED - 1, FIXED, FIXED + 1, WHOLE - 1, WHOLE + 1])
def test_a_base_segment_of_another_size_is_corrupt(
    size: int, written: tuple[dict[int, bytes], dict[int, bytes]]
) -> None:
    base, mid = written
    wrong = (base[2] + bytes(8))[:size]
    assert len(base[2]) == WHOLE
    for others in ({1: base[1], 2: wrong}, {1: wrong, 2: wrong}):
        with pytest.raises(CorruptFrameError, match="layer"):
            _decode(others, mid)
        with pytest.raises(CorruptFrameError, match="layer"):
            _decode(others)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_mid_segment_of_another_size_is_corrupt(
    change: int, written: tuple[dict[int, bytes], dict[int, bytes]]
) -> None:
    base, mid = written
    wrong = mid[2][:-1] if change < 0 else mid[2] + b"\x00"
    with pytest.raises(CorruptFrameError, match="layer 2 has"):
        _decode(base, {1: mid[1], 2: wrong})


@pytest.mark.parametrize("layers", [[1], [2], [2, 3], [1, 2, 3], []])
def test_mid_of_other_layers_than_base_is_corrupt(
    layers: list[int], written: tuple[dict[int, bytes], dict[int, bytes]]
) -> None:
    base, mid = written
    with pytest.raises(CorruptFrameError, match="different layers"):
        _decode(base, dict.fromkeys(layers, mid[1]))


@pytest.mark.parametrize("order", [[2, 1], [1, 1, 2], [1, 2, 2], [2, 1, 2]])
def test_layers_out_of_order_or_twice_are_corrupt(
    order: list[int], written: tuple[dict[int, bytes], dict[int, bytes]]
) -> None:
    """Rows are taken by their places, so the places must be those of the layers."""
    base, mid = written
    segments = dict(enumerate(mid[layer] for layer in order))
    frame = Frame.open(encode_frame(FrameHeader(stratum=MID), segments))
    for entry, layer in zip(frame.header.segments, order, strict=True):
        entry.layer = layer
    frames = {BASE: Frame.open(encode_frame(FrameHeader(stratum=BASE), base)), MID: frame}
    with pytest.raises(CorruptFrameError, match="different layers"):
        FallbackCodec().decode([frames], SHAPE)


def test_blocks_of_different_layers_are_corrupt(
    written: tuple[dict[int, bytes], dict[int, bytes]],
) -> None:
    frames = [
        {BASE: Frame.open(encode_frame(FrameHeader(stratum=BASE), layers))}
        for layers in (written[0], {1: written[0][1]})
    ]
    for order in (frames, frames[::-1]):
        with pytest.raises(CorruptFrameError, match="different layers"):
            FallbackCodec().decode(order, SHAPE)


def test_layers_may_differ_in_their_escapes(
    written: tuple[dict[int, bytes], dict[int, bytes]],
) -> None:
    base, mid = written
    plain = _segments(FallbackCodec(0), random_blocks(2, HEADS, DIM, 1))[0]
    mixed = _decode({1: base[1], 2: plain[BASE][1]}, {1: mid[1], 2: plain[MID][1]})
    torch.testing.assert_close(mixed[0], _decode(*written)[0])
    torch.testing.assert_close(mixed[1], _decode(plain[BASE], plain[MID])[1])


def test_blocks_of_another_shape_are_corrupt(
    written: tuple[dict[int, bytes], dict[int, bytes]],
) -> None:
    frames = {
        stratum: Frame.open(encode_frame(FrameHeader(stratum=stratum), layers))
        for stratum, layers in zip((BASE, MID), written, strict=True)
    }
    for shape in (BlockShape(1, DIM, torch.float32), BlockShape(HEADS, 2 * DIM, torch.float32)):
        with pytest.raises(CorruptFrameError):
            FallbackCodec().decode([frames], shape)
