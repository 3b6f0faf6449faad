# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Flags of 64 tokens to a word and back on a GPU, and the bits of a word counted."""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase

_WORDS, _COUNTS = 64, 256  # of a program


@triton.jit
def pack_flags_kernel(flags, masks, num_words, WORDS: tl.constexpr):
    """Write int64 words of flags, uint8 (num_words, 64), 0 or 1.

    Roofline: reads 64 bytes and writes 8 per word, 128 operations. Classes of 128k tokens of 8
    heads, 16,384 words: 1.2 MB, 0.4 us at 3.35 TB/s, so it is bound by its launch.
    """
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    t = tl.arange(0, 64)
    inside = word < num_words
    at = flags + word[:, None] * 64 + t[None, :]
    flag = tl.load(at, mask=inside[:, None], other=0).to(tl.int64)
    tl.store(masks + word, tl.sum(flag << t.to(tl.int64)[None, :], 1), mask=inside)


@triton.jit
def unpack_flags_kernel(masks, flags, num_words, WORDS: tl.constexpr):
    """Write flags, uint8 (num_words, 64), of int64 words. Roofline: as ``pack_flags_kernel``."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    t = tl.arange(0, 64)
    inside = word < num_words
    mask = tl.load(masks + word, mask=inside, other=0)
    flag = (mask[:, None] >> t.to(tl.int64)[None, :]) & 1
    tl.store(flags + word[:, None] * 64 + t[None, :], flag.to(tl.uint8), mask=inside[:, None])


@triton.jit
def count_bits_kernel(masks, counts, num_words, WORDS: tl.constexpr):
    """Write int64 counts of the bits of int64 words.

    Roofline: 16 bytes and 12 operations per word. 16,384 words: 262 kB, 0.1 us at 3.35 TB/s.
    """
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = word < num_words
    x = tl.load(masks + word, mask=inside, other=0).to(tl.uint64, bitcast=True)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = (x + (x >> 32)) & 0x7F
    tl.store(counts + word, x.to(tl.int64), mask=inside)


def to_mask_triton(flags: torch.Tensor) -> torch.Tensor:
    """Return what ``to_mask_reference`` returns."""
    masks = torch.empty(flags.shape[:-1], dtype=torch.int64, device=flags.device)
    if num_words := masks.numel():
        pack_flags_kernel[(triton.cdiv(num_words, _WORDS),)](
            flags.contiguous().view(torch.uint8), masks, num_words, _WORDS
        )
    return masks


def to_flags_triton(masks: torch.Tensor) -> torch.Tensor:
    """Return what ``to_flags_reference`` returns."""
    flags = torch.empty((*masks.shape, 64), dtype=torch.bool, device=masks.device)
    if num_words := masks.numel():
        unpack_flags_kernel[(triton.cdiv(num_words, _WORDS),)](
            masks.contiguous(), flags.view(torch.uint8), num_words, _WORDS
        )
    return flags


def count_tokens_triton(masks: torch.Tensor) -> torch.Tensor:
    """Return what ``count_tokens_reference`` returns."""
    masks = masks.contiguous()
    counts = torch.empty_like(masks)
    if num_words := masks.numel():
        count_bits_kernel[(triton.cdiv(num_words, _COUNTS),)](masks, counts, num_words, _COUNTS)
    return counts


_WORD_TYPES = {"masks": "*i64", "num_words": "i32"}
AOT = (
    AotCase("pack", pack_flags_kernel, _WORD_TYPES | {"flags": "*u8"}, {"WORDS": _WORDS}),
    AotCase(
        "unpack", unpack_flags_kernel, _WORD_TYPES | {"flags": "*u8"}, {"WORDS": _WORDS},
        wide_loads=False,  # 64 flags come of one word
    ),
    AotCase(
        "count", count_bits_kernel, _WORD_TYPES | {"counts": "*i64"}, {"WORDS": _COUNTS},
        wide_loads=False,  # two words per thread, at most
    ),
)  # fmt: skip
