"""Contests of `attend`: one new token over cached ones, for several lengths.

Ours reads balanced blocks as they are stored. Beside it: SDPA over bf16, as the engine calls it and
with ``enable_gqa``, and expanding the blocks before SDPA. Calls go through several layers, so that
no implementation finds its keys in the processor's cache; times are of one layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from kernel_calibrated import Side, Stored
from kernel_rounds import Contest, Entry
from kernel_shapes import KEY_DECAY, VALUE_DECAY, Shape, tables

from kvstrata.engine.attention import attend
from kvstrata.kernels.attend_blocks import (
    attend_blocks,
)
from kvstrata.kernels.block_pages import (
    BIAS_CODES,
    BIAS_STEPS,
    CODES,
    MASKS,
    MID,
    NUM_FIELDS,
    SCALES,
    SIDE_FIELDS,
    WORDS,
    BlockPages,
    BlockRows,
    SideTables,
    Turns,
)
from kvstrata.kernels.component_basis import expand
from kvstrata.kernels.escape_rows import EscapeRows
from kvstrata.kernels.mid_rows import MidRows
from kvstrata.kernels.token_masks import TokenClasses
from kvstrata.kernels.value_bias import ValueBias
from kvstrata.protos.identity import BLOCK_TOKENS

TOKENS = (512, 2048, 8192, 32768)
DISTINCT_BLOCKS = 64  # longer contexts repeat them at other addresses
COLD_BYTES = 200e6
MIN_LAYERS, MAX_LAYERS = 2, 30
ALIGNMENT = 64
SDPA = ("sdpa", "sdpa, gqa")


@dataclass(frozen=True)
class Layer:
    """One layer's stored blocks, for expansion and for reading in place."""

    sides: tuple[Side, Side]
    classes: list[TokenClasses]
    stored: list[Stored]
    pages: BlockPages
    turns: Turns

    @classmethod
    def of(cls, shape: Shape, blocks: int) -> "Layer":
        """Return a layer of ``blocks`` blocks, a multiple of 64 or less than that."""
        distinct = min(blocks, DISTINCT_BLOCKS)
        sides = (
            Side("K", tables(shape, KEY_DECAY, 1), distinct),
            Side("V", tables(shape, VALUE_DECAY, 1), distinct),
        )
        stored = [side.encode() for side in sides]
        times = blocks // distinct
        return cls(
            sides,
            [TokenClasses(*(mask.repeat(1, times) for mask in side.classes)) for side in sides],
            [_repeated(one, times) for one in stored],
            _pages(sides, stored, times),
            _turns(blocks, shape.dim),
        )

    def expanded(self) -> list[torch.Tensor]:
        """Return bf16 keys, turned to their positions, and values: (H, N * 64, D)."""
        rotation = tuple(table.repeat_interleave(BLOCK_TOKENS, 0) for table in self.turns)
        return [
            expand(
                stored.words,
                side.basis,
                classes,
                mid=stored.mid,
                bias=stored.bias,
                escapes=stored.escapes,
                rotation=rotation if side.name == "K" else None,
            ).flatten(1, 2)
            for side, classes, stored in zip(self.sides, self.classes, self.stored, strict=True)
        ]

    def copies(self, count: int) -> list[BlockPages]:
        """Return the pages at ``count`` places in memory."""
        p = self.pages
        return [
            BlockPages(p.arena.clone(), p.blocks, p.offsets, p.keys, p.values) for _ in range(count)
        ]


def contests(shape: Shape, lengths: Sequence[int] = TOKENS) -> Iterator[Contest]:
    """Yield a contest per length."""
    for tokens in lengths:
        yield contest(shape, tokens)


def contest(shape: Shape, tokens: int) -> Contest:
    """Return the contest of one length, a multiple of 64 tokens."""
    layer = Layer.of(shape, tokens // BLOCK_TOKENS)
    size = 4 * shape.kv_heads * tokens * shape.dim
    count = int(max(MIN_LAYERS, min(MAX_LAYERS, COLD_BYTES // size)))
    queries = torch.randn(shape.heads, shape.dim).bfloat16()
    row = queries[:, None]
    scaling, every = shape.dim**-0.5, layer.copies(count)
    cached = [
        [torch.randn(shape.kv_heads, tokens, shape.dim).bfloat16() for _ in "KV"]
        for _ in range(count)
    ]

    def ours() -> None:
        for pages in every:
            attend_blocks(queries, pages, layer.turns, scaling)

    def expanded() -> None:
        for _ in range(count):
            attend(row, *layer.expanded(), scaling, None)

    def sdpa() -> None:
        for pair in cached:
            attend(row, *pair, scaling, None)

    def sdpa_gqa() -> None:
        for keys, values in cached:
            F.scaled_dot_product_attention(
                row[None], keys[None], values[None], scale=scaling, enable_gqa=True
            )

    whole = count * size
    bits = 16 * layer.pages.arena.numel() / size
    return Contest(
        "attend",
        f"{shape.name} H{shape.kv_heads} G{shape.heads // shape.kv_heads} D{shape.dim} "
        f"{bits:.2f} bits",
        [
            Entry("ours", ours, whole, SDPA[:1], is_ours=True),
            Entry("expand, sdpa", expanded, whole, SDPA[:1]),
            Entry(SDPA[0], sdpa, whole, SDPA[:1]),
            Entry(SDPA[1], sdpa_gqa, whole, SDPA[:1]),
        ],
        tokens,
        count,
    )


def _turns(blocks: int, dim: int) -> Turns:
    frequencies = 1e4 ** (-torch.arange(0, dim, 2) / dim)
    angles = (torch.arange(blocks) * BLOCK_TOKENS)[:, None] * frequencies
    return Turns(*(table.repeat(1, 2) for table in (angles.cos(), angles.sin())))


def _pages(sides: Sequence[Side], stored: Sequence[Stored], times: int) -> BlockPages:
    """Return pages of the blocks, one after the other, ``times`` times over."""
    parts: list[torch.Tensor] = []
    blocks = stored[0].words.shape[0]
    offsets = torch.full((blocks, NUM_FIELDS), -1, dtype=torch.int32)
    end = 0

    def put(part: torch.Tensor, alignment: int = 8) -> int:
        nonlocal end
        parts.append(part.new_zeros(-end % alignment, dtype=torch.uint8))
        parts.append(part.contiguous().view(torch.uint8).flatten())
        start = end + parts[-2].numel()
        end = start + parts[-1].numel()
        return start

    for n in range(blocks):
        for number, (side, one) in enumerate(zip(sides, stored, strict=True)):
            at = offsets[n, number * SIDE_FIELDS :]
            at[WORDS] = put(one.words[n], ALIGNMENT if number == 0 else 8)
            at[MASKS] = put(torch.stack([side.classes.escape[:, n], side.classes.mid[:, n]]))
            at[MID] = put(_slice(one.mid.rows, one.mid.block_offsets, n))
            at[SCALES] = put(_slice(one.escapes.scales, one.escapes.block_offsets, n))
            at[CODES] = put(_slice(one.escapes.codes, one.escapes.block_offsets, n))
        bias = stored[1].bias
        assert bias is not None
        offsets[n, BIAS_STEPS], offsets[n, BIAS_CODES] = put(bias.scales[n]), put(bias.nibbles[n])
    put(torch.zeros(0), ALIGNMENT)
    arena = torch.cat(parts)
    starts = (arena.numel() * torch.arange(times)).repeat_interleave(blocks)
    keys, values = (
        SideTables(s.basis.mean, s.basis.deviation, _unit_inverse(s), s.layout) for s in sides
    )
    return BlockPages(
        arena.repeat(times),
        BlockRows(starts, torch.full((times * blocks,), BLOCK_TOKENS)),
        offsets.repeat(times, 1),
        keys,
        values,
    )


def _unit_inverse(side: Side) -> torch.Tensor:
    """Return the matrix of components times their deviation: ``ComponentBasis`` has it inside."""
    return side.basis.inverse / side.basis.deviation[..., None]


def _slice(rows: torch.Tensor, offsets: torch.Tensor, n: int) -> torch.Tensor:
    return rows[offsets[n] : offsets[n + 1]]


def _repeated(stored: Stored, times: int) -> Stored:
    mid, escapes, bias = stored.mid, stored.escapes, stored.bias
    return Stored(
        stored.words.repeat(times, 1),
        MidRows(
            mid.masks.repeat(1, times),
            mid.rows.repeat(times),
            _ends(mid.block_offsets, times),
        ),
        EscapeRows(
            escapes.masks.repeat(1, times),
            escapes.scales.repeat(times),
            escapes.codes.repeat(times, 1),
            _ends(escapes.block_offsets, times),
        ),
        bias and ValueBias(bias.nibbles.repeat(times, 1, 1), bias.scales.repeat(times, 1)),
    )


def _ends(offsets: torch.Tensor, times: int) -> torch.Tensor:
    """Return the ends of parts that come ``times`` times."""
    sizes = offsets.diff().repeat(times)
    return torch.cat([offsets[:1], sizes.cumsum(0)])
