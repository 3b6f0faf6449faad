"""ZipCache's quantisers as published, in blocks that decode on their own.

Keys channelwise, each class of tokens with its own range; values divided by the square root of each
channel's largest magnitude, then tokenwise. Parameters are fp16, rounded before codes are taken.
The paper shares them over the whole prompt; a block here has its own, so that any prompt with the
same prefix can read it. That costs 0.9 of its 4.1 bits per element at a head_dim of 64.

Segment of one layer, H heads, D head_dim; first the salient class (0), then the other (1):

    uint64  kept, salient  H each, a bit per token; of a token that is not kept nothing is stored
    uint8   tags       64
    fp16    key ranges minimum and step of each class that is quantised, 2 x H x D
    fp16    scale      H x D, of value channels, if a class is quantised
    fp16    value ranges  minima and steps of tokens, 2 x H x 64 (2 x 64 if heads share the set)
    uint8   rows       of K in class 0, in class 1, of V in class 0, in class 1; heads ascending,
                       tokens ascending, planar codes (``kernels.planes``) or the very numbers

Legend: L layers, H KV heads, N blocks, T block tokens (64), D head_dim, R rows of a class.

Source:
    ZipCache, arXiv:2405.14256, sections 4.1 and 4.3. The released code flattens the heads of tokens
    of different age into one range; here a range is one token's, of all heads only if they share
    the salient set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.kernels.planes import pack_planar, unpack_planar
from kvstrata.kernels.token_masks import to_flags, to_mask
from kvstrata.methods.codec import BlockShape, KVBlocks, Segments
from kvstrata.methods.saliency_tag import encode_tags, read_tags
from kvstrata.methods.token_scores import largest
from kvstrata.methods.zipcache import UNQUANTISED, ZipCache
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Buffer, Frame
from kvstrata.protos.frame_pb2 import RopeForm, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS

BASE = Stratum.STRATUM_BASE
STRATA: tuple[Stratum, ...] = (BASE,)
_TINY = 2.0**-24  # the least fp16: no step and no scale is zero


@dataclass(frozen=True, slots=True)
class ZipCacheCodec:
    """Two classes of tokens, by saliency, at the bits of a ``ZipCache``.

    Attributes:
        stage: Its settings; ``quantiser`` plays no part.
        pre_rope: Quantise keys before their rotation. The released code does so after it, which
            blurs what is channelwise in them.
    """

    stage: ZipCache
    pre_rope: bool = False

    name = "zipcache"
    version = 1
    first_layer = 0
    strata = STRATA

    @property
    def lossless(self) -> bool:
        """Return whether no class is quantised."""
        return self.stage.low_bits == UNQUANTISED

    @property
    def rope(self) -> RopeForm:
        """Return the form in which keys are handed in."""
        return RopeForm.ROPE_FORM_PRE if self.pre_rope else RopeForm.ROPE_FORM_POST

    def settings(self) -> str:
        """Return all settings of the stage, and the form of keys."""
        return f"{self.stage.settings()},pre_rope={self.pre_rope}"

    @property
    def _bits(self) -> tuple[int, int]:
        return self.stage.high_bits, self.stage.low_bits

    def encode(self, blocks: KVBlocks) -> list[Segments]:
        """Return BASE of every block. See ``BlockCodec.encode``.

        Where no stage has chosen, the salient share is taken of all kept tokens of all blocks
        together: those of a prompt, or of one block that was generated. So what was stored before
        never changes.
        """
        kept = torch.ones_like(blocks.saliency, dtype=torch.bool)
        kept = kept if blocks.kept is None else blocks.kept
        salient = self._salient(blocks.saliency, kept) if blocks.salient is None else blocks.salient
        salient = salient & kept
        classes = (salient, kept & ~salient)
        keys, values = blocks.keys.float(), blocks.values.masked_fill(~kept[..., None], 0.0).float()
        key_ranges = _key_ranges(keys, classes, self._bits)
        scale = _fp16(values.abs().amax(-2, keepdim=True).sqrt().clamp_min(_TINY))
        value_range = _value_range(values / scale, classes, self._bits, self.stage.share_heads)
        (low, step), (other_low, other_step) = key_ranges
        own_range = (_choose(salient, low, other_low), _choose(salient, step, other_step))
        key_codes = _codes(keys, *own_range, salient, self._bits)
        value_codes = _codes(values / scale, *value_range, salient, self._bits)
        heads = [
            to_mask(members).movedim(-1, 0).contiguous().view(torch.uint8).flatten(2)
            for members in (kept, salient)
        ]
        heads.append(encode_tags(blocks.saliency.mean(1)).transpose(0, 1))
        quantised = [c for c, bits in enumerate(self._bits) if bits != UNQUANTISED]
        ranges = [part for c in quantised for part in key_ranges[c]]
        if quantised:
            ranges += [scale, *(x[:, :1] if self.stage.share_heads else x for x in value_range)]
        heads += [x.half().movedim(2, 0).flatten(2).contiguous().view(torch.uint8) for x in ranges]
        fixed = torch.cat(heads, -1).numpy()
        rows = [
            _rows(codes, raw, members, bits)
            for codes, raw in ((key_codes, blocks.keys), (value_codes, blocks.values))
            for members, bits in zip(classes, self._bits, strict=True)
        ]
        num_layers, num_blocks = len(salient), salient.shape[2]
        encoded: list[Segments] = []
        for n in range(num_blocks):
            layers: dict[int, Buffer] = {}
            for layer in range(num_layers):
                parts = [data[ends[n, layer] : ends[n, layer + 1]] for data, ends in rows]
                layers[layer] = b"".join([fixed[n, layer].tobytes(), *(p.tobytes() for p in parts)])
            encoded.append({BASE: layers})
        return encoded

    def decode(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return code times step plus minimum, or the very numbers. See ``BlockCodec.decode``."""
        heads, dim = shape.num_kv_heads, shape.head_dim
        segments = _equal_layers(frames)
        sizes = self._fixed_sizes(heads, dim)
        parts = _fixed_parts(segments, sizes)
        kept, salient = (to_flags(part.view(torch.int64)) for part in parts[:2])  # (N, L, H, T)
        classes = list(zip((kept & salient, kept & ~salient), self._bits, strict=True))
        rows = _split_rows(
            segments,
            sum(sizes),
            [(members, _row_bytes(bits, dim, shape.dtype)) for members, bits in classes],
        )
        ranges = [x.view(torch.float16).float() for x in parts[3:]]
        value_ranges = [
            x.unflatten(-1, self._value_shape(heads, dim, i)) for i, x in enumerate(ranges[-3:])
        ]
        keys, values = (torch.zeros((*kept.shape, dim), dtype=shape.dtype) for _ in range(2))
        for c, (members, bits) in enumerate(classes):
            if bits == UNQUANTISED:
                keys[members], values[members] = (
                    x.view(shape.dtype) for x in (rows[c], rows[c + 2])
                )
                continue
            low, step = (_members(x.unflatten(-1, (heads, 1, dim)), members) for x in ranges[:2])
            ranges = ranges[2:]
            keys[members] = (_unpack(rows[c], bits) * step + low).to(shape.dtype)
            scale, low, step = (_members(x, members) for x in value_ranges)
            read = (_unpack(rows[c + 2], bits) * step + low) * scale
            values[members] = read.to(shape.dtype)
        k, v = (part.movedim(0, 2).contiguous().to(shape.device) for part in (keys, values))
        return k, v

    def kept(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> torch.Tensor | None:
        """Return which tokens are stored. See ``SelectiveCodec``."""
        (masks,) = _fixed_parts(_equal_layers(frames), [8 * shape.num_kv_heads])
        flags = to_flags(masks.view(torch.int64)).movedim(0, 2)
        return None if flags.all() else flags.contiguous()

    def tags(self, frames: Sequence[Mapping[Stratum, Frame]]) -> torch.Tensor:
        """Return the saliency tags. See ``BlockCodec.tags``."""
        held = [list(f[BASE].segments().values()) for f in frames]
        begins = [
            [16 * f[BASE].header.num_kv_heads] * len(layers)
            for f, layers in zip(frames, held, strict=True)
        ]
        return read_tags(held, begins)

    def _salient(self, saliency: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the salient ones of the kept tokens; all three bool or float (L, H, N, T)."""
        scores = saliency.masked_fill(~kept, -torch.inf).flatten(2)
        if self.stage.share_heads:
            scores = saliency.mean(1, keepdim=True).expand_as(saliency)
            scores = scores.masked_fill(~kept, -torch.inf).flatten(2)
        count = kept.sum((-2, -1))
        regular = ((1 - self.stage.salient) * count.double() + 1e-9).long()
        return largest(scores, count - regular).view(saliency.shape)

    def _fixed_sizes(self, heads: int, dim: int) -> list[int]:
        """Return the bytes of masks, tags and each range, as they follow each other."""
        classes = sum(bits != UNQUANTISED for bits in self._bits)
        tokens = (1 if self.stage.share_heads else heads) * BLOCK_TOKENS
        values = [heads * dim, tokens, tokens] if classes else []
        return [8 * heads] * 2 + [
            BLOCK_TOKENS,
            *(2 * n for n in [heads * dim] * 2 * classes + values),
        ]

    def _value_shape(self, heads: int, dim: int, index: int) -> tuple[int, int, int]:
        """Return the shape of a layer's channel scales (index 0) or of its token ranges."""
        if index == 0:
            return heads, 1, dim
        return (1 if self.stage.share_heads else heads), BLOCK_TOKENS, 1


def _equal_layers(frames: Sequence[Mapping[Stratum, Frame]]) -> list[list[memoryview]]:
    """Return the BASE segments of blocks, [block][layer], of blocks that hold the same layers."""
    segments = [strata[BASE].segments() for strata in frames]
    layers = sorted(segments[0])
    if not layers or any(sorted(held) != layers for held in segments):
        raise CorruptFrameError("blocks of one read hold no layers, or different ones")
    return [[held[layer] for layer in layers] for held in segments]


def _fixed_parts(segments: list[list[memoryview]], sizes: list[int]) -> list[torch.Tensor]:
    """Return what comes before the rows, each part contiguous uint8 (N, L, bytes)."""
    total = sum(sizes)
    fixed = np.empty((len(segments), len(segments[0]), total), np.uint8)
    for n, held in enumerate(segments):
        for layer, segment in enumerate(held):
            if len(segment) < total:
                raise _wrong_size(layer, len(segment), total)
            fixed[n, layer] = np.frombuffer(segment, np.uint8, total)
    return [part.contiguous() for part in torch.from_numpy(fixed).split(sizes, -1)]


def _split_rows(
    segments: list[list[memoryview]], begin: int, classes: list[tuple[torch.Tensor, int]]
) -> list[torch.Tensor]:
    """Return the rows of K in each class, then of V, each uint8 (R, bytes of a row).

    Args:
        segments: [block][layer].
        begin: Bytes before the rows.
        classes: Members bool (N, L, H, T), and the bytes of a row.

    Raises:
        CorruptFrameError: A segment has another size than its masks tell.
    """
    per_side = [members.sum((-2, -1)) * width for members, width in classes]
    sizes = torch.stack(per_side * 2, -1).tolist()
    parts: list[list[np.ndarray]] = [[] for _ in range(2 * len(classes))]
    for n, held in enumerate(segments):
        for layer, segment in enumerate(held):
            at = begin
            if len(segment) != begin + sum(sizes[n][layer]):
                raise _wrong_size(layer, len(segment), begin + sum(sizes[n][layer]))
            for part, size in zip(parts, sizes[n][layer], strict=True):
                part.append(np.frombuffer(segment, np.uint8, size, at))
                at += size
    widths = [width for _, width in classes] * 2
    return [
        torch.from_numpy(np.concatenate(part).reshape(-1, width))
        for part, width in zip(parts, widths, strict=True)
    ]


def _fp16(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` rounded to fp16, as float32.

    Raises:
        ValueError: A number is not finite, or beyond fp16.
    """
    rounded = x.half().float()
    if not rounded.isfinite().all():
        raise ValueError("values are not finite, or a range exceeds that of fp16")
    return rounded


def _range(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return minimum and step between two bounds; of an empty class, 0 and the least step."""
    empty = low > high
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    return _fp16(low), _fp16(((high - low) / (2**bits - 1)).clamp_min(_TINY))


def _key_ranges(
    keys: torch.Tensor, classes: tuple[torch.Tensor, torch.Tensor], bits: tuple[int, int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return minimum and step of each class, each (L, H, N, 1, D)."""
    found = []
    for members, width in zip(classes, bits, strict=True):
        others = ~members[..., None]
        low = keys.masked_fill(others, torch.inf).amin(-2, keepdim=True)
        high = keys.masked_fill(others, -torch.inf).amax(-2, keepdim=True)
        found.append(_range(low, high, width))
    return found


def _value_range(
    values: torch.Tensor,
    classes: tuple[torch.Tensor, torch.Tensor],
    bits: tuple[int, int],
    share_heads: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return minima and steps of tokens, each (L, H, N, T, 1)."""
    dims = (1, 4) if share_heads else (4,)
    absent = ~(classes[0] | classes[1])[..., None]
    low = values.masked_fill(absent, torch.inf).amin(dims, keepdim=True)
    high = values.masked_fill(absent, -torch.inf).amax(dims, keepdim=True)
    low, high = (x.expand(-1, values.shape[1], -1, -1, -1) for x in (low, high))
    ranges = [_range(low, high, width) for width in bits]
    return ranges[0][0], _choose(classes[0], ranges[0][1], ranges[1][1])


def _codes(
    x: torch.Tensor,
    low: torch.Tensor,
    step: torch.Tensor,
    salient: torch.Tensor,
    bits: tuple[int, int],
) -> torch.Tensor:
    """Return uint8 codes (L, H, N, T, D) of numbers under ranges that broadcast to them."""
    top, other_top = (torch.tensor(float((1 << min(width, 8)) - 1)) for width in bits)
    codes = ((x - low) / step).round_().clamp_(min=0.0)
    return torch.minimum(codes, _choose(salient, top, other_top)).to(torch.uint8)


def _choose(salient: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    """Return the one for salient tokens and the other for the rest, (L, H, N, T, D or 1)."""
    return torch.where(salient[..., None], yes, no)


def _rows(
    codes: torch.Tensor, raw: torch.Tensor, members: torch.Tensor, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a class's rows as bytes, by block, layer, head and token, and where layers end.

    Ends are int64 (N, L + 1).
    """
    chosen = members.movedim(2, 0)
    rows = (raw if bits == UNQUANTISED else codes).movedim(2, 0)[chosen]
    packed = rows.view(torch.uint8) if bits in (8, UNQUANTISED) else pack_planar(rows, bits)
    sizes = chosen.sum((-2, -1)).numpy() * packed.shape[-1]
    last = sizes.cumsum().reshape(sizes.shape)
    ends = np.concatenate([last[:, :1] - sizes[:, :1], last], 1)
    return packed.flatten().numpy(), ends


def _unpack(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Return float32 codes of packed rows."""
    return rows.float() if bits == 8 else unpack_planar(rows, bits, torch.float32)


def _row_bytes(bits: int, dim: int, dtype: torch.dtype) -> int:
    return dim * dtype.itemsize if bits == UNQUANTISED else dim * bits // 8


def _members(parameters: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Return the parameters of the chosen tokens (N, L, H, T); any but the first two may be 1."""
    return parameters.expand(*members.shape, -1)[members]


def _wrong_size(layer: int, size: int, expected: int) -> CorruptFrameError:
    return CorruptFrameError(f"layer {layer} has {size} bytes, expected {expected}")
