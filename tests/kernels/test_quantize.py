"""The quantisers: errors within bounds that follow from their scales, and tables recomputed."""

import math
from itertools import pairwise

import pytest
import torch

from kvstrata.kernels.quantize import (
    BASE_BITS,
    BASE_LEVELS,
    KEY_BITS,
    LEVELS,
    LEVELS_PER_SIGMA,
    SCALE_STEPS_PER_OCTAVE,
    THRESHOLDS,
    VALUE_BITS,
    decode_scales,
    dequantize_channels,
    dequantize_channels_base,
    dequantize_int8,
    gaussian_base_levels,
    gaussian_levels,
    quantize_channels,
    quantize_gaussian,
    quantize_int8,
    sum_squares,
)

HALF_ULP = 2.0**-11  # of fp16's normal numbers, relative
HALF_SUBNORMAL = 2.0**-25  # of fp16's subnormal numbers, absolute
ROUNDING = 2.0**-20  # of the few float32 operations in between, relative

HALF_SCALE_STEP = 2.0 ** (1 / 32)  # a factor: scale codes are sixteenths of an octave

SHAPES = [(1, 1, 4), (1, 64, 64), (3, 64, 80), (2, 2, 65, 96), (64, 128)]


def _keys(shape: tuple[int, ...], scale: float, offset: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator) * scale + offset


def _none_skipped(keys: torch.Tensor) -> torch.Tensor:
    return torch.zeros(keys.shape[:-1], dtype=torch.bool)


def test_codes_have_these_widths() -> None:
    assert (KEY_BITS, VALUE_BITS, BASE_BITS, SCALE_STEPS_PER_OCTAVE) == (5, 4, 2, 16)
    assert (len(LEVELS), len(BASE_LEVELS)) == (8, 2)


def _read(codes: torch.Tensor, scale: torch.Tensor, *, fine: bool = True) -> torch.Tensor:
    """Return the numbers that codes mean under their tokens' scales."""
    levels = gaussian_levels(codes) if fine else gaussian_base_levels(codes >> 2)
    return levels * (scale / LEVELS_PER_SIGMA)[..., None]


def _clipping(low: torch.Tensor, high: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Return how far fp16 parameters can leave values outside: minimum and 31 steps are rounded."""
    at_low = low.abs() * HALF_ULP + HALF_SUBNORMAL
    at_high = (high - minimum).abs() * HALF_ULP + 31 * HALF_SUBNORMAL
    return at_low + at_high


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1, 0), (1, 100), (30, -3000), (8000, 0), (1e-3, 0), (1e-3, 1), (1e-6, 0), (1e-9, 0), (0, 5)],
)
def test_channel_codes_err_by_half_a_step_and_the_rounding_of_parameters(
    shape: tuple[int, ...], scale: float, offset: float
) -> None:
    keys = _keys(shape, scale, offset)
    codes, minimum, step = quantize_channels(keys, _none_skipped(keys))
    assert codes.dtype == torch.uint8
    assert minimum.dtype == step.dtype == torch.float16
    assert minimum.shape == step.shape == (*shape[:-2], shape[-1])
    assert codes.max() <= 31
    assert (step > 0).all()
    low, high = keys.amin(-2), keys.amax(-2)
    wide, least = step.float(), minimum.float()
    slack = (low.abs() + high.abs() + 32 * wide) * ROUNDING
    bound = wide / 2 + _clipping(low, high, least) + slack
    error = (dequantize_channels(codes, minimum, step) - keys).abs()
    assert (error <= bound[..., None, :]).all()
    # The step is no wider than the range asks for.
    assert (31 * wide <= (high - least).clamp_min(0) * (1 + 2 * HALF_ULP) + 31 * 2.0**-24).all()
    base = dequantize_channels_base(codes >> 3, minimum, step)
    # The centre of eight fine values is three steps and a half from the outermost of them.
    assert ((base - keys).abs() <= (bound + 3.5 * wide + slack)[..., None, :]).all()


def test_the_high_bits_alone_mean_the_centre_of_their_eight_values() -> None:
    minimum, step = torch.tensor([-3.0, 100.0]).half(), torch.tensor([0.5, 2.0]).half()
    codes = torch.arange(32, dtype=torch.uint8)[:, None].expand(32, 2)
    fine = dequantize_channels(codes, minimum, step)
    assert fine[:, 0].tolist() == [-3 + 0.5 * code for code in range(32)]
    base = dequantize_channels_base(codes[::8] >> 3, minimum, step)
    assert torch.equal(base, fine.view(4, 8, 2).mean(1))


def test_skipped_tokens_do_not_widen_the_range() -> None:
    keys = _keys((2, 64, 32), 1, 0)
    skipped = _none_skipped(keys)
    skipped[:, [0, 7]] = True
    wild = keys.clone()
    wild[:, 0], wild[:, 7] = 1e30, float("nan")
    for loud in (wild, keys.masked_fill(skipped[..., None], float("-inf"))):
        codes, minimum, step = quantize_channels(loud, skipped)
        rest_codes, rest_minimum, rest_step = quantize_channels(
            keys[:, ~skipped[0]], skipped[:, ~skipped[0]]
        )
        assert torch.equal(minimum, rest_minimum)
        assert torch.equal(step, rest_step)
        assert torch.equal(codes[:, ~skipped[0]], rest_codes)
        assert codes.max() <= 31  # packable, although without meaning


def test_a_group_of_skipped_tokens_only_has_harmless_parameters() -> None:
    keys = torch.full((2, 64, 8), float("nan"))
    skipped = torch.ones(2, 64, dtype=torch.bool)
    skipped[1] = False
    keys[1] = 3.0
    codes, minimum, step = quantize_channels(keys, skipped)
    assert (minimum[0] == 0).all()
    assert (step[0] == 2.0**-24).all()
    assert codes.max() <= 31
    assert (dequantize_channels(codes, minimum, step)[1] == 3.0).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -2048.0, 65504.0, -65504.0, 2.0**-24])
def test_a_constant_channel_that_fp16_knows_is_exact(value: float) -> None:
    keys = torch.full((1, 64, 4), value)
    assert torch.equal(dequantize_channels(*quantize_channels(keys, _none_skipped(keys))), keys)


def test_a_constant_channel_between_two_fp16_numbers_errs_by_their_rounding() -> None:
    keys = torch.full((1, 64, 4), 1000.1)
    read = dequantize_channels(*quantize_channels(keys, _none_skipped(keys)))
    assert ((read - keys).abs() <= 1000.1 * HALF_ULP).all()


BAD = [float("nan"), float("inf"), float("-inf"), 65536.0 * 32, -65536.0, 1e38]


@pytest.mark.parametrize("high", [65536.0, 65536.0 * 16, 65504.0 * 31])
def test_a_single_high_key_is_held_as_far_as_31_steps_of_fp16_reach(high: float) -> None:
    keys = _keys((1, 64, 8), 1, 0).abs()
    keys[0, 33, 5] = high
    codes, minimum, step = quantize_channels(keys, _none_skipped(keys))
    error = (dequantize_channels(codes, minimum, step) - keys).abs()
    assert error[0, 33, 5] <= high * (2 * HALF_ULP + ROUNDING)
    assert (error[0, :, 5] <= step[0, 5].float() / 2 + high * 2 * HALF_ULP).all()


@pytest.mark.parametrize("bad", BAD)
def test_keys_beyond_fp16_are_refused(bad: float) -> None:
    keys = _keys((2, 64, 32), 1, 0)
    keys[1, 33, 5] = bad
    with pytest.raises(ValueError, match="keys are not finite or exceed"):
        quantize_channels(keys, _none_skipped(keys))
    keys[1, :, 5] = bad
    with pytest.raises(ValueError, match="keys are not finite or exceed"):
        quantize_channels(keys, _none_skipped(keys))


# --- Lloyd-Max, recomputed ---


def _mass(low: float, high: float) -> float:
    """Return P(low < x < high) of a unit Gaussian, precise in the tails."""
    if low > 0:
        return _mass(-high, -low)
    return (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2))) / 2


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _centroid(low: float, high: float) -> float:
    return (_density(low) - _density(high)) / _mass(low, high)


def _lloyd_max(low: float, high: float, cells: int) -> tuple[list[float], list[float]]:
    """Return inner thresholds and levels of the best quantiser of a Gaussian cut to (low, high)."""
    first, last = max(low, -3.0), min(high, 3.0)
    thresholds = [first + (last - first) * i / cells for i in range(1, cells)]
    for _ in range(2000):
        borders = [low, *thresholds, high]
        levels = [_centroid(a, b) for a, b in pairwise(borders)]
        moved = [(a + b) / 2 for a, b in pairwise(levels)]
        change = max(abs(a - b) for a, b in zip(moved, thresholds, strict=True))
        thresholds = moved
        if change < 1e-12:
            return thresholds, levels
    raise AssertionError("no fixed point")


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], list[float]]:
    return _lloyd_max(-math.inf, math.inf, 4)


@pytest.fixture(scope="module")
def nested(plain: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    thresholds: list[float] = []
    levels: list[float] = []
    borders = [-math.inf, *plain[0], math.inf]
    for low, high in pairwise(borders):
        inner, cell_levels = _lloyd_max(low, high, 4)
        thresholds += [*inner, high]
        levels += cell_levels
    return thresholds[:-1], levels


def _error(borders: list[float], levels: list[float], stretch: float = 1.0) -> float:
    """Return the mean squared error of a unit Gaussian whose cells and levels are stretched."""
    error = 1.0
    for (low, high), level in zip(pairwise(borders), levels, strict=True):
        a, b, read = stretch * low, stretch * high, stretch * level
        error += read**2 * _mass(a, b) - 2 * read * (_density(a) - _density(b))
    return error


def _mirrored(ends: tuple[float, ...], levels: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Return the borders and levels of both signs, in units of sigma, ascending."""
    borders = [end / LEVELS_PER_SIGMA for end in ends]
    read = [level / LEVELS_PER_SIGMA for level in levels]
    both = [-math.inf, *(-x for x in reversed(borders)), 0.0, *borders, math.inf]
    return both, [*(-x for x in reversed(read)), *read]


def test_the_tables_are_nested_lloyd_max_but_for_a_thousandth_of_the_error(
    plain: tuple[list[float], list[float]], nested: tuple[list[float], list[float]]
) -> None:
    for (ends, levels), (thresholds, best) in (
        ((THRESHOLDS, LEVELS), nested),
        ((THRESHOLDS[3:4], BASE_LEVELS), plain),
    ):
        least = _error([-math.inf, *thresholds, math.inf], best)
        assert least <= _error(*_mirrored(ends, levels)) <= least * 1.001


def test_borders_lie_half_way_between_levels_and_any_head_fits_int16() -> None:
    inner = [(a + b) / 2 for a, b in pairwise(LEVELS)]
    inner[3] = (BASE_LEVELS[0] + BASE_LEVELS[1]) / 2  # the border of the plain 2-bit code
    assert list(THRESHOLDS) == inner
    assert 256 * max(LEVELS) < 2**15


@pytest.mark.parametrize("shape", [(1, 4), (5, 80), (2, 3, 64), (2, 150, 128)], ids=str)
def test_the_high_bits_are_the_plain_2_bit_code_and_all_bits_the_nearest_cell(
    shape: tuple[int, ...],
) -> None:
    values = _keys(shape, 2.5, 0)
    codes, peak, scale_codes = quantize_gaussian(values)
    assert codes.dtype == scale_codes.dtype == torch.uint8
    assert peak.dtype == torch.float16
    assert peak.shape == shape[:-2]
    assert scale_codes.shape == shape[:-1]
    root_mean_square = values.double().square().mean(-1).sqrt()
    largest = root_mean_square.amax(-1)
    assert ((peak - largest).abs() <= largest * HALF_ULP * 1.01).all()
    scale = decode_scales(peak, scale_codes)
    assert scale.dtype == torch.float32
    _assert_nearest(scale, root_mean_square)
    unit = values * (LEVELS_PER_SIGMA / scale)[..., None]
    cells = torch.bucketize(unit.abs(), torch.tensor(THRESHOLDS))
    assert torch.equal(codes, (cells | (unit < 0).long() << 3).to(torch.uint8))
    coarse = torch.bucketize(unit.abs(), torch.tensor(THRESHOLDS[3:4]))
    assert torch.equal(codes >> 2, (coarse | (unit < 0).long() << 1).to(torch.uint8))
    if values.numel() > 100:
        fine_error, base_error = (
            (_read(codes, scale, fine=fine) - values).square().mean() for fine in (True, False)
        )
        assert fine_error < base_error / 5


def test_codes_mean_signed_levels() -> None:
    every = torch.arange(16, dtype=torch.uint8)
    assert gaussian_levels(every).tolist() == [*LEVELS, *(-level for level in LEVELS)]
    assert gaussian_base_levels(every[:4]).tolist() == [19, 65, -19, -65]


def test_zero_is_read_as_the_smallest_positive_level_whatever_its_sign() -> None:
    values = torch.tensor([[3.0, -3.0, 0.0, -0.0]])
    codes, _, _ = quantize_gaussian(values)
    assert codes[0, 2:].tolist() == [0, 0]


@pytest.mark.parametrize("dim", [1, 8, 64, 80, 96])
def test_squares_are_summed_in_the_stated_order(dim: int) -> None:
    values = _keys((3, dim), 100, 3)
    exact = values.double().square().sum(-1)
    torch.testing.assert_close(sum_squares(values).double(), exact, rtol=2**-20, atol=0)
    size = dim & -dim
    for row, told in zip(values.square().tolist(), sum_squares(values), strict=True):
        total = torch.tensor(0.0)
        for first in range(0, dim, size):
            part = [torch.tensor(x) for x in row[first : first + size]]
            while len(part) > 1:
                half = len(part) // 2
                part = [a + b for a, b in zip(part[:half], part[half:], strict=True)]
            total = total + part[0]
        assert torch.equal(total, told)


def test_a_gaussian_errs_as_theory_says() -> None:
    values = _keys((2000, 128), 1, 0)
    codes, peak, scale_codes = quantize_gaussian(values)
    # Scales are rounded in their logarithm, evenly by up to 1/32 of an octave to either side.
    borders, levels = _mirrored(THRESHOLDS, LEVELS)
    stretched = [_error(borders, levels, 2 ** (i / 50 / 32)) for i in range(-50, 51)]
    expected = sum(stretched) / 101
    assert expected < _error(borders, levels) * 1.01  # hardly more: the cells move along
    read = _read(codes, decode_scales(peak, scale_codes))
    error = (read - values).square().mean() / values.square().mean()
    assert error.item() == pytest.approx(expected, rel=0.05)


# --- scales of one byte ---


def _assert_nearest(read: torch.Tensor, put: torch.Tensor) -> None:
    ratio = (read.double() / put.double()).log2().abs().exp2()
    assert (ratio <= HALF_SCALE_STEP * (1 + ROUNDING)).all()


def _tokens(scales: torch.Tensor) -> torch.Tensor:
    """Return values (..., T, 8) with exactly these root mean squares."""
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    return scales[..., None] * signs


@pytest.mark.parametrize("largest", [65504.0, 1000.1, 1.0, 3e-3])
def test_scales_within_16_octaves_of_the_peak_err_by_half_a_step(largest: float) -> None:
    octaves = torch.linspace(0, 255.5 / 16, 4001)
    scales = (largest * torch.exp2(-octaves)).clamp_min(2.0**-24)
    codes, peak, scale_codes = quantize_gaussian(_tokens(scales))
    _assert_nearest(decode_scales(peak, scale_codes), scales)
    assert (scale_codes.int().diff() >= 0).all()
    assert ((codes & 7) >= 3).all()  # of 1.0, the level is never near zero


def test_the_scale_codes_are_sixteenths_of_an_octave() -> None:
    peak = torch.tensor([1.0, 1536.0]).half()
    scale_codes = torch.tensor([[0, 16, 32, 240], [8, 1, 255, 16]], dtype=torch.uint8)
    read = decode_scales(peak, scale_codes)
    assert read[0].tolist() == [1.0, 0.5, 0.25, 2.0**-15]
    expected = [1536 * 2**-0.5, 1536 * 2 ** (-1 / 16), 1536 * 2 ** (-255 / 16), 768.0]
    assert read[1].tolist() == pytest.approx(expected, rel=2.0**-22)
    written = _tokens(read)
    written[1, 0] = _tokens(torch.tensor(1536.0))  # one token must have the peak itself
    _, peaks, codes = quantize_gaussian(written)
    assert torch.equal(peaks, peak)
    assert codes.tolist() == [[0, 16, 32, 240], [0, 1, 255, 16]]


def test_every_scale_code_is_written_again_as_itself() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for peak in (65504.0, 1.0, 0.03):
        scale = decode_scales(torch.tensor(peak).half(), every)
        _, peaks, codes = quantize_gaussian(_tokens(scale))
        assert peaks == torch.tensor(peak).half()
        assert torch.equal(codes, every)


def test_scales_do_not_depend_on_how_many_are_read_at_once() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    peak = torch.tensor(1.0).half()
    together = decode_scales(peak, every)
    singly = torch.cat([decode_scales(peak, every[i : i + 1]) for i in range(256)])
    assert torch.equal(together, singly)
    # Nor on the machine: they are the powers themselves, rounded once.
    assert torch.equal(together, torch.tensor([2.0 ** (-i / 16) for i in range(256)]))


@pytest.mark.parametrize("far", [2.0**-16, 2.0**-20, 1e-30, 0.0])
def test_tokens_far_below_the_peak_take_the_smallest_scale(far: float) -> None:
    values = _keys((2, 64, 32), 1, 0)
    quiet = values.clone()
    quiet[:, 5:9] *= far * 0.5
    codes, peak, scale_codes = quantize_gaussian(quiet)
    assert (scale_codes[:, 5:9] == 255).all()
    scale = decode_scales(peak, scale_codes)
    least = peak.float() * 2 ** (-255 / 16)
    assert torch.allclose(scale[:, 5:9], least[:, None], rtol=1e-6, atol=0)
    error = (_read(codes, scale) - quiet)[:, 5:9].abs()
    # No more than the widest cell that holds such values.
    assert (error <= 1.4 * least[:, None, None]).all()
    # The others read as if these were not there, unless the peak was among them.
    others = [t for t in range(64) if not 5 <= t < 9]
    rest = quantize_gaussian(values[:, others])
    assert torch.equal(peak, rest[1])
    assert torch.equal(codes[:, others], rest[0])
    assert torch.equal(scale_codes[:, others], rest[2])


def test_each_block_has_its_own_peak() -> None:
    values = (
        _keys((2, 3, 64, 32), 1, 0)
        * torch.tensor([[1e-4, 1, 100], [3e4, 5, 1e-6]])[..., None, None]
    )
    together = quantize_gaussian(values)
    for i in range(2):
        for n in range(3):
            alone = quantize_gaussian(values[i, n])
            for part, whole in zip(alone, together, strict=True):
                assert torch.equal(part, whole[i, n])


def test_zeros_and_tiny_values_keep_a_scale_above_zero() -> None:
    for size in (0.0, 1e-30, 1e-9):
        values = _keys((3, 64), size, 0)
        codes, peak, scale_codes = quantize_gaussian(values)
        scale = decode_scales(peak, scale_codes)
        assert peak == 2.0**-24
        assert (scale_codes == 0).all()
        assert (scale == 2.0**-24).all()
        assert (_read(codes, scale) - values).abs().max() <= 3 * 2.0**-24


def test_a_block_of_zeros_beside_others_is_nearly_zero() -> None:
    values = _keys((2, 64, 32), 100, 0)
    values[0] = 0
    codes, peak, scale_codes = quantize_gaussian(values)
    assert peak[0] == 2.0**-24
    read = _read(codes, decode_scales(peak, scale_codes))
    assert read[0].abs().max() <= 2.0**-24
    assert read[1].square().mean().sqrt() == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("largest", [65504.0, 65519.0])
def test_a_peak_that_fp16_can_just_hold_is_taken(largest: float) -> None:
    _, peak, scale_codes = quantize_gaussian(_tokens(torch.tensor([1.0, largest])))
    assert peak == 65504.0
    assert scale_codes.tolist() == [255, 0]


@pytest.mark.parametrize("largest", [65520.0, 65536.0, 1e18])
def test_a_peak_beyond_fp16_is_refused(largest: float) -> None:
    with pytest.raises(ValueError, match="values are not finite or exceed"):
        quantize_gaussian(_tokens(torch.tensor([1.0, largest])))
    with pytest.raises(ValueError, match="values are not finite or exceed"):
        quantize_gaussian(_tokens(torch.tensor([[1.0, 1.0], [largest, 1.0]])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30, 65536.0 * 8])
def test_values_beyond_fp16_are_refused(bad: float) -> None:
    values = _keys((3, 64), 1, 0)
    values[1, 3] = bad
    with pytest.raises(ValueError, match="values are not finite or exceed"):
        quantize_gaussian(values)


@pytest.mark.parametrize("shape", [(1, 1), (5, 80), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4, 3e4, 1e30])
def test_int8_codes_err_by_half_a_step_and_the_rounding_of_the_scale(
    shape: tuple[int, ...], size: float
) -> None:
    values = _keys(shape, size, 0)
    codes, scale = quantize_int8(values)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert codes.min() >= -127
    largest = values.abs().amax(-1)
    # bf16 rounds the scale by 2^-9 of itself: so much of the largest value may be clipped.
    bound = scale.float() / 2 + largest * 2.0**-8 + largest * ROUNDING
    assert ((dequantize_int8(codes, scale) - values).abs() <= bound[..., None]).all()


def test_int8_zeros_stay_zero() -> None:
    codes, scale = quantize_int8(torch.zeros(2, 8))
    assert (scale > 0).all()
    assert (dequantize_int8(codes, scale) == 0).all()


def test_int8_of_no_rows_is_empty() -> None:
    codes, scale = quantize_int8(torch.zeros(0, 8))
    assert (codes.shape, scale.shape) == ((0, 8), (0,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_of_values_that_are_not_finite_is_refused(bad: float) -> None:
    values = _keys((3, 64), 1, 0)
    values[1, 3] = bad
    with pytest.raises(ValueError, match="values are not finite"):
        quantize_int8(values)
