# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The operations of ``decoder_ops`` on a GPU: a program per row, or per tile of a row."""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase

_WIDE, _NUMBERS = 2048, 1024  # numbers of a row at once


@triton.jit
def add_norm_kernel(
    x, residual, weight, total, out, width, eps, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr
):
    """Write one row's sum with the residual, and that row normalised.

    Roofline, per bf16 element: 4 bytes read, 4 written, 6 operations; a row longer than WIDE is
    read twice, the second time from the cache. 64 rows of 4,096: 2.1 MB, 0.6 us at 3.35 TB/s, so it
    is bound by its launch.

    Args:
        x: (N, width).
        residual: (N, width), read with HAS_RESIDUAL.
        weight: (width,).
        total: (N, width), written with HAS_RESIDUAL, else the same as ``x``.
        out: (N, width).
        width: E.
        eps: Added to the mean square.
        HAS_RESIDUAL: Whether there is something to add.
        WIDE: Numbers at once.
    """
    start = tl.program_id(0).to(tl.int64) * width
    squares = tl.zeros((WIDE,), tl.float32)
    for first in range(0, width, WIDE):
        i = first + tl.arange(0, WIDE)
        inside = i < width
        value = tl.load(x + start + i, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            more = tl.load(residual + start + i, mask=inside, other=0.0)
            value = (value.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
            tl.store(total + start + i, value, mask=inside)
        wide = value.to(tl.float32)
        squares += wide * wide
    factor = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    for first in range(0, width, WIDE):
        i = first + tl.arange(0, WIDE)
        inside = i < width
        value = tl.load(x + start + i, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:  # added anew: another thread may have written the sum
            more = tl.load(residual + start + i, mask=inside, other=0.0).to(tl.float32)
            value = (value + more).to(x.dtype.element_ty).to(tl.float32)
        scale = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        normed = (value * factor).to(x.dtype.element_ty).to(tl.float32)
        tl.store(out + start + i, (scale * normed).to(x.dtype.element_ty), mask=inside)


@triton.jit
def rotate_heads_kernel(
    x, cos, sin, positions, out, heads, row_stride,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write the heads of one row, rotated to its position; what lies behind 2 HALF is copied.

    Roofline, per bf16 element: 2 bytes read, 2 written, 3 operations. 64 rows of 40 heads of 128:
    1.3 MB, 0.4 us at 3.35 TB/s, so it is bound by its launch.

    Args:
        x: (N, heads, D), rows ``row_stride`` apart, heads contiguous.
        cos: float32 (positions, 2 HALF).
        sin: Likewise.
        positions: int64 (N,).
        out: (N, heads, D).
        heads: Of a row.
        row_stride: Elements between rows.
        DIM: D.
        HALF: Half of the rotated channels.
        BLOCK_D: D up to a power of two.
        BLOCK_H: Heads at once.
    """
    row = tl.program_id(0).to(tl.int64)
    h, c = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = (h < heads)[:, None] & (c < DIM)[None, :]
    turning = c < 2 * HALF
    partner = tl.where(turning, tl.where(c < HALF, c + HALF, c - HALF), c)
    angle = tl.load(positions + row) * (2 * HALF) + c
    cosine = tl.load(cos + angle, mask=turning, other=1.0)
    sine = tl.load(sin + angle, mask=turning, other=0.0)
    sine = tl.where(c < HALF, -sine, sine)[None, :]
    at = x + row * row_stride + h[:, None] * DIM
    own = tl.load(at + c[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    turned = own * cosine[None, :] + tl.where(turning[None, :], other * sine, 0.0)
    to = out + (row * heads + h[:, None]) * DIM + c[None, :]
    tl.store(to, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_gate_kernel(x, out, width, NUMBERS: tl.constexpr):
    """Write silu(gate) * up of a tile of one row.

    Roofline, per result in bf16: 4 bytes read, 2 written, one exponential. 64 rows of 14,336:
    5.5 MB, 1.6 us at 3.35 TB/s.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    inside = i < width
    gate = tl.load(x + row * 2 * width + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + i, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + i, value.to(out.dtype.element_ty), mask=inside)


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``add_rms_norm_reference`` returns, up to the order of a sum."""
    x = x.contiguous()
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    if x.numel():
        add_norm_kernel[(x.shape[0],)](
            x, x if residual is None else residual.contiguous(), weight.contiguous(), total, out,
            x.shape[1], eps, residual is not None,
            min(_WIDE, triton.next_power_of_2(x.shape[1])),
        )  # fmt: skip
    return out, total


def rotate_heads_triton(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return what ``rotate_heads_reference`` returns, up to rounding."""
    rows, heads, dim = x.shape
    if x.stride()[1:] != (dim, 1):
        x = x.contiguous()
    out = torch.empty((rows, heads, dim), dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(dim)
        at_once = max(1, _NUMBERS // block)
        rotate_heads_kernel[rows, triton.cdiv(heads, at_once)](
            x, cos.contiguous(), sin.contiguous(), positions.to(x.device), out, heads,
            x.stride(0), dim, cos.shape[1] // 2, block, at_once,
        )  # fmt: skip
    return out


def silu_gate_triton(x: torch.Tensor) -> torch.Tensor:
    """Return what ``silu_gate_reference`` returns, up to rounding."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (rows, triton.cdiv(width, _WIDE))
        silu_gate_kernel[grid](x.contiguous(), out, width, _WIDE)
    return out


def _cases(dtype: str) -> tuple[AotCase, ...]:
    numbers = dict.fromkeys(("x", "out"), f"*{dtype}")
    norm = numbers | dict.fromkeys(("residual", "weight", "total"), f"*{dtype}")
    angles = {"cos": "*fp32", "sin": "*fp32", "positions": "*i64"}
    return (
        AotCase(
            f"norm_{dtype}", add_norm_kernel, norm | {"width": "i32", "eps": "fp32"},
            {"HAS_RESIDUAL": True, "WIDE": _WIDE}, divisible=("width",),
        ),
        AotCase(
            f"rotate_{dtype}_dim128", rotate_heads_kernel,
            numbers | angles | {"heads": "i32", "row_stride": "i64"},
            {"DIM": 128, "HALF": 64, "BLOCK_D": 128, "BLOCK_H": _NUMBERS // 128},
            divisible=("row_stride",),
        ),
        AotCase(
            f"gate_{dtype}", silu_gate_kernel, numbers | {"width": "i32"},
            {"NUMBERS": _WIDE}, divisible=("width",),
        ),
    )  # fmt: skip


AOT = (*_cases("fp32"), *_cases("bf16"))
