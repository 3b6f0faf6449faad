"""The segments of calibrated blocks: what K and V hold, cut by block and layer, and back.

``calibrated.py`` has the layout. Heads of all layers are numbered as one: head h of layer l is
l * H + h, so that one kernel call serves the whole model.

Legend: L stored layers, H KV heads, N blocks, T block tokens (64), D head_dim, E escapes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.kernels.block_planes import MidRows, PlaneLayout
from kvstrata.kernels.escape_rows import EscapeRows
from kvstrata.kernels.token_masks import count_tokens
from kvstrata.kernels.value_bias import ValueBias
from kvstrata.methods.left_out import compact_segment, saved_bytes, spread_segment
from kvstrata.protos.frame import Buffer
from kvstrata.protos.identity import BLOCK_TOKENS

WORD_BYTES = 8
SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class StoredSide:
    """K or V of N blocks of all layers.

    Attributes:
        escape: int64 (L * H, N), one of the two masks that tell a token's class.
        mid: int64 (L * H, N), the other. A token in both is left out.
        words: int64 (N, W).
        escapes: Their rows.
        mid_rows: None if not read.
        bias: None for K.
    """

    escape: torch.Tensor
    mid: torch.Tensor
    words: torch.Tensor
    escapes: EscapeRows
    mid_rows: MidRows | None
    bias: ValueBias | None


class SegmentLayout:
    """Where everything lies in the segments of one profile and threshold."""

    def __init__(self, num_layers: int, keys: PlaneLayout, values: PlaneLayout) -> None:
        self.num_layers = num_layers
        self.sides = (keys, values)
        self.heads, self.dim = keys.num_heads // num_layers, keys.dim
        self._words = [_layer_ends(side.words_per_head, num_layers) for side in self.sides]
        rows = [side.words_per_head.view(num_layers, -1).numpy() for side in self.sides]
        self._words_per_head = [list(of_layer) for of_layer in zip(*rows, strict=True)]
        self._row_bytes = [
            side.mid_row_bytes.view(num_layers, -1, 1).numpy() for side in self.sides
        ]

    def fixed_sizes(self, layer: int) -> list[int]:
        """Return the bytes of masks, K words, V words, tags, bias codes and bias scales."""
        words = [ends[layer + 1] - ends[layer] for ends in self._words]
        return [
            4 * self.heads * WORD_BYTES,
            *(count * WORD_BYTES for count in words),
            BLOCK_TOKENS,
            self.heads * self.dim // 2,
            self.heads,
        ]

    def write(
        self, keys: StoredSide, values: StoredSide, tags: torch.Tensor
    ) -> tuple[list[list[bytes]], list[list[bytes]]]:
        """Return the BASE and the MID segments, [block][layer]; ``tags`` uint8 (L, N, T)."""
        sides = (keys, values)
        num_blocks = keys.words.shape[0]
        masks = self._by_layer(torch.stack([m for s in sides for m in (s.escape, s.mid)]))
        assert values.bias is not None
        nibbles = values.bias.nibbles.view(num_blocks, self.num_layers, -1)
        scales = values.bias.scales.view(num_blocks, self.num_layers, -1)
        escape_ends = [_ends(self._escape_counts(side.escapes.masks)) for side in sides]
        mid_ends = [
            _ends(self._mid_sizes(i, side.mid & ~side.escape)) for i, side in enumerate(sides)
        ]
        scales_of = [side.escapes.scales.view(torch.uint8).numpy() for side in sides]
        codes_of = [side.escapes.codes.numpy() for side in sides]
        rows_of = [_rows(side) for side in sides]
        base: list[list[bytes]] = [[] for _ in range(num_blocks)]
        mid: list[list[bytes]] = [[] for _ in range(num_blocks)]
        for layer in range(self.num_layers):
            words = [
                side.words[:, ends[layer] : ends[layer + 1]]
                for side, ends in zip(sides, self._words, strict=True)
            ]
            parts = [masks[layer], *words, tags[layer], nibbles[:, layer], scales[:, layer]]
            rows = torch.cat([p.contiguous().view(torch.uint8) for p in parts], 1).numpy()
            for n in range(num_blocks):
                at = n * self.num_layers + layer
                spans = [ends[at : at + 2].tolist() for ends in escape_ends]
                dense = rows[n].tobytes() + b"".join(
                    part[size * a : size * b].tobytes()
                    for size, arrays in ((SCALE_BYTES, scales_of), (1, codes_of))
                    for part, (a, b) in zip(arrays, spans, strict=True)
                )
                base[n].append(compact_segment(dense, self.words_per_head(layer)))
                mid[n].append(
                    b"".join(
                        part[ends[at] : ends[at + 1]].tobytes()
                        for part, ends in zip(rows_of, mid_ends, strict=True)
                    )
                )
        return base, mid

    def read(
        self, base: Sequence[Sequence[Buffer]], mid: Sequence[Sequence[Buffer]] | None
    ) -> tuple[StoredSide, StoredSide]:
        """Return what segments, [block][layer], hold.

        Raises:
            ValueError: A segment's size is not the one that its masks tell.
        """
        base = [
            [spread_segment(s, self.words_per_head(layer)) for layer, s in enumerate(segments)]
            for segments in base
        ]
        fixed = [self._read_fixed(base, layer) for layer in range(self.num_layers)]
        masks = self.read_masks(base)
        escape, marked = masks[0], masks[1]
        mid_masks = marked & ~escape
        counts = [self._escape_counts(escape[side] & ~marked[side]) for side in (0, 1)]
        rows = self._read_escapes(base, counts)
        refined = None if mid is None else self._read_mid(mid, mid_masks)
        nibbles = torch.stack([part[4] for part in fixed], 1).view(len(base), -1, self.dim // 2)
        scales = torch.stack([part[5] for part in fixed], 1).view(len(base), -1)
        keys, values = (
            StoredSide(
                escape=escape[side],
                mid=marked[side],
                words=torch.cat([_as_words(part[1 + side]) for part in fixed], 1),
                escapes=EscapeRows(
                    escape[side] & ~marked[side],
                    *rows[side],
                    torch.from_numpy(np.cumsum([0, *counts[side].sum(1).tolist()])),
                ),
                mid_rows=None if refined is None else refined[side],
                bias=ValueBias(nibbles, scales) if side else None,
            )
            for side in (0, 1)
        )
        return keys, values

    def read_masks(self, base: Sequence[Sequence[Buffer]]) -> torch.Tensor:
        """Return the masks of segments, int64 (escape or mid, K or V, L * H, N).

        Raises:
            ValueError: A segment is too short.
        """
        size = 4 * self.heads * WORD_BYTES
        rows = np.empty((self.num_layers, len(base), size), np.uint8)
        for n, segments in enumerate(base):
            for layer, segment in enumerate(segments):
                if len(segment) < size:
                    raise ValueError(f"layer {layer}: {len(segment)} bytes of base")
                rows[layer, n] = np.frombuffer(segment, np.uint8, size)
        masks = torch.from_numpy(rows).view(torch.int64)
        masks = masks.view(self.num_layers, len(base), 2, 2, self.heads)
        return masks.permute(2, 3, 0, 4, 1).reshape(2, 2, -1, len(base)).contiguous()

    def tag_places(self, base: Sequence[Sequence[Buffer]]) -> list[list[int]]:
        """Return where the tags begin in each segment, [block][layer]."""
        sizes = [sum(self.fixed_sizes(layer)[:3]) for layer in range(self.num_layers)]
        return [
            [
                size - saved_bytes(segment, self.words_per_head(layer))
                for layer, (segment, size) in enumerate(zip(segments, sizes, strict=True))
            ]
            for segments in base
        ]

    def words_per_head(self, layer: int) -> list[np.ndarray]:
        """Return the words of each head's planes of K and of V, int (H,)."""
        return self._words_per_head[layer]

    def _by_layer(self, masks: torch.Tensor) -> torch.Tensor:
        """Return int64 (L, N, 4 H) of (K escape, K mid, V escape, V mid) masks (4, L * H, N)."""
        by_kind = masks.view(2, 2, self.num_layers, self.heads, -1)
        return by_kind.permute(2, 4, 1, 0, 3).flatten(2)

    def _escape_counts(self, masks: torch.Tensor) -> np.ndarray:
        """Return how many tokens of masks (L * H, N) each block and layer has, (N, L)."""
        counts = count_tokens(masks).view(self.num_layers, self.heads, -1)
        return counts.sum(1).T.numpy()

    def _mid_sizes(self, side: int, masks: torch.Tensor) -> np.ndarray:
        """Return the bytes of mid rows of masks (L * H, N), (N, L)."""
        counts = count_tokens(masks).view(self.num_layers, self.heads, -1).numpy()
        sizes: np.ndarray = (counts * self._row_bytes[side]).sum(1).T
        return sizes

    def _read_fixed(self, base: Sequence[Sequence[Buffer]], layer: int) -> list[torch.Tensor]:
        """Return the fixed parts of one layer, each uint8 (N, bytes), contiguous."""
        sizes = self.fixed_sizes(layer)
        rows = np.empty((len(base), sum(sizes)), np.uint8)
        for n, segments in enumerate(base):
            segment = segments[layer]
            if len(segment) < rows.shape[1]:
                least = rows.shape[1]
                raise ValueError(f"layer {layer}: {len(segment)} bytes of base, least is {least}")
            rows[n] = np.frombuffer(segment, np.uint8, rows.shape[1])
        ends = np.cumsum([0, *sizes]).tolist()
        return [
            torch.from_numpy(np.ascontiguousarray(rows[:, a:b]))
            for a, b in itertools.pairwise(ends)
        ]

    def _read_escapes(
        self, base: Sequence[Sequence[Buffer]], counts: Sequence[np.ndarray]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return scales and codes of K's and of V's escapes; ``counts`` (N, L) of each."""
        scales: list[list[np.ndarray]] = [[], []]
        codes: list[list[np.ndarray]] = [[], []]
        fixed = [sum(self.fixed_sizes(layer)) for layer in range(self.num_layers)]
        for n, segments in enumerate(base):
            for layer, segment in enumerate(segments):
                both = [int(count[n, layer]) for count in counts]
                at = fixed[layer]
                wanted = at + sum(both) * (SCALE_BYTES + self.dim)
                if len(segment) != wanted:
                    raise ValueError(
                        f"layer {layer}: {len(segment)} bytes of base, {wanted} expected"
                    )
                for side, count in enumerate(both):
                    scales[side].append(np.frombuffer(segment, np.uint8, SCALE_BYTES * count, at))
                    at += SCALE_BYTES * count
                for side, count in enumerate(both):
                    codes[side].append(np.frombuffer(segment, np.int8, self.dim * count, at))
                    at += self.dim * count
        return [
            (
                torch.from_numpy(np.concatenate(scales[side]).view(np.int16)).view(torch.bfloat16),
                torch.from_numpy(np.concatenate(codes[side])).view(-1, self.dim),
            )
            for side in (0, 1)
        ]

    def _read_mid(self, mid: Sequence[Sequence[Buffer]], masks: torch.Tensor) -> list[MidRows]:
        """Return the mid rows of K and of V; ``masks`` (2, L * H, N)."""
        sizes = [self._mid_sizes(side, masks[side]) for side in (0, 1)]
        parts: list[list[np.ndarray]] = [[], []]
        for n, segments in enumerate(mid):
            for layer, segment in enumerate(segments):
                both = [int(size[n, layer]) for size in sizes]
                if len(segment) != sum(both):
                    raise ValueError(
                        f"layer {layer}: {len(segment)} bytes of mid, {sum(both)} expected"
                    )
                parts[0].append(np.frombuffer(segment, np.uint8, both[0]))
                parts[1].append(np.frombuffer(segment, np.uint8, both[1], both[0]))
        return [
            MidRows(
                masks[side],
                torch.from_numpy(np.concatenate(parts[side])),
                torch.from_numpy(np.cumsum([0, *sizes[side].sum(1).tolist()])),
            )
            for side in (0, 1)
        ]


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """Return uint8 (N, bytes) as int64 (N, words); a layer may have none."""
    return rows.flatten().view(torch.int64).view(len(rows), rows.shape[1] // WORD_BYTES)


def _rows(side: StoredSide) -> np.ndarray:
    assert side.mid_rows is not None
    return side.mid_rows.rows.numpy()


def _ends(sizes: np.ndarray) -> np.ndarray:
    """Return where each of ``sizes`` (N, L), in order, begins and ends: int64 (N * L + 1,)."""
    return np.concatenate([[0], np.cumsum(sizes.flatten())])


def _layer_ends(words_per_head: torch.Tensor, num_layers: int) -> list[int]:
    """Return where each layer's words begin and end, (L + 1,)."""
    per_layer = words_per_head.view(num_layers, -1).sum(1)
    return [0, *per_layer.cumsum(0).tolist()]
