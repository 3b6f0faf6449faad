"""Decode attention over compressed blocks as they lie in memory, without expanding them.

One layer, one new token. Scores and weighted sums are taken in the coordinates that the codes are
in, so a plane of sign bits costs one masked addition per bit and query head; the transform is
applied to queries and outputs, never to keys and values. A block may stand at any position: keys
were turned by RoPE of (token index mod 64) only, so the query is turned back by the position of the
block's first token. Partial results carry the logarithm of their softmax sum, so that
``merge_attention`` puts them together with each other and with ``attend_window``.

Not covered: soft-capped scores, several new tokens at once, masks beyond the token classes.

Legend: N blocks, H KV heads, G query heads per KV head, D head_dim, T = 64 tokens of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.sign_codes import MAX_WIDTH, base_levels, fine_levels
from kvstrata.kernels.token_masks import to_flags
from kvstrata.kernels.value_bias import ValueBias, decode_value_bias

BLOCK_TOKENS = 64
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ABSENT = -1
# Columns of a block's offsets: for keys, then for values at + SIDE_FIELDS, then the biases.
WORDS, MASKS, MID, SCALES, CODES, SIDE_FIELDS = range(6)
BIAS_STEPS, BIAS_CODES, NUM_FIELDS = 10, 11, 12
ESCAPE_ROWS, MID_ROWS = 0, 1

Attention = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class SideTables:
    """The tables of keys or of values of one layer: x = (y * scale) @ inverse + mean.

    Attributes:
        mean: float32 (H, D), D a multiple of 16.
        scale: float32 (H, D), standard deviation of each component.
        inverse: float32 (H, D, D).
        layout: Bits of each component.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    inverse: torch.Tensor
    layout: PlaneLayout

    def __post_init__(self) -> None:
        """Raise ValueError for tables that do not belong together."""
        heads, head_dim = self.layout.num_heads, self.layout.dim
        if head_dim % 16:
            raise ValueError(f"head_dim must be a multiple of 16, not {head_dim}")
        for name, shape in (
            ("mean", (heads, head_dim)),
            ("scale", (heads, head_dim)),
            ("inverse", (heads, head_dim, head_dim)),
        ):
            table = getattr(self, name)
            if table.shape != shape or table.dtype != torch.float32:
                raise ValueError(
                    f"{name} must be float32 {shape}, not {table.dtype} {tuple(table.shape)}"
                )

    @cached_property
    def word_starts(self) -> torch.Tensor:
        """First word of each head, and the number of words in all: int64 (H + 1,)."""
        return torch.nn.functional.pad(self.layout.words_per_head.cumsum(0), (1, 0))

    @cached_property
    def projection(self) -> torch.Tensor:
        """What turns a row q into q . (dx / dy), for components that have codes: (H, D, R)."""
        kept = self.layout.num_kept(refined=True)
        return (self.scale[..., None] * self.inverse).mT[..., :kept].contiguous()


@dataclass(frozen=True, eq=False)
class BlockPages:
    """Compressed blocks of one layer, in the bytes that came from the store.

    ``offsets`` names where in the arena each part of each block starts, so parts may lie anywhere:
    a worker keeps the segments that it received and appends rows. The columns, for keys at 0 and
    for values at ``SIDE_FIELDS``:

    - WORDS: uint64 bit planes, head after head, plane after plane; bit t is token t
    - MASKS: uint64 escape masks of all heads, then mid masks; both bits set mean dropped
    - MID: quarter codes of mid tokens, or ABSENT for a BASE read; two bit rows per token
    - SCALES: bf16 scale of each escape;  CODES: int8 (escapes, D), in Hadamard coordinates

    and BIAS_STEPS, uint8 (H,); BIAS_CODES, uint8 (H, D / 2). Rows lie by head, then token. WORDS
    and MASKS start at multiples of 8, SCALES of 2. Everything is checked when this is made.

    Attributes:
        arena: uint8, one dimension, contiguous.
        offsets: int64 (N, NUM_FIELDS), on the CPU.
        num_tokens: int64 (N,), tokens in each block, 1 to 64, on the CPU.
        keys: The tables that the keys were coded with.
        values: The same of the values.
    """

    arena: torch.Tensor
    offsets: torch.Tensor
    num_tokens: torch.Tensor
    keys: SideTables
    values: SideTables

    def __post_init__(self) -> None:
        """Raise ValueError unless every part lies within the arena, by the masks' own counts."""
        if self.arena.dtype != torch.uint8 or self.arena.ndim != 1:
            raise ValueError("the arena must be uint8 with one dimension")
        if not self.arena.is_contiguous() or self.arena.data_ptr() % 8:
            raise ValueError("the arena must be contiguous and start at a multiple of 8 bytes")
        if self.offsets.dtype != torch.int64 or self.offsets.shape[1:] != (NUM_FIELDS,):
            raise ValueError(f"offsets must be int64 (blocks, {NUM_FIELDS})")
        if self.num_tokens.dtype != torch.int64 or self.num_tokens.shape != self.offsets.shape[:1]:
            raise ValueError("num_tokens must be int64 (blocks,)")
        if ((self.num_tokens < 1) | (self.num_tokens > BLOCK_TOKENS)).any():
            raise ValueError(f"a block holds 1 to {BLOCK_TOKENS} tokens")
        if self.keys.mean.shape != self.values.mean.shape:
            raise ValueError("the tables of keys and values have different shapes")
        heads, head_dim = self.keys.mean.shape
        for at in (self.offsets[:, MASKS], self.offsets[:, SIDE_FIELDS + MASKS]):
            self._check_part("masks", at, 16 * heads, 8)
        for side, tables in enumerate((self.keys, self.values)):
            at = self.offsets[:, side * SIDE_FIELDS :]
            escapes, mid_bytes = self.starts[:, side, :, -1].unbind(1)
            present = at[:, MID] != ABSENT
            self._check_part("words", at[:, WORDS], 8 * int(tables.word_starts[-1]), 8)
            self._check_part("mid", at[present, MID], mid_bytes[present], 1)
            self._check_part("scales", at[:, SCALES], 2 * escapes, 2)
            self._check_part("codes", at[:, CODES], head_dim * escapes, 1)
        self._check_part("bias steps", self.offsets[:, BIAS_STEPS], heads, 1)
        self._check_part("bias codes", self.offsets[:, BIAS_CODES], heads * head_dim // 2, 1)

    def _check_part(
        self, name: str, starts: torch.Tensor, num_bytes: torch.Tensor | int, alignment: int
    ) -> None:
        bad = (starts < 0) | (starts > self.arena.numel() - num_bytes) | (starts % alignment != 0)
        if bad.any():
            at = int(starts[bad][0])
            raise ValueError(
                f"{name} of a block at byte {at} do not fit the arena of {self.arena.numel()} "
                f"bytes, or {at} is not a multiple of {alignment}"
            )

    @property
    def masks(self) -> torch.Tensor:
        """Bits of the masks: bool (N, 2 sides, 2 (escape, mid), H, T), on the CPU."""
        heads = self.keys.mean.shape[0]
        at = self.offsets[:, [MASKS, SIDE_FIELDS + MASKS], None] + torch.arange(16 * heads)
        packed = self.arena[at.to(self.arena.device)].cpu()
        return to_flags(packed.view(torch.int64)).view(-1, 2, 2, heads, BLOCK_TOKENS)

    @cached_property
    def starts(self) -> torch.Tensor:
        """Rows in CODES and bytes in MID before each head: int64 (N, 2 sides, 2, H + 1), CPU."""
        escape, mid = self.masks.unbind(2)
        counts = torch.stack([t.layout.mid_row_bytes.cpu() for t in (self.keys, self.values)])
        mid_bytes = (mid & ~escape).sum(-1) * counts
        sizes = torch.stack([(escape & ~mid).sum(-1), mid_bytes], 2)
        return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0))

    def take(self, at: int, num_bytes: int) -> torch.Tensor:
        """Return ``num_bytes`` of the arena from byte ``at`` on."""
        return self.arena[at : at + num_bytes]


class Turns(NamedTuple):
    """The rotation to each block's first token, at its absolute position.

    Attributes:
        cos: float32 (N, rotary_dim), as the model's rotary embedding gives it for these positions.
        sin: The same.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def attend_blocks(
    queries: torch.Tensor, pages: BlockPages, turns: Turns, scaling: float
) -> Attention:
    """Return attention of one new token over compressed blocks, and its softmax sum.

    The largest temporary is the queries once per block: G / 64 of the expanded keys.

    Args:
        queries: (H * G, D), post-RoPE at the token's position; bf16, fp16, fp32. Query head i reads
            KV head i // G.
        pages: The blocks. A token that is dropped from keys or from values is not read. Mid tokens
            of a block without MID have their base values.
        turns: Rotation to the first token of each block.
        scaling: Factor on the dot products before the softmax.

    Returns:
        Output float32 (H * G, D), and lse float32 (H * G,), the natural logarithm of the sum of
        exp(score). A head without a token has output 0 and lse -inf.

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together.
    """
    _check(queries, pages, turns)
    backend = backend_of(queries, pages.arena, pages.keys.mean, pages.values.mean, *turns)
    if pages.offsets.shape[0] == 0:
        out = torch.zeros(queries.shape, device=queries.device)
        return out, out.new_full(queries.shape[:1], float("-inf"))
    if backend == "numba":
        from kvstrata.kernels.attend_blocks_numba import attend_blocks_numba

        return attend_blocks_numba(queries, pages, turns, scaling)
    if backend == "triton":
        from kvstrata.kernels.attend_blocks_triton import attend_blocks_triton

        return attend_blocks_triton(queries, pages, turns, scaling)
    return attend_blocks_reference(queries, pages, turns, scaling)


def attend_blocks_reference(
    queries: torch.Tensor, pages: BlockPages, turns: Turns, scaling: float
) -> Attention:
    """Return ``attend_blocks`` by expanding every block first."""
    heads, head_dim = pages.keys.mean.shape
    keys, values = expand_blocks(pages)
    grouped = queries.float().reshape(heads, 1, -1, head_dim)
    scores = scaling * (turn_back(grouped, turns) @ keys.mT).transpose(1, 2).flatten(2)
    is_valid = torch.arange(BLOCK_TOKENS) < pages.num_tokens[:, None]
    is_read = is_valid[:, None] & ~pages.masks.all(2).any(1)
    hidden = ~is_read.transpose(0, 1).flatten(1)[:, None].to(scores.device)
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    # What is hidden may be anything, so it must not be multiplied by its weight of zero.
    seen = values.flatten(1, 2).masked_fill(hidden.mT, 0.0)
    return (weights @ seen).view(queries.shape), lse.flatten()


def expand_blocks(pages: BlockPages) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys, in block-relative coordinates, and values: float32 (H, N, T, D).

    Dropped tokens and what lies beyond a block's tokens are not meaningful.
    """
    heads, head_dim = pages.keys.mean.shape
    shape = (2, heads, pages.offsets.shape[0], BLOCK_TOKENS, head_dim)
    rows = torch.empty(shape, device=pages.arena.device)
    masks = pages.masks.to(rows.device)
    for side, tables in enumerate((pages.keys, pages.values)):
        for block in range(shape[2]):
            for head in range(heads):
                escape, mid = masks[block, side, :, head]
                y = _decode_components(pages, side, block, head, mid & ~escape)
                offset = tables.mean[head].expand(BLOCK_TOKENS, -1)
                if side == 1:
                    offset = offset + (~escape & ~mid)[:, None] * (
                        _bias(pages, block, head) @ tables.inverse[head]
                    )
                row = (y * tables.scale[head]) @ tables.inverse[head] + offset
                row[escape & ~mid] = _decode_escapes(pages, side, block, head)
                rows[side, head, block] = row
    return rows[0], rows[1]


def _decode_components(
    pages: BlockPages, side: int, block: int, head: int, mid: torch.Tensor
) -> torch.Tensor:
    """Return one head's codes as unit Gaussian components, float32 (T, D)."""
    tables = (pages.keys, pages.values)[side]
    at = pages.offsets[block, side * SIDE_FIELDS :]
    first, stop = tables.word_starts[head : head + 2].tolist()
    words = pages.take(int(at[WORDS]) + 8 * first, 8 * (stop - first)).view(torch.int64)
    widths, sizes = tables.layout.widths[head].long(), tables.layout.plane_sizes[head].tolist()
    codes = torch.zeros(widths.numel(), BLOCK_TOKENS, dtype=torch.int64, device=widths.device)
    for plane, size in zip(to_flags(words).split(sizes), sizes, strict=True):
        codes[:size] = 2 * codes[:size] + plane
    every = range(MAX_WIDTH + 1)
    y = torch.cat([base_levels(w) for w in every]).to(codes.device)[
        (2**widths - 1)[:, None] + codes
    ]
    count, num_rows = int(tables.layout.mid_counts[head]), int(mid.sum())
    if int(at[MID]) != ABSENT and count and num_rows:
        start = int(at[MID]) + int(pages.starts[block, side, 1, head])
        rows = pages.take(start, num_rows * count // 4).view(num_rows, 2, -1)
        bits = rows[..., None] >> torch.arange(8, device=rows.device) & 1
        high, low = bits.flatten(-2).long().unbind(1)
        levels = torch.cat([fine_levels(w) for w in every]).to(codes.device)
        starts = 4 * (2 ** widths[:count, None] - 1)
        y[:count, mid] = levels[starts + 4 * codes[:count, mid] + (2 * high + low).mT]
    return y.mT


def _decode_escapes(pages: BlockPages, side: int, block: int, head: int) -> torch.Tensor:
    head_dim = pages.keys.mean.shape[1]
    at = pages.offsets[block, side * SIDE_FIELDS :].tolist()
    first, stop = pages.starts[block, side, 0, head : head + 2].tolist()
    scale = pages.take(at[SCALES] + 2 * first, 2 * (stop - first)).view(torch.bfloat16)
    codes = pages.take(at[CODES] + head_dim * first, head_dim * (stop - first)).view(torch.int8)
    rows = codes.view(-1, head_dim).float() * scale.float()[:, None]
    return rows @ hadamard(head_dim).to(rows.device)


def _bias(pages: BlockPages, block: int, head: int) -> torch.Tensor:
    """Return the bias of one head's base tokens, in components times their scale."""
    half = pages.keys.mean.shape[1] // 2
    step = pages.take(int(pages.offsets[block, BIAS_STEPS]) + head, 1)
    codes = pages.take(int(pages.offsets[block, BIAS_CODES]) + head * half, half)
    return decode_value_bias(ValueBias(codes[None, None], step[None]))[0, 0]


@cache
def bias_steps() -> torch.Tensor:
    """Return float32 (256,): the step that each byte of BIAS_STEPS means."""
    ones = torch.full((1, 256, 1), 8 + 1, dtype=torch.uint8)
    return decode_value_bias(ValueBias(ones, torch.arange(256, dtype=torch.uint8)[None]))[0, :, 0]


def attend_window(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> Attention:
    """Return attention of one new token over uncompressed keys, in the form of ``attend_blocks``.

    Args:
        queries: (H * G, D), post-RoPE; bf16, fp16, fp32.
        keys: (H, n, D), post-RoPE; n may be 0.
        values: As ``keys``.
        scaling: Factor on the dot products before the softmax.

    Returns:
        Output float32 (H * G, D) and lse float32 (H * G,), as ``attend_blocks``.

    Raises:
        ValueError: The shapes do not belong together.
    """
    if keys.ndim != 3 or keys.shape != values.shape or 0 in (keys.shape[0], keys.shape[2]):
        raise ValueError(
            f"keys and values must both be (heads, n, D), not {tuple(keys.shape)} and "
            f"{tuple(values.shape)}"
        )
    heads, _, head_dim = keys.shape
    if queries.ndim != 2 or queries.shape[1] != head_dim or queries.shape[0] % heads:
        raise ValueError(
            f"queries must be (a multiple of {heads}, {head_dim}), not {tuple(queries.shape)}"
        )
    rows = queries.reshape(heads, -1, head_dim).to(keys.dtype)
    scores = (rows @ keys.mT).float() * scaling
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(values.dtype)  # no key: no column, not NaN
    return (weights @ values).float().view(queries.shape), lse.flatten()


def merge_attention(parts: Sequence[Attention]) -> Attention:
    """Return the attention over all that the parts read, which must be disjoint tokens.

    Args:
        parts: At least one (output (heads, D), lse (heads,)), float32; lse -inf read nothing.

    Raises:
        ValueError: There are no parts.
    """
    if not parts:
        raise ValueError("no parts to merge: attention over no token is zeros with lse -inf")
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    shares = (lses - total.masked_fill(total == float("-inf"), 0.0)).exp()
    return (torch.stack([out for out, _ in parts]) * shares[..., None]).sum(0), total


def turn_back(queries: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Return queries (H, 1, G, D) turned by minus each block's position: (H, N, G, D).

    Rotary pairs are elements i and i + rotary_dim / 2, as in transformers' Llama.
    """
    cos, sin = (table.float()[:, None, :] for table in turns)
    turning, rest = queries.split([cos.shape[-1], queries.shape[-1] - cos.shape[-1]], -1)
    low, high = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([high, -low], -1) * sin
    return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], -1)


def _check(queries: torch.Tensor, pages: BlockPages, turns: Turns) -> None:
    heads, head_dim = pages.keys.mean.shape
    if queries.dtype not in FLOATS:
        raise ValueError(f"queries must be bf16, fp16 or fp32, not {queries.dtype}")
    if queries.ndim != 2 or queries.shape[1] != head_dim or queries.shape[0] % heads:
        raise ValueError(
            f"queries must be (a multiple of {heads}, {head_dim}), not {tuple(queries.shape)}"
        )
    cos, sin = turns
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] != pages.offsets.shape[0]:
        raise ValueError(
            f"cos and sin must be ({pages.offsets.shape[0]}, rotary_dim), not "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.shape[1] % 2 or cos.shape[1] > head_dim:
        raise ValueError(f"rotary_dim must be even and at most {head_dim}, not {cos.shape[1]}")
