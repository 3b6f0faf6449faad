# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Biases of values on a GPU: mean errors of 64 tokens, then their nibbles, sixteen rows at a time.

Codes equal the reference's given equal means: divisions are the correctly rounded ones, steps and
borders come from its tables. Means differ from its in the last bits, because sums do.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.block_planes_triton import coefficients, has_token, read_components
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.value_bias import BORDERS, HIGHEST, LOWEST, STEPS, ValueBias

_PLANES = tl.constexpr(MAX_WIDTH)
_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)
_ROUNDER, _ROUNDER_BITS = tl.constexpr(1.5 * 2**23), tl.constexpr(0x4B400000)
_COMPONENTS, _ROWS = 32, 16


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 (256,) each: steps, and borders up to a power of two."""
    borders = [*BORDERS, *[float("inf")] * (len(STEPS) - len(BORDERS))]
    steps, padded = torch.tensor([STEPS, borders], dtype=torch.float32, device=device)
    return steps, padded


def encode_value_bias_triton(
    y: torch.Tensor,
    words: torch.Tensor,
    layout: PlaneLayout,
    weights: torch.Tensor,
    base: torch.Tensor,
    deviation: torch.Tensor,
) -> ValueBias:
    """Return what ``encode_value_bias`` returns."""
    return to_nibbles_triton(mean_errors_triton(y, words, layout, weights, base, deviation))


def mean_errors_triton(
    y: torch.Tensor,
    words: torch.Tensor,
    layout: PlaneLayout,
    weights: torch.Tensor,
    base: torch.Tensor,
    deviation: torch.Tensor,
) -> torch.Tensor:
    """Return what ``mean_errors_reference`` returns, times the deviation."""
    heads, blocks, _, dim = y.shape
    errors = torch.empty((heads, blocks, dim), dtype=torch.float32, device=y.device)
    if blocks:
        _mean_errors[(blocks, heads)](
            y.contiguous(), words.contiguous(), layout.widths.contiguous(), layout.word_offsets,
            coefficients(y.device), weights.contiguous(), base.contiguous(),
            deviation.contiguous(), errors, dim, layout.num_words, _COMPONENTS,
        )  # fmt: skip
    return errors


def to_nibbles_triton(bias: torch.Tensor) -> ValueBias:
    """Return the codes of contiguous float32 (H, N, D)."""
    heads, blocks, dim = bias.shape
    nibbles = torch.empty((blocks, heads, dim // 2), dtype=torch.uint8, device=bias.device)
    scales = torch.empty((blocks, heads), dtype=torch.uint8, device=bias.device)
    if blocks:
        _to_nibbles[(triton.cdiv(blocks * heads, _ROWS),)](
            bias, *_tables(bias.device), nibbles, scales, blocks * heads, heads, blocks, dim // 2,
            _ROWS, triton.next_power_of_2(dim // 2),
        )  # fmt: skip
    return ValueBias(nibbles, scales)


def decode_value_bias_triton(bias: ValueBias) -> torch.Tensor:
    """Return what ``decode_value_bias_reference`` returns."""
    nibbles, scales = (table.contiguous() for table in bias)
    half = nibbles.shape[2]
    out = torch.empty((*scales.shape, 2 * half), dtype=torch.float32, device=nibbles.device)
    if out.numel():
        _decode[(triton.cdiv(scales.numel(), _ROWS),)](
            nibbles, scales, _tables(nibbles.device)[0], out, scales.numel(), half,
            _ROWS, triton.next_power_of_2(half),
        )  # fmt: skip
    return out


@triton.jit
def _mean_errors(
    y, words, widths, offsets, coefficients, weights, base, deviation, errors, dim, num_words,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Write the weighted mean errors of one head of one block, NaN where nothing has weight.

    Roofline: reads 2 bytes of bf16 and width / 8 of words per element, 6 operations per bit and 3
    per element. Llama-3-8B, one layer's values of 128k tokens: 268 MB + 29 MB, 89 us at 3.35 TB/s.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    item = h * tl.num_programs(0) + n
    t = tl.arange(0, 64)
    is_base = has_token(tl.load(base + item).to(tl.uint64), t)
    chosen = tl.where(is_base, tl.load(weights + item * 64 + t), 0.0)
    total = tl.sum(chosen, 0)
    for first in range(0, dim, SIZE):
        c = first + tl.arange(0, SIZE)
        inside = c < dim
        width = tl.load(widths + h * dim + c, mask=inside, other=0).to(tl.int32)
        read = read_components(
            words + n * num_words, offsets + h * _PLANES, coefficients, None, None, None, None,
            None, width, c, t, False,
        )  # fmt: skip
        at = y + item * 64 * dim + t[:, None] * dim + c[None, :]
        value = tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32)
        summed = tl.sum(chosen[:, None] * (value - read), 0)
        mean = tl.div_rn(summed, tl.where(total > 0, total, 1.0) + 0.0 * summed)
        mean = tl.where(total > 0, mean, float("nan"))
        scale = tl.load(deviation + h * dim + c, mask=inside, other=0.0)
        tl.store(errors + item * dim + c, mean * scale, mask=inside)


@triton.jit
def _code(value, step):
    """Return the nibbles of values: quotients rounded half to even, plus 8."""
    whole = tl.minimum(tl.maximum(tl.div_rn(value, step + 0.0 * value), _LOWEST), _HIGHEST)
    return (whole + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS - _LOWEST


@triton.jit
def _to_nibbles(
    bias, steps, borders, nibbles, scales, num_rows, heads, blocks, half,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write nibbles and scales of some rows (block, head).

    Roofline: reads 4 bytes and writes half a byte per element, 10 operations, and 256 comparisons
    per row. Llama-3-8B, one layer's values of 128k tokens: 8.4 MB + 1 MB, 2.8 us at 3.35 TB/s.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    c = tl.arange(0, WIDE)
    valid = inside[:, None] & (c < half)[None, :]
    at = bias + ((row % heads * blocks + row // heads) * 2 * half)[:, None] + c[None, :]
    low = tl.load(at, mask=valid, other=0.0)
    high = tl.load(at + half, mask=valid, other=0.0)
    size = tl.maximum(tl.abs(low), tl.abs(high))
    finite = (tl.abs(low) < float("inf")) & (tl.abs(high) < float("inf"))
    peak = tl.max(tl.where(finite, size, 0.0), 1)
    usable = (tl.min(finite.to(tl.int32), 1) > 0) & (peak > 0)
    border = tl.load(borders + tl.arange(0, 256))
    share = tl.div_rn(peak, _HIGHEST + 0.0 * peak)
    scale = 1 + tl.sum((border[None, :] <= share[:, None]).to(tl.int32), 1)
    scale = tl.where(usable, scale, 0)
    step = tl.where(usable, tl.load(steps + scale), 1.0)[:, None]
    low = _code(tl.where(usable[:, None], low, 0.0), step)
    high = _code(tl.where(usable[:, None], high, 0.0), step)
    place = (row * half)[:, None] + c[None, :]
    tl.store(nibbles + place, (low | high << 4).to(tl.uint8), mask=valid)
    tl.store(scales + row, scale.to(tl.uint8), mask=inside)


@triton.jit
def _decode(nibbles, scales, steps, out, num_rows, half, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Write the biases of some rows (block, head).

    Roofline: reads half a byte and writes 4 per element, 4 operations. Llama-3-8B, one layer's
    values of 128k tokens: 1 MB + 8.4 MB, 2.8 us at 3.35 TB/s.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    c = tl.arange(0, WIDE)
    valid = inside[:, None] & (c < half)[None, :]
    step = tl.load(steps + tl.load(scales + row, mask=inside, other=0).to(tl.int32))[:, None]
    byte = tl.load(nibbles + (row * half)[:, None] + c[None, :], mask=valid, other=0).to(tl.int32)
    place = (row * 2 * half)[:, None] + c[None, :]
    tl.store(out + place, ((byte & 15) + _LOWEST).to(tl.float32) * step, mask=valid)
    tl.store(out + place + half, ((byte >> 4) + _LOWEST).to(tl.float32) * step, mask=valid)


_MEANS_TYPES = {
    "y": "*bf16", "words": "*i64", "widths": "*u8", "offsets": "*i64", "coefficients": "*fp32",
    "weights": "*fp32", "base": "*i64", "deviation": "*fp32", "errors": "*fp32", "dim": "i32",
    "num_words": "i32",
}  # fmt: skip
_CODE_TYPES = {
    "bias": "*fp32", "steps": "*fp32", "borders": "*fp32", "nibbles": "*u8", "scales": "*u8",
    "num_rows": "i32", "heads": "i32", "blocks": "i32", "half": "i32",
}  # fmt: skip
_DECODE_TYPES = {
    "nibbles": "*u8", "scales": "*u8", "steps": "*fp32", "out": "*fp32", "num_rows": "i32",
    "half": "i32",
}  # fmt: skip
_SIZES = {"ROWS": _ROWS, "WIDE": 64}
AOT = (
    AotCase("means", _mean_errors, _MEANS_TYPES, {"SIZE": _COMPONENTS}, divisible=("dim",)),
    AotCase("to_nibbles_dim128", _to_nibbles, _CODE_TYPES, _SIZES, divisible=("half",)),
    AotCase(
        "decode_dim128", _decode, _DECODE_TYPES, _SIZES, divisible=("half",),
        wide_loads=False,  # a program reads a kilobyte
    ),
)  # fmt: skip
