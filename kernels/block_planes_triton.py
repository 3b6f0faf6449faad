# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Bit planes on a GPU: one program packs, or unpacks, 64 tokens of some components.

Neighbouring threads hold neighbouring components, so tokens are read and written in whole lines and
the words of a plane too. Mid rows and biases take the reference.
"""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.sign_codes import (
    COEFFICIENTS,
    GRID_SIZE,
    MAX_WIDTH,
    base_levels,
    code_table,
)
from kvstrata.kernels.token_masks import TOKENS

_GRID, _PLANES, _LEVELS = tl.constexpr(GRID_SIZE), tl.constexpr(MAX_WIDTH), tl.constexpr(64)
_BLOCK = 16


def _coefficients(device: torch.device) -> torch.Tensor:
    rows = [[*c, *[0.0] * (MAX_WIDTH - len(c))] for c in COEFFICIENTS]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _levels(device: torch.device) -> torch.Tensor:
    table = torch.zeros(MAX_WIDTH + 1, 1 << MAX_WIDTH)
    for width in range(MAX_WIDTH + 1):
        table[width, : 1 << width] = base_levels(width)
    return table.to(device)


def encode_block_planes_triton(
    y: torch.Tensor, layout: PlaneLayout, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``encode_block_planes_reference`` returns."""
    heads, blocks, _, dim = y.shape
    words = torch.empty((blocks, layout.num_words), dtype=torch.int64, device=y.device)
    error = torch.empty(y.shape[:3], dtype=torch.float32, device=y.device)
    codes = torch.stack([code_table(w) for w in range(MAX_WIDTH + 1)]).to(y.device)
    if blocks:
        _encode[(blocks, heads)](
            y.contiguous(), weights.contiguous(), layout.widths.contiguous(), layout.word_offsets,
            codes, _levels(y.device), words, error, dim, layout.num_words, _BLOCK,
        )  # fmt: skip
    return words, error


@triton.jit
def _encode(
    y, weights, widths, offsets, codes, levels, words, error, dim, num_words, size: tl.constexpr
):
    """Encode one head of one block.

    Roofline: reads 2 bytes of bf16 and writes width / 8 per element, 20 operations and two reads
    of tables in cache. Llama-3-8B, one layer's keys of 128k tokens: 268 MB + 20 MB, 86 us at
    3.35 TB/s.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    t = tl.arange(0, 64)
    row = (h * tl.num_programs(0) + n) * 64 + t
    loss = tl.zeros([64], tl.float32)
    for start in range(0, dim, size):
        c = start + tl.arange(0, size)
        inside = c < dim
        width = tl.load(widths + h * dim + c, mask=inside, other=0).to(tl.int32)
        value = tl.load(y + row[:, None] * dim + c[None, :], mask=inside[None, :], other=0.0)
        value = value.to(tl.float32)
        cell = tl.floor(value * 128.0 + _GRID // 2)
        cell = tl.minimum(tl.maximum(cell, 0.0), _GRID - 1.0).to(tl.int32)
        code = tl.load(codes + width[None, :] * _GRID + cell).to(tl.int32) >> 2
        rest = value - tl.load(levels + width[None, :] * _LEVELS + code)
        weight = tl.load(weights + h * dim + c, mask=inside, other=0.0)
        loss += tl.sum(weight[None, :] * rest * rest, 1)
        for plane in tl.static_range(_PLANES):
            present = width > plane
            shift = tl.maximum(width - 1 - plane, 0)
            bits = ((code >> shift[None, :]) & 1).to(tl.int64) << t[:, None].to(tl.int64)
            place = n * num_words + tl.load(offsets + h * _PLANES + plane) + c
            tl.store(words + place, tl.sum(bits, 0), mask=present)
    tl.store(error + row, loss)


def decode_base_triton(
    words: torch.Tensor, layout: PlaneLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Return what ``decode_block_planes_reference`` returns without mid rows."""
    blocks, kept = words.shape[0], layout.num_kept(refined=False)
    y = torch.empty((layout.num_heads, blocks * TOKENS, kept), dtype=dtype, device=words.device)
    if blocks:
        _decode[(blocks, layout.num_heads, triton.cdiv(kept, _BLOCK))](
            words.contiguous(), layout.widths.contiguous(), layout.word_offsets,
            _coefficients(words.device), y, layout.dim, layout.num_words, kept, _BLOCK,
        )  # fmt: skip
    return y


@triton.jit
def _decode(words, widths, offsets, coefficients, y, dim, num_words, kept, size: tl.constexpr):
    """Decode some components of one head of one block.

    Roofline: reads width / 8 bytes and writes 2 bytes of bf16 per element, 4 operations per bit.
    Llama-3-8B, one layer's keys of 128k tokens: 20 MB + 268 MB, 86 us at 3.35 TB/s.
    """
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c, t = tl.program_id(2) * size + tl.arange(0, size), tl.arange(0, 64)
    width = tl.load(widths + h * dim + c, mask=c < kept, other=0).to(tl.int32)
    value = tl.zeros([64, size], tl.float32)
    for plane in tl.static_range(_PLANES):
        present = width > plane
        place = n * num_words + tl.load(offsets + h * _PLANES + plane) + c
        word = tl.load(words + place, mask=present, other=0)
        step = tl.load(coefficients + width * _PLANES + plane)
        bit = (word[None, :] >> t[:, None].to(tl.int64)) & 1
        value += tl.where(bit != 0, step[None, :], -step[None, :])
    row = (h * tl.num_programs(0) + n) * 64 + t
    place = row[:, None] * kept + c[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=(c < kept)[None, :])


_ENCODE_TYPES = {
    "y": "*bf16", "weights": "*fp32", "widths": "*u8", "offsets": "*i64", "codes": "*u8",
    "levels": "*fp32", "words": "*i64", "error": "*fp32", "dim": "i32", "num_words": "i32",
}  # fmt: skip
_DECODE_TYPES = {
    "words": "*i64", "widths": "*u8", "offsets": "*i64", "coefficients": "*fp32", "y": "*bf16",
    "dim": "i32", "num_words": "i32", "kept": "i32",
}  # fmt: skip
AOT = (
    AotCase("encode", _encode, _ENCODE_TYPES, {"size": _BLOCK}, divisible=("dim",)),
    AotCase(
        "decode", _decode, _DECODE_TYPES, {"size": _BLOCK}, divisible=("dim", "kept"),
        wide_loads=False,
    ),
)  # fmt: skip
