"""Nested quantisers: the high 2 bits alone are a valid 2-bit code of the same value.

``BASE`` reads use the high bits and the centre of their cell, ``BASE + MID`` reads use all. Keys
have 5 bits, values 4.

Every function gives the same bits on every machine: each operation is one that IEEE 754 rounds in
one way only, and sums are taken in a stated order. Levels are small integers, so that any linear
transform of them with integer weights is exact in whatever order it is summed.

Legend: T tokens of a block, D head_dim.
"""

import torch

KEY_BITS = 5
VALUE_BITS = 4
BASE_BITS = 2
# Lloyd-Max cells of a unit Gaussian's absolute value: 2 of the plain 2-bit quantiser, each split
# into 4 by Lloyd-Max inside it. Levels are the centroids in units of sigma / 42.75, rounded (which
# costs 0.05 % in mean squared error); borders lie half-way between them. The largest level times
# 256, the largest head_dim, fits int16.
LEVELS_PER_SIGMA = 42.75
LEVELS = (5, 15, 25, 36, 49, 65, 85, 114)
THRESHOLDS = (10.0, 20.0, 30.5, 42.0, 57.0, 75.0, 99.5)
BASE_LEVELS = (19, 65)
SCALE_STEPS_PER_OCTAVE = 16

KEY_TOP = 2**KEY_BITS - 1
BASE_TOP = 2 ** (KEY_BITS - BASE_BITS) - 1
TINY = 2.0**-24  # the smallest positive fp16: a scale is never zero
# Tables, because log2 and exp2 differ in the last bit between machines, and blocks must not.
SCALE_FACTORS = tuple(2.0 ** (-code / SCALE_STEPS_PER_OCTAVE) for code in range(256))
SCALE_BORDERS = tuple(2.0 ** ((code + 0.5) / SCALE_STEPS_PER_OCTAVE) for code in range(255))


def quantize_channels(
    keys: torch.Tensor, skipped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 5-bit codes of ``keys`` with one minimum and step per channel and group of tokens.

    The parameters are rounded to fp16 before the codes are taken, so reading repeats them exactly:
    value = minimum + step * code, error at most step / 2 inside the range.

    Args:
        keys: float32 (..., T, D); one group per leading index.
        skipped: bool (..., T), tokens that do not widen the range; their codes mean nothing.

    Returns:
        Codes uint8 (..., T, D), minima fp16 (..., D), steps fp16 (..., D).

    Raises:
        ValueError: A value does not fit fp16's range.

    Source:
        KIVI, arXiv:2402.02750, section 3: keys per channel, because their outliers live in
        channels.
    """
    hidden = skipped[..., None]
    low = keys.masked_fill(hidden, float("inf")).amin(-2)
    high = keys.masked_fill(hidden, float("-inf")).amax(-2)
    empty = low > high
    # Adding zero makes -0.0 a 0.0: which of the two is the lower depends on the machine.
    low, high = low.masked_fill(empty, 0.0) + 0.0, high.masked_fill(empty, 0.0) + 0.0
    minimum = low.half()
    step = ((high - minimum.float()) / torch.tensor(float(KEY_TOP))).clamp_min(TINY).half()
    if not (torch.isfinite(minimum).all() and torch.isfinite(step).all()):
        raise ValueError("keys are not finite or exceed the range of fp16")
    inverse = torch.tensor(1.0) / step.float()
    scaled = (keys - minimum.float()[..., None, :]) * inverse[..., None, :]
    return scaled.nan_to_num_(0.0).clamp_(0, KEY_TOP).round_().to(torch.uint8), minimum, step


def dequantize_channels(
    codes: torch.Tensor, minimum: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Return float32 (..., T, D) of 5-bit codes and their fp16 (..., D) parameters."""
    values = codes.float()
    return values.mul_(step.float()[..., None, :]).add_(minimum.float()[..., None, :])


def dequantize_channels_base(
    codes: torch.Tensor, minimum: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Return float32 (..., T, D) of the high 2 bits alone: the centre of the eight fine values."""
    wide = step.float()
    centre = minimum.float() + BASE_TOP / 2 * wide
    return codes.float().mul_((BASE_TOP + 1) * wide[..., None, :]).add_(centre[..., None, :])


def quantize_gaussian(
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return nested codes of ``values`` and each token's scale, in one byte.

    A code's high bit is the sign (1 below zero), the other three count the borders that the
    absolute value exceeds. A token's scale is its root mean square, coded in sixteenths of an
    octave below the largest of its block; what lies 16 octaves below does not matter beside it.

    Args:
        values: float32 (..., T, D), roughly Gaussian along D, as after a Hadamard transform.

    Returns:
        Codes uint8 (..., T, D) in 0..15, peaks fp16 (...), scale codes uint8 (..., T).

    Raises:
        ValueError: A value is not finite or exceeds the range of fp16.
    """
    # Multiplied by a tensor: what dividing by a number means differs between devices.
    scale = (sum_squares(values) * torch.tensor(1.0 / values.shape[-1])).sqrt().clamp_min(TINY)
    peak = scale.amax(-1).half()
    if not torch.isfinite(peak).all() or not torch.isfinite(scale).all():
        raise ValueError("values are not finite or exceed the range of fp16")
    below = peak.float()[..., None] / scale
    scale_codes = torch.bucketize(below, torch.tensor(SCALE_BORDERS)).to(torch.uint8)
    factor = torch.tensor(LEVELS_PER_SIGMA) / decode_scales(peak, scale_codes)
    unit = values * factor[..., None]
    codes = torch.bucketize(unit.abs(), torch.tensor(THRESHOLDS))
    return (codes | (unit < 0).long() << 3).to(torch.uint8), peak, scale_codes


def sum_squares(values: torch.Tensor) -> torch.Tensor:
    """Return float32 (...): the sum of squares along D of ``values`` (..., D), in a fixed order.

    D is seen as (groups, size), ``size`` its largest power-of-two divisor. Halves along ``size``
    are added until one number per group is left; then the groups are added in turn.
    """
    size = values.shape[-1] & -values.shape[-1]
    squares = values.square().unflatten(-1, (-1, size))
    while size > 1:
        size //= 2
        squares = squares[..., :size] + squares[..., size:]
    total: torch.Tensor = squares[..., 0, 0]
    for group in range(1, squares.shape[-2]):
        total = total + squares[..., group, 0]
    return total


def decode_scales(peak: torch.Tensor, scale_codes: torch.Tensor) -> torch.Tensor:
    """Return float32 scales (..., T) of fp16 peaks (...) and uint8 codes (..., T)."""
    factors = torch.tensor(SCALE_FACTORS, device=peak.device)
    return peak.float()[..., None] * factors[scale_codes.int()]


def gaussian_levels(codes: torch.Tensor) -> torch.Tensor:
    """Return float32 (...) of 4-bit codes: integers, in units of sigma / ``LEVELS_PER_SIGMA``."""
    return _signed(LEVELS, codes)


def gaussian_base_levels(codes: torch.Tensor) -> torch.Tensor:
    """Return float32 (...) of the high 2 bits alone: the centroids of the plain 2-bit cells."""
    return _signed(BASE_LEVELS, codes)


def _signed(levels: tuple[int, ...], codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*levels, *(-level for level in levels)], dtype=torch.float32)
    return table.to(codes.device)[codes.int()]


def quantize_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes of ``values`` (..., D) and bf16 scales (...), absmax / 127 per token.

    Raises:
        ValueError: A value is not finite.
    """
    scale = (values.abs().amax(-1) / torch.tensor(127.0)).clamp_min(TINY).bfloat16()
    if not torch.isfinite(scale).all():
        raise ValueError("values are not finite")
    return (values / scale.float()[..., None]).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 (..., D) of int8 codes and bf16 scales (...)."""
    return codes.float().mul_(scale.float()[..., None])
