# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Escaped tokens on a GPU: a program takes sixteen rows or more, wherever their tokens lie.

The Hadamard transform adds and subtracts neighbours where the reference multiplies by a matrix, so
a scale may be a last place of bf16 off and a code one off; given the turned numbers, rounding is
the reference's.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.escape_rows import EscapeRows
from kvstrata.kernels.quantize import TINY
from kvstrata.kernels.token_masks import to_flags

_TINY, _TOP = tl.constexpr(TINY), tl.constexpr(127.0)
_ROUNDER, _ROUNDER_BITS = tl.constexpr(1.5 * 2**23), tl.constexpr(0x4B400000)
_INFINITE = tl.constexpr(0x7F80)  # bf16
_MIN_ROWS, _ELEMENTS = 16, 2048  # of a program: eight bf16 for each thread, or more


def pack_escape_rows_triton(
    x: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``pack_escape_rows_reference`` returns, up to the order of sums.

    Raises:
        ValueError: An escaped token is not finite.
    """
    tokens, shape = _tokens(masks), _shape(x.shape[3])
    codes = torch.empty((tokens.numel(), x.shape[3]), dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens.numel(), dtype=torch.bfloat16, device=x.device)
    if tokens.numel():
        _pack[(triton.cdiv(tokens.numel(), shape["ROWS"]),)](
            x, tokens, codes, scales.view(torch.int16), tokens.numel(), x.shape[0], *x.stride(),
            **shape,
        )  # fmt: skip
    if not torch.isfinite(scales).all():
        raise ValueError("values are not finite")
    return codes, scales


def unpack_escape_rows_triton(rows: EscapeRows) -> torch.Tensor:
    """Return what ``unpack_escape_rows_reference`` returns, up to the order of sums."""
    num_rows, dim = rows.codes.shape
    out = torch.empty((num_rows, dim), dtype=torch.float32, device=rows.codes.device)
    _launch_unpack(rows, torch.arange(num_rows, device=out.device), out, 1, (0, 64 * dim, dim, 1))
    return out


def scatter_escape_rows_triton(rows: EscapeRows, out: torch.Tensor) -> None:
    """Do what ``scatter_escape_rows_reference`` does, up to the order of sums."""
    _launch_unpack(rows, _tokens(rows.masks), out, out.shape[0], out.stride())


def _launch_unpack(
    rows: EscapeRows,
    tokens: torch.Tensor,
    out: torch.Tensor,
    num_heads: int,
    strides: tuple[int, ...],
) -> None:
    num_rows, shape = rows.codes.shape[0], _shape(rows.codes.shape[1])
    if num_rows:
        _unpack[(triton.cdiv(num_rows, shape["ROWS"]),)](
            rows.codes.contiguous(), rows.scales.contiguous(), tokens, out, num_rows, num_heads,
            *strides, **shape,
        )  # fmt: skip


def _tokens(masks: torch.Tensor) -> torch.Tensor:
    """Return int64 (E,): the tokens of the masks, (block * H + head) * 64 + token."""
    return to_flags(masks.T).flatten().nonzero().flatten()


def _shape(dim: int) -> dict[str, Any]:
    """Return constants: groups of the transform, up to a power of two, and their size."""
    size = dim & -dim
    groups = triton.next_power_of_2(dim // size)
    steps = size.bit_length() - 1
    rows = max(_MIN_ROWS, _ELEMENTS // (groups * size))
    return {"DIM": dim, "GROUPS": groups, "SIZE": size, "STEPS": steps, "ROWS": rows}


@triton.jit
def _turn(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Return the orthonormal transform of each group of the rows, (ROWS, GROUPS * SIZE)."""
    COUNT: tl.constexpr = ROWS * GROUPS
    x = tl.reshape(x * (1 / SIZE**0.5), (COUNT, SIZE))  # first, so that no sum overflows
    for _ in tl.static_range(STEPS):
        low, high = tl.split(tl.reshape(x, (COUNT, SIZE // 2, 2)))
        both = tl.permute(tl.join(low + high, low - high), (0, 2, 1))
        x = tl.reshape(both, (COUNT, SIZE))
    return tl.reshape(x, (ROWS, GROUPS * SIZE))


@triton.jit
def _places(
    token, num_heads, head_stride, block_stride, token_stride, channel_stride, c
):  # fmt: skip
    """Return int64 (ROWS, channels): where the channels of tokens lie."""
    place = token % 64 * token_stride + token // 64 % num_heads * head_stride
    place += token // 64 // num_heads * block_stride
    return place[:, None] + (c.to(tl.int64) * channel_stride)[None, :]


@triton.jit
def _pack(
    x, tokens, codes, scales, num_rows, num_heads,
    head_stride, block_stride, token_stride, channel_stride,
    DIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write codes and scales of some rows; an infinite scale if a token is not finite.

    Roofline: reads 2 bytes of bf16 and writes 1 per element of an escaped token, log2(SIZE) + 10
    operations. Llama-3-8B, one layer's keys of 128k tokens, of which 3 % escape: 8 MB + 4 MB, 4 us
    at 3.35 TB/s.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    token = tl.load(tokens + row, mask=is_row, other=0)
    c = tl.arange(0, GROUPS * SIZE)
    inside = is_row[:, None] & (c < DIM)[None, :]
    at = x + _places(token, num_heads, head_stride, block_stride, token_stride, channel_stride, c)
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value = _turn(value, ROWS, GROUPS, SIZE, STEPS)
    finite = tl.abs(value) < float("inf")
    peak = tl.max(tl.where(finite, tl.abs(value), 0.0), 1)
    bits = tl.maximum(tl.div_rn(peak, _TOP + 0.0 * peak), _TINY).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # bf16, rounded half to even
    scale = (bits << 16).to(tl.float32, bitcast=True)[:, None]
    bits = tl.where(tl.min(finite.to(tl.int32), 1) > 0, bits, _INFINITE)
    tl.store(scales + row, bits.to(tl.int16), mask=is_row)
    value = tl.where(finite, value, 0.0)
    whole = tl.div_rn(value, scale + 0.0 * value)
    whole = tl.minimum(tl.maximum(whole, -_TOP), _TOP)
    code = (whole + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS  # half to even
    tl.store(codes + (row * DIM)[:, None] + c[None, :], code.to(tl.int8), mask=inside)


@triton.jit
def _unpack(
    codes, scales, tokens, out, num_rows, num_heads,
    head_stride, block_stride, token_stride, channel_stride,
    DIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write the tokens of some rows to their places.

    Roofline: reads 1 byte and writes 4 of float32, or 2 of bf16, per element of an escaped token,
    log2(SIZE) + 2 operations. Llama-3-8B, one layer's keys of 128k tokens, of which 3 % escape:
    4 MB + 16 MB, 6 us at 3.35 TB/s.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    token = tl.load(tokens + row, mask=is_row, other=0)
    c = tl.arange(0, GROUPS * SIZE)
    inside = is_row[:, None] & (c < DIM)[None, :]
    code = tl.load(codes + (row * DIM)[:, None] + c[None, :], mask=inside, other=0)
    scale = tl.load(scales + row, mask=is_row, other=0.0).to(tl.float32)
    value = _turn(code.to(tl.float32) * scale[:, None], ROWS, GROUPS, SIZE, STEPS)
    to = out + _places(token, num_heads, head_stride, block_stride, token_stride, channel_stride, c)
    tl.store(to, value.to(out.dtype.element_ty), mask=inside)


_PACK_TYPES = {"x": "*bf16", "tokens": "*i64", "codes": "*i8", "scales": "*i16"}
_UNPACK_TYPES = {"codes": "*i8", "scales": "*bf16", "tokens": "*i64", "out": "*fp32"}
_STRIDES = ("head_stride", "block_stride", "token_stride")
_SIZES = dict.fromkeys(("num_rows", "num_heads"), "i32") | dict.fromkeys(_STRIDES, "i64")
AOT = tuple(
    AotCase(
        f"{name}_dim{dim}", kernel, types | _SIZES, _shape(dim), ones=("channel_stride",),
        divisible=_STRIDES, wide_loads=name == "pack",  # codes are bytes
    )
    for name, kernel, types, dim in (
        ("pack", _pack, _PACK_TYPES, 128), ("unpack", _unpack, _UNPACK_TYPES, 64)
    )
)  # fmt: skip
