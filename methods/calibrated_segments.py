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
from kvstrata.kernels.byte_ranges import join_ranges
from kvstrata.kernels.escape_rows import EscapeRows
from kvstrata.kernels.huge_memory import empty_huge
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

    def on(self, device: torch.device) -> "StoredSide":
        """Return the same on a device."""
        if self.words.device == device:
            return self
        e, m, b = self.escapes, self.mid_rows, self.bias
        return StoredSide(
            self.escape.to(device),
            self.mid.to(device),
            self.words.to(device),
            EscapeRows(*(p.to(device) for p in (e.masks, e.scales, e.codes, e.block_offsets))),
            m and MidRows(*(part.to(device) for part in (m.masks, m.rows, m.block_offsets))),
            b and ValueBias(*(part.to(device) for part in b)),
        )


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
        whole = _Joined.of(base)
        masks = self._masks(whole)
        if (masks[0] & masks[1]).any():
            whole = _Joined.of(
                [
                    [spread_segment(s, self.words_per_head(i)) for i, s in enumerate(segments)]
                    for segments in base
                ]
            )
        escape, marked = masks[0], masks[1]
        mid_masks = marked & ~escape
        counts = [self._escape_counts(escape[side] & ~marked[side]) for side in (0, 1)]
        rows = self._read_escapes(whole, counts)  # which finds all that is too short
        *words, nibbles, scales = self._read_fixed(whole)
        nibbles = nibbles.reshape(len(base), -1, self.dim // 2)
        bias = ValueBias(torch.from_numpy(nibbles), torch.from_numpy(scales.reshape(len(base), -1)))
        refined = None if mid is None else self._read_mid(_Joined.of(mid), mid_masks)
        keys, values = (
            StoredSide(
                escape=escape[side],
                mid=marked[side],
                words=torch.from_numpy(words[side].view(np.int64)).view(len(base), -1),
                escapes=EscapeRows(
                    escape[side] & ~marked[side],
                    *rows[side],
                    torch.from_numpy(np.cumsum([0, *counts[side].sum(1).tolist()])),
                ),
                mid_rows=None if refined is None else refined[side],
                bias=bias if side else None,
            )
            for side in (0, 1)
        )
        return keys, values

    def read_masks(self, base: Sequence[Sequence[Buffer]]) -> torch.Tensor:
        """Return the masks of segments, int64 (escape or mid, K or V, L * H, N).

        Raises:
            ValueError: A segment is too short.
        """
        return self._masks(_Joined.of(base))

    def _masks(self, base: "_Joined") -> torch.Tensor:
        """Return ``read_masks`` of joined segments."""
        size, num_blocks = 4 * self.heads * WORD_BYTES, len(base.sizes)
        base.check("base", np.maximum(base.sizes, size))
        masks = torch.from_numpy(base.data[base.starts[..., None] + np.arange(size)])
        masks = masks.view(torch.int64).view(num_blocks, self.num_layers, 2, 2, self.heads)
        return masks.permute(2, 3, 1, 4, 0).reshape(2, 2, -1, num_blocks).contiguous()

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

    def _read_fixed(self, base: "_Joined") -> list[np.ndarray]:
        """Return words of K and of V, bias codes and bias scales: uint8, block by block."""
        sizes = np.array([self.fixed_sizes(layer) for layer in range(self.num_layers)])
        firsts = np.cumsum(sizes, 1) - sizes
        chosen = (base.sizes * 0 + sizes[:, i] for i in (1, 2, 4, 5))
        starts = (base.starts + firsts[:, i] for i in (1, 2, 4, 5))
        return [base.take(*part) for part in zip(starts, chosen, strict=True)]

    def _read_escapes(
        self, base: "_Joined", counts: Sequence[np.ndarray]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return scales and codes of K's and of V's escapes; ``counts`` (N, L) of each."""
        fixed = np.array([sum(self.fixed_sizes(layer)) for layer in range(self.num_layers)])
        sizes = [size * count for size in (SCALE_BYTES, self.dim) for count in counts]
        base.check("base", fixed + sum(sizes))
        firsts = itertools.accumulate(sizes, initial=base.starts + fixed)
        parts = [base.take(first, size) for first, size in zip(firsts, sizes, strict=False)]
        scales = [torch.from_numpy(part.view(np.int16)).view(torch.bfloat16) for part in parts[:2]]
        codes = [torch.from_numpy(part.view(np.int8)).view(-1, self.dim) for part in parts[2:]]
        return list(zip(scales, codes, strict=True))

    def _read_mid(self, mid: "_Joined", masks: torch.Tensor) -> list[MidRows]:
        """Return the mid rows of K and of V; ``masks`` (2, L * H, N)."""
        sizes = [self._mid_sizes(side, masks[side]) for side in (0, 1)]
        mid.check("mid", sizes[0] + sizes[1])
        rows = mid.take(mid.starts, sizes[0]), mid.take(mid.starts + sizes[0], sizes[1])
        return [
            MidRows(masks[side], torch.from_numpy(rows[side]), torch.from_numpy(ends))
            for side, ends in enumerate(_ends(size)[:: self.num_layers] for size in sizes)
        ]


@dataclass(frozen=True, slots=True)
class _Joined:
    """Segments one after the other, so that parts of all are taken without looking at each.

    Attributes:
        data: uint8, all bytes.
        starts: int64 (N, L), where each segment begins.
        sizes: int64 (N, L), how many bytes it has.
    """

    data: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, segments: Sequence[Sequence[Buffer]]) -> "_Joined":
        """Join segments, [block][layer]."""
        parts = [segment for layers in segments for segment in layers]
        sizes = np.array([len(part) for part in parts], np.int64)
        shape = len(segments), len(parts) // max(1, len(segments))
        starts = (np.cumsum(sizes) - sizes).reshape(shape)
        data = empty_huge((int(sizes.sum()),), torch.uint8).numpy()  # else cleared each time
        view, begin = data.data, 0
        for part in parts:
            end = begin + len(part)
            view[begin:end] = part
            begin = end
        return cls(data, starts, sizes.reshape(shape))

    def check(self, name: str, wanted: np.ndarray) -> None:
        """Raise ValueError unless sizes are those wanted, (N, L)."""
        if (self.sizes != wanted).any():
            n, layer = np.argwhere(self.sizes != wanted)[0].tolist()
            raise ValueError(
                f"layer {layer}: {self.sizes[n, layer]} bytes of {name}, "
                f"{wanted[n, layer]} expected"
            )

    def take(self, firsts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return a range of each segment, one after the other; uint8, writable."""
        ranges = (torch.from_numpy(part.ravel()) for part in (firsts, sizes))
        joined: np.ndarray = join_ranges(torch.from_numpy(self.data), *ranges).numpy()
        return joined


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
