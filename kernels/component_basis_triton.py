# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Tokens to planes and back on a GPU: products stay in registers, blocks do not see each other.

Encoding takes the 64 tokens of one head of a block and makes 16 components of them at a time. So a
block's bytes do not depend on how many are encoded together.

Expanding makes these tokens, or some channels of each half of them, which rotation pairs. It
decodes 16 components at a time and multiplies them by their rows of the inverse; then it adds mean
and bias, puts escapes in and rotates. Sums are in float32. Heads lie next to each other in the
grid, so that all but the first find cos and sin in the cache.
"""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.block_planes import KEPT_MULTIPLE, NOT_FINITE, MidRows
from kvstrata.kernels.block_planes_triton import (
    base_tables,
    code_tables,
    coefficients,
    fine_tables,
    has_token,
    mid_arguments,
    rank_of,
    read_components,
    write_words,
)
from kvstrata.kernels.component_basis import ComponentBasis, product_dtype
from kvstrata.kernels.escape_rows import EscapeRows, row_starts, unpack_escape_rows
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.token_masks import TokenClasses

_PLANES, _DEPTH = tl.constexpr(MAX_WIDTH), tl.constexpr(KEPT_MULTIPLE)
_MAX_COLUMNS, _MIN_COLUMNS = 64, 16


def encode_tokens_triton(
    x: torch.Tensor, basis: ComponentBasis, weights: torch.Tensor, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what ``encode_tokens`` returns; D is a multiple of 16."""
    layout, (heads, blocks, _, dim) = basis.layout, x.shape
    dtype = product_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    words = torch.empty((blocks, layout.num_words), dtype=torch.int64, device=x.device)
    error = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    if blocks:
        _encode[(heads * blocks,)](
            x, *x.stride(), basis.mean.contiguous(), basis.matrix("forward", dtype),
            weights.contiguous(), layout.widths.contiguous(), layout.word_offsets,
            code_tables(x.device), base_tables(x.device), y, words, error,
            heads, blocks, layout.num_words, DIM=dim, PADDED=triton.next_power_of_2(dim),
            num_warps=_encode_warps(dim),
        )  # fmt: skip
    if not torch.isfinite(error).all():
        raise ValueError(NOT_FINITE)
    return y, words, error


def expand_triton(
    words: torch.Tensor,
    basis: ComponentBasis,
    classes: TokenClasses,
    mid: MidRows | None,
    shift: torch.Tensor | None,
    escapes: EscapeRows | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
) -> None:
    """Write what ``expand_reference`` returns to ``out``; D is a multiple of 16, at least 32."""
    layout, (heads, blocks, _, dim) = basis.layout, out.shape
    columns = _columns(dim)
    rows, firsts = None, None
    if escapes is not None:
        rows, firsts = unpack_escape_rows(escapes), row_starts(escapes.masks)
    cos, sin = (None, None) if rotation is None else (table.contiguous() for table in rotation)
    if blocks:
        _expand[(heads * blocks, triton.cdiv(dim // 2, columns))](
            words.contiguous(), layout.widths.contiguous(), layout.word_offsets,
            layout.plane_sizes, coefficients(words.device), fine_tables(words.device),
            *mid_arguments(mid, layout), basis.matrix("inverse", product_dtype(out.dtype)),
            basis.mean.contiguous(), None if shift is None else shift.contiguous(),
            *(masks.contiguous() for masks in (classes.base, classes.mid, classes.escape)),
            rows, firsts, cos, sin, out, heads, blocks, layout.num_words,
            DIM=dim, COLUMNS=columns, REFINED=mid is not None, SHIFTED=shift is not None,
            ESCAPED=escapes is not None, TURNED=rotation is not None, num_warps=_warps(dim),
        )  # fmt: skip


def _columns(dim: int) -> int:
    half: int = triton.next_power_of_2(dim // 2)
    return max(_MIN_COLUMNS, min(_MAX_COLUMNS, half))


def _warps(dim: int) -> int:
    return 8 if _columns(dim) == _MAX_COLUMNS else 4  # with 4, 128 channels spill on sm_100


def _encode_warps(dim: int) -> int:
    return 8 if dim > 64 else 4


@triton.jit
def _encode(
    x, head_stride, block_stride, token_stride, channel_stride, mean, forward, weights, widths,
    offsets, codes, levels, y, words, error, num_heads, num_blocks, num_words,
    DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Encode the tokens of one head of one block.

    Roofline: reads 2 bytes of bf16, writes 2 of components and width / 8 of words per element.
    Llama-3-8B, one layer's keys of 128k tokens: 268 + 268 + 20 MB, 166 us at 3.35 TB/s. The product
    takes 2 D operations (34 GFLOP, 35 us at 989 TFLOP/s), quantising 30 and two reads of tables in
    cache.
    """
    pid = tl.program_id(0).to(tl.int64)
    h, n = pid % num_heads, pid // num_heads
    item = h * num_blocks + n
    t, k = tl.arange(0, 64), tl.arange(0, PADDED)
    inside = k < DIM
    at = x + h * head_stride + n * block_stride
    at = at + (t.to(tl.int64) * token_stride)[:, None] + (k.to(tl.int64) * channel_stride)[None, :]
    token = tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32)
    token = token - tl.load(mean + h * DIM + k, mask=inside, other=0.0)[None, :]
    token = token.to(forward.dtype.element_ty)
    forward += h * DIM * DIM
    y += item * 64 * DIM
    loss = tl.zeros([64], tl.float32)
    for first in range(0, DIM, _DEPTH):
        c = first + tl.arange(0, _DEPTH)
        columns = (k * DIM)[:, None] + c[None, :]
        matrix = tl.load(forward + columns, mask=inside[:, None], other=0.0)
        stored = tl.dot(token, matrix, input_precision="ieee").to(y.dtype.element_ty)
        tl.store(y + (t * DIM)[:, None] + c[None, :], stored)
        rest = write_words(
            stored.to(tl.float32), codes, levels, words + n * num_words, offsets + h * _PLANES,
            tl.load(widths + h * DIM + c).to(tl.int32), c, t,
        )  # fmt: skip
        weight = tl.load(weights + h * DIM + c)
        loss += tl.sum(weight[None, :] * rest * rest, 1)
    tl.store(error + item * 64 + t, loss)


@triton.jit
def _finish(
    x, mean, shift, escape_rows, column, inside, is_planed, is_base, is_escape, ranks,
    DIM: tl.constexpr, SHIFTED: tl.constexpr, ESCAPED: tl.constexpr,
):  # fmt: skip
    """Return some columns of tokens of all classes, given the product of the planed ones."""
    of_mean = tl.load(mean + column, mask=inside, other=0.0)[None, :]
    added = of_mean
    if SHIFTED:
        of_base = tl.load(shift + column, mask=inside, other=0.0)[None, :]
        added = tl.where(is_base, of_base, of_mean)
    x = tl.where(is_planed, x + added, of_mean)
    if ESCAPED:
        at = escape_rows + (ranks * DIM)[:, None] + column[None, :]
        x = tl.where(is_escape, tl.load(at, mask=is_escape & inside[None, :], other=0.0), x)
    return x


@triton.jit
def _expand(
    words, widths, offsets, sizes, coefficients, fine, mid_masks, rows, starts, counts,
    inverse, mean, shift, base, mid, escape, escape_rows, escape_starts, cos, sin, out,
    num_heads, num_blocks, num_words,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, REFINED: tl.constexpr, SHIFTED: tl.constexpr,
    ESCAPED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Make some columns of both halves of the tokens of one head of one block.

    Roofline: reads what is stored, about 1.7 bits per element at `balanced`, and writes 2 bytes of
    bf16; cos and sin take 4 bytes per token and channel, once for all heads. Llama-3-8B, one
    layer's keys of 128k tokens: 29 + 268 + 67 MB, 109 us at 3.35 TB/s; components and products that
    go through memory would add 1.07 GB, 320 us. Decoding takes about 12 integer operations per
    element (1.6 G, 24 us at 67 T operations/s) and the product 2 D, less for components that are
    zero (34 GFLOP, 35 us at 989 TFLOP/s).
    """
    HALF: tl.constexpr = DIM // 2
    pid = tl.program_id(0).to(tl.int64)
    h, n = pid % num_heads, pid // num_heads
    item = h * num_blocks + n
    t = tl.arange(0, 64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < HALF
    kept = tl.load(sizes + h * _PLANES).to(tl.int32)
    mids, ranks, mid_count = tl.full([], 0, tl.uint64), t, 0
    if REFINED:
        mids = tl.load(mid_masks + item).to(tl.uint64)
        ranks = rank_of(mids, t)
        rows += tl.load(starts + n * num_heads + h)
        mid_count = tl.load(counts + h).to(tl.int32)
        kept = tl.maximum(kept, mid_count)
    inverse += h * DIM * DIM
    low = tl.zeros([64, COLUMNS], tl.float32)
    high = tl.zeros([64, COLUMNS], tl.float32)
    for first in range(0, kept, _DEPTH):
        c = first + tl.arange(0, _DEPTH)
        width = tl.load(widths + h * DIM + c).to(tl.int32)
        y = read_components(
            words + n * num_words, offsets + h * _PLANES, coefficients, fine, rows, mids, ranks,
            mid_count, width, c, t, REFINED,
        ).to(inverse.dtype.element_ty)  # fmt: skip
        at = inverse + (c * DIM)[:, None] + column[None, :]
        row_low = tl.load(at, mask=inside[None, :], other=0.0)
        row_high = tl.load(at + HALF, mask=inside[None, :], other=0.0)
        low = tl.dot(y, row_low, low, input_precision="ieee")
        high = tl.dot(y, row_high, high, input_precision="ieee")
    of_base = tl.load(base + item).to(tl.uint64)
    is_base = has_token(of_base, t)[:, None]
    is_planed = has_token(of_base | tl.load(mid + item).to(tl.uint64), t)[:, None]
    is_escape = is_planed
    mean += h * DIM
    if SHIFTED:
        shift += item * DIM
    if ESCAPED:
        of_escape = tl.load(escape + item).to(tl.uint64)
        is_escape, ranks = has_token(of_escape, t)[:, None], rank_of(of_escape, t)
        escape_rows += tl.load(escape_starts + n * num_heads + h) * DIM
    low = _finish(
        low, mean, shift, escape_rows, column, inside, is_planed, is_base, is_escape, ranks,
        DIM, SHIFTED, ESCAPED,
    )  # fmt: skip
    high = _finish(
        high, mean, shift, escape_rows, column + HALF, inside, is_planed, is_base, is_escape,
        ranks, DIM, SHIFTED, ESCAPED,
    )  # fmt: skip
    cell = (t * DIM)[:, None] + column[None, :]
    if TURNED:
        angle = n * 64 * DIM
        turn_cos = tl.load(cos + angle + cell, mask=inside[None, :], other=0.0)
        turn_sin = tl.load(sin + angle + cell, mask=inside[None, :], other=0.0)
        low, high = low * turn_cos - high * turn_sin, high * turn_cos + low * turn_sin
    to = out + item * 64 * DIM + cell
    tl.store(to, low.to(out.dtype.element_ty), mask=inside[None, :])
    tl.store(to + HALF, high.to(out.dtype.element_ty), mask=inside[None, :])


def _encode_case(dim: int) -> AotCase:
    strides = ("head_stride", "block_stride", "token_stride")
    kinds = dict.fromkeys(strides, "i64") | dict.fromkeys(("x", "forward", "y"), "*bf16")
    kinds |= {"widths": "*u8", "offsets": "*i64", "codes": "*u8", "words": "*i64"}
    kinds |= dict.fromkeys(("num_heads", "num_blocks", "num_words"), "i32")
    constants = {"DIM": dim, "PADDED": triton.next_power_of_2(dim)}
    fixed = {*constants, "channel_stride"}
    names = [name for name in _encode.arg_names if name not in fixed]
    return AotCase(
        f"encode_bf16_dim{dim}", _encode, {name: kinds.get(name, "*fp32") for name in names},
        constants, num_warps=_encode_warps(dim), max_registers=208, ones=("channel_stride",),
        divisible=strides,
    )  # fmt: skip


def _expand_case(dim: int) -> AotCase:
    longs = ("words", "offsets", "sizes", "mid_masks", "starts", "counts", "base", "mid", "escape")
    kinds = dict.fromkeys((*longs, "escape_starts"), "*i64") | {"widths": "*u8", "rows": "*u8"}
    kinds |= {"inverse": "*bf16", "out": "*bf16"}
    kinds |= dict.fromkeys(("num_heads", "num_blocks", "num_words"), "i32")
    constants: dict[str, object] = {"DIM": dim, "COLUMNS": _columns(dim)}
    constants |= dict.fromkeys(("REFINED", "SHIFTED", "ESCAPED", "TURNED"), True)
    names = [name for name in _expand.arg_names if name not in constants]
    types = {name: kinds.get(name, "*fp32") for name in names}
    return AotCase(
        f"expand_bf16_dim{dim}", _expand, types, constants, num_warps=_warps(dim), max_registers=208
    )


AOT = tuple(case(dim) for case in (_encode_case, _expand_case) for dim in (64, 128))
