"""Blocks of the calibrated codec in the form in which attention reads them in place.

A block's segments are copied into memory of the reader's, layer after layer, without what only a
store needs (headers, tags, padding), and with scales at even addresses. ``kernels.block_pages`` has
the parts; ``calibrated_segments`` where they lie in a segment. Only the ``frame`` form can be read
so: its keys do not depend on where the block stands.

Legend: L stored layers, H KV heads, D head_dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstrata.kernels.block_pages import (
    ABSENT,
    BIAS_CODES,
    BIAS_STEPS,
    CODES,
    MASKS,
    MID,
    NUM_FIELDS,
    SCALES,
    SIDE_FIELDS,
    WORDS,
    SideTables,
)
from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.component_basis import ComponentBasis
from kvstrata.methods.calibrated import BASE, CalibratedCodec
from kvstrata.methods.calibrated import MID as MID_STRATUM
from kvstrata.methods.calibrated_segments import SCALE_BYTES, WORD_BYTES, SegmentLayout
from kvstrata.methods.left_out import spread_segment
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Buffer, Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS

Bytes = npt.NDArray[np.uint8]
_STEP = 16  # what the kernels read at once


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """How one block lies in memory.

    Attributes:
        num_bytes: Of all layers.
        offsets: int32 (L, NUM_FIELDS), from the block's first byte.
        parts: What to copy to which byte, ascending.
        is_whole: Whether no head leaves out a token.
    """

    num_bytes: int
    offsets: torch.Tensor
    parts: list[tuple[int, Bytes]]
    is_whole: bool

    def copy_to(self, memory: Bytes) -> None:
        """Write the block to the first ``num_bytes`` of ``memory``."""
        for at, part in self.parts:
            memory[at : at + len(part)] = part


class PageLayout:
    """Tables and places of one codec's blocks.

    Attributes:
        codec: Whose blocks these are.
        bases: Per stored layer, what K and V were transformed with.
        tables: Per stored layer, the same for ``attend_blocks``.
    """

    def __init__(self, codec: CalibratedCodec, device: torch.device | str = "cpu") -> None:
        """Cut the codec's tables by layer; those of ``bases`` and ``tables`` lie on ``device``.

        Raises:
            ValueError: Its blocks cannot be read in place.
        """
        if not is_readable_in_place(codec):
            raise ValueError(f"blocks of form {codec.form!r} cannot be read in place")
        self.codec = codec
        num_layers, self._heads, self._dim = codec.profile.shape
        whole = codec.bases
        keys, values = (basis.on(torch.device(device)) for basis in whole)
        self.bases = [
            (_layer_of(keys, layer, self._heads), _layer_of(values, layer, self._heads))
            for layer in range(num_layers)
        ]
        self.tables = [(_tables(k), _tables(v)) for k, v in self.bases]
        self._segments = SegmentLayout(num_layers, *(basis.layout for basis in whole))
        fixed = np.array([self._segments.fixed_sizes(layer) for layer in range(num_layers)])
        self._fixed = fixed
        self._row_bytes = np.stack(
            [basis.layout.mid_row_bytes.view(num_layers, -1).numpy() for basis in whole], 1
        )  # (L, 2, H)

    def place(self, frames: Mapping[Stratum, Frame]) -> PlacedBlock:
        """Return where the parts of a block go; MID may be absent.

        Raises:
            CorruptFrameError: A checksum or a segment's size is off.
        """
        base = [
            spread_segment(segment, self._segments.words_per_head(layer))
            for layer, segment in enumerate(self.codec.segments_of(frames[BASE]))
        ]
        mid = self.codec.segments_of(frames[MID_STRATUM]) if MID_STRATUM in frames else None
        masks = self._masks(base)
        escape, marked = masks[:, :, 0], masks[:, :, 1]
        escapes = _count(escape & ~marked).sum(-1)  # (L, 2)
        mids = (_count(marked & ~escape) * self._row_bytes).sum(-1)
        self._check(base, escapes * (SCALE_BYTES + self._dim), self._fixed.sum(1), "base")
        if mid is not None:
            self._check(mid, mids, np.zeros(len(mid), np.int64), "mid")
        return self._lay_out(base, mid, masks, escapes, mids)

    def _masks(self, base: Sequence[Buffer]) -> npt.NDArray[np.uint64]:
        """Return (L, 2 sides, 2 (escape, mid), H); a segment has all escape masks first."""
        words = 4 * self._heads
        masks = np.empty((len(base), words), np.uint64)
        for layer, segment in enumerate(base):
            if len(segment) < WORD_BYTES * words:
                raise CorruptFrameError(f"layer {layer}: {len(segment)} bytes of base")
            masks[layer] = np.frombuffer(segment, np.uint64, words)
        by_kind = masks.reshape(len(base), 2, 2, self._heads)
        return np.ascontiguousarray(by_kind.transpose(0, 2, 1, 3))

    def _check(
        self,
        segments: Sequence[Buffer],
        sizes: npt.NDArray[np.int64],
        fixed: npt.NDArray[np.int64],
        name: str,
    ) -> None:
        wanted = fixed + sizes.sum(1)
        for layer, (segment, size) in enumerate(zip(segments, wanted.tolist(), strict=True)):
            if len(segment) != size:
                raise CorruptFrameError(
                    f"layer {layer}: {len(segment)} bytes of {name}, {size} expected"
                )

    def _lay_out(
        self,
        base: Sequence[Buffer],
        mid: Sequence[Buffer] | None,
        all_masks: npt.NDArray[np.uint64],
        escapes: npt.NDArray[np.int64],
        mids: npt.NDArray[np.int64],
    ) -> PlacedBlock:
        offsets = np.full((len(base), NUM_FIELDS), ABSENT, np.int32)
        keys, values = offsets[:, :SIDE_FIELDS], offsets[:, SIDE_FIELDS : 2 * SIDE_FIELDS]
        parts: list[tuple[int, Bytes]] = []
        at = 0
        for layer, segment in enumerate(base):
            masks, key_words, value_words, tags, nibbles, steps = self._fixed[layer].tolist()
            whole = np.frombuffer(segment, np.uint8)
            at = -(-at // WORD_BYTES) * WORD_BYTES
            keys[layer, MASKS], values[layer, MASKS] = at, at + masks // 2
            keys[layer, WORDS], values[layer, WORDS] = at + masks, at + masks + key_words
            planes = masks + key_words + value_words
            parts.append((at, all_masks[layer].view(np.uint8).ravel()))
            parts.append((at + masks, whole[masks:planes]))
            at += planes
            offsets[layer, BIAS_CODES], offsets[layer, BIAS_STEPS] = at, at + nibbles
            parts.append((at, whole[planes + tags : planes + tags + nibbles + steps]))
            at += nibbles + steps
            at += at % SCALE_BYTES
            parts.append((at, whole[planes + tags + nibbles + steps :]))
            of_keys, of_values = escapes[layer].tolist()
            keys[layer, SCALES] = at
            values[layer, SCALES] = at + SCALE_BYTES * of_keys
            at += SCALE_BYTES * (of_keys + of_values)
            keys[layer, CODES], values[layer, CODES] = at, at + self._dim * of_keys
            at += self._dim * (of_keys + of_values)
            if mid is not None:
                parts.append((at, np.frombuffer(mid[layer], np.uint8)))
                keys[layer, MID], values[layer, MID] = at, at + int(mids[layer, 0])
                at += len(mid[layer])
        is_whole = not (all_masks[:, :, 0] & all_masks[:, :, 1]).any()
        return PlacedBlock(at, torch.from_numpy(offsets), parts, is_whole)


def is_readable_in_place(codec: CalibratedCodec) -> bool:
    """Tell whether attention can read the codec's blocks as they are stored."""
    return codec.form == "frame" and codec.profile.shape[2] % _STEP == 0


def _layer_of(whole: ComponentBasis, layer: int, heads: int) -> ComponentBasis:
    own = slice(layer * heads, (layer + 1) * heads)
    layout = PlaneLayout(whole.layout.widths[own], whole.layout.mid_counts[own])
    return ComponentBasis(
        layout, whole.mean[own], whole.forward[own], whole.inverse[own], whole.deviation[own]
    )


def _tables(basis: ComponentBasis) -> SideTables:
    unit = basis.inverse / basis.deviation[..., None]
    return SideTables(basis.mean.contiguous(), basis.deviation.contiguous(), unit, basis.layout)


def _count(masks: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return how many bits of each mask are set."""
    bits = np.unpackbits(np.ascontiguousarray(masks).view(np.uint8), axis=None)
    counts: npt.NDArray[np.int64] = bits.reshape(*masks.shape, BLOCK_TOKENS).sum(-1, dtype=np.int64)
    return counts
