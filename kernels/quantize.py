"""Nested quantisers: the high 2 bits alone are a valid 2-bit code of the same value.

``BASE`` reads use the high bits and the centre of their cell, ``BASE + MID`` reads use all. Keys
have 5 bits, values 4.

Legend: T tokens of a block, D head_dim.
"""

import torch

KEY_BITS = 5
VALUE_BITS = 4
BASE_BITS = 2
# Lloyd-Max quantiser of a unit Gaussian with 4 cells, each split into 4 by Lloyd-Max inside it.
GAUSSIAN_THRESHOLDS = (
    -2.323097, -1.751958, -1.332665, -0.981599, -0.718561, -0.471341, -0.233483, 0.0,
    0.233483, 0.471341, 0.718561, 0.981599, 1.332665, 1.751958, 2.323097,
)  # fmt: skip
GAUSSIAN_LEVELS = (
    -2.662278, -1.983916, -1.520001, -1.145328, -0.845194, -0.591928, -0.350754, -0.116212,
    0.116212, 0.350754, 0.591928, 0.845194, 1.145328, 1.520001, 1.983916, 2.662278,
)  # fmt: skip
SCALE_STEPS_PER_OCTAVE = 16
GAUSSIAN_BASE_LEVELS = (-1.510418, -0.45278, 0.45278, 1.510418)

_TOP_KEY_CODE = 2**KEY_BITS - 1
_FINE_PER_BASE = 2 ** (KEY_BITS - BASE_BITS)
# Tables, because log2 and exp2 differ in the last bit between machines, and blocks must not.
_SCALE_FACTORS = tuple(2.0 ** (-code / SCALE_STEPS_PER_OCTAVE) for code in range(256))
_SCALE_BORDERS = tuple(2.0 ** ((code + 0.5) / SCALE_STEPS_PER_OCTAVE) for code in range(255))
_TINY = 2.0**-24  # the smallest positive fp16: a scale is never zero


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
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    minimum = low.half()
    step = ((high - minimum.float()) / _TOP_KEY_CODE).clamp_min(_TINY).half()
    if not (torch.isfinite(minimum).all() and torch.isfinite(step).all()):
        raise ValueError("keys are not finite or exceed the range of fp16")
    scaled = (keys - minimum.float()[..., None, :]) / step.float()[..., None, :]
    return scaled.round_().clamp_(0, _TOP_KEY_CODE).to(torch.uint8), minimum, step


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
    return (
        codes.float()
        .mul_(_FINE_PER_BASE * wide[..., None, :])
        .add_((minimum.float() + (_FINE_PER_BASE - 1) / 2 * wide)[..., None, :])
    )


def quantize_gaussian(
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return nested Lloyd-Max codes of ``values`` and each token's scale, in one byte.

    A token's scale is its root mean square, coded in sixteenths of an octave below the largest of
    its block; what lies 16 octaves below does not matter beside it.

    Args:
        values: float32 (..., T, D), roughly Gaussian along D, as after a Hadamard transform.

    Returns:
        Codes uint8 (..., T, D) in 0..15, peaks fp16 (...), scale codes uint8 (..., T).

    Raises:
        ValueError: A value is not finite or exceeds the range of fp16.
    """
    scale = values.square().mean(-1).sqrt().clamp_min(_TINY)
    peak = scale.amax(-1).half()
    if not torch.isfinite(peak).all() or not torch.isfinite(scale).all():
        raise ValueError("values are not finite or exceed the range of fp16")
    below = peak.float()[..., None] / scale
    scale_codes = torch.bucketize(below, torch.tensor(_SCALE_BORDERS)).to(torch.uint8)
    unit = values / decode_scales(peak, scale_codes)[..., None]
    codes = torch.bucketize(unit, torch.tensor(GAUSSIAN_THRESHOLDS)).to(torch.uint8)
    return codes, peak, scale_codes


def decode_scales(peak: torch.Tensor, scale_codes: torch.Tensor) -> torch.Tensor:
    """Return float32 scales (..., T) of fp16 peaks (...) and uint8 codes (..., T)."""
    return peak.float()[..., None] * torch.tensor(_SCALE_FACTORS)[scale_codes.int()]


def dequantize_gaussian(
    codes: torch.Tensor, scale: torch.Tensor, levels: tuple[float, ...] = GAUSSIAN_LEVELS
) -> torch.Tensor:
    """Return float32 (..., D) of codes into ``levels`` and their float32 scales (...)."""
    return torch.tensor(levels)[codes.int()].mul_(scale[..., None])


def quantize_int8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes of ``values`` (..., D) and bf16 scales (...), absmax / 127 per token.

    Raises:
        ValueError: A value is not finite.
    """
    scale = (values.abs().amax(-1) / 127).clamp_min(_TINY).bfloat16()
    if not torch.isfinite(scale).all():
        raise ValueError("values are not finite")
    return (values / scale.float()[..., None]).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 (..., D) of int8 codes and bf16 scales (...)."""
    return codes.float().mul_(scale.float()[..., None])
