"""The codec that needs no calibration: 2+3 bits for keys, 2+2 for values, sinks as int8 escapes.

Keys are taken before RoPE, min/max per channel in groups of one block; values are turned by a
Hadamard matrix, scaled by their root mean square and coded with nested Lloyd-Max cells. It is what
`balanced` means for a model without a profile.

Segment of one layer, H heads, D head_dim, E escaped tokens of all heads together:

    BASE  uint64  masks      (dropped, mid, escape) x (K, V) x H; a token in none is base
          uint8   tags       64
          fp16    minimum    H x D      fp16 step H x D          (keys)
          fp16    peak       H          uint8 scale H x 64       (values)
          uint8   key codes  H x 64 x D/4     uint8 value codes H x 64 x D/4
          bf16    escape scales (E), then int8 escape codes (E x D); keys first, then values,
                  heads ascending, tokens ascending
    MID   uint8   key codes  H x 64 x D/4, then their last bits H x 64 x D/8
          uint8   value codes H x 64 x D/4

Codes are dense: an escaped token's codes are there and mean nothing. With four sinks in the first
block only, that costs nothing and keeps every block but the first of one size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.planes import pack_planar, unpack_planar
from kvstrata.kernels.quantize import (
    BASE_BITS,
    GAUSSIAN_BASE_LEVELS,
    KEY_BITS,
    VALUE_BITS,
    decode_scales,
    dequantize_channels,
    dequantize_channels_base,
    dequantize_gaussian,
    dequantize_int8,
    quantize_channels,
    quantize_gaussian,
    quantize_int8,
)
from kvstrata.methods.codec import BlockShape, KVBlocks, Segments
from kvstrata.methods.saliency_tag import encode_tags
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import RopeForm, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS

BASE, MID = Stratum.STRATUM_BASE, Stratum.STRATUM_MID
STRATA: tuple[Stratum, ...] = (BASE, MID)
DROPPED_CLASS, MID_CLASS, ESCAPE_CLASS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class FallbackCodec:
    """Nested 2+3 bits for the keys and 2+2 for the values of every token.

    Attributes:
        sink_tokens: The first tokens of the sequence, which all queries attend and which quantise
            badly: stored as int8 instead. At most one block.
    """

    sink_tokens: int = 4

    name = "fallback"
    version = 1
    lossless = False
    rope = RopeForm.ROPE_FORM_PRE
    first_layer = 1
    strata = STRATA

    def __post_init__(self) -> None:
        if not 0 <= self.sink_tokens <= BLOCK_TOKENS:
            raise ValueError(f"sink_tokens must be 0 to {BLOCK_TOKENS}, got {self.sink_tokens}")

    def settings(self) -> str:
        """Return the sink count, the one setting that changes the bytes."""
        return f"sink_tokens={self.sink_tokens}"

    def encode(self, blocks: KVBlocks) -> list[Segments]:
        """Return BASE and MID of every block. See ``BlockCodec.encode``."""
        num_layers, heads, num_blocks, tokens, dim = blocks.keys.shape
        position = blocks.first_position + torch.arange(num_blocks * tokens).view(
            num_blocks, tokens
        )
        escaped = (position < self.sink_tokens).expand(num_layers, heads, num_blocks, tokens)
        keys, values = blocks.keys.float(), blocks.values.float() @ hadamard(dim)
        key_codes, minimum, step = quantize_channels(keys, escaped)
        value_codes, peak, scale = quantize_gaussian(values)
        base = _rows(
            num_blocks,
            torch.from_numpy(_masks(escaped)),
            encode_tags(blocks.saliency)[:, None],
            minimum,
            step,
            peak,
            scale,
            pack_planar(key_codes >> (KEY_BITS - BASE_BITS), 2),
            pack_planar(value_codes >> (VALUE_BITS - BASE_BITS), 2),
        )
        mid = _rows(
            num_blocks,
            pack_planar(key_codes >> 1 & 3, 2),
            pack_planar(key_codes & 1, 1),
            pack_planar(value_codes & 3, 2),
        )
        turned = torch.stack([keys @ hadamard(dim), values])
        encoded: list[Segments] = []
        for n in range(num_blocks):
            tails = _escape_tails(turned[:, :, :, n], escaped[:, :, n])
            encoded.append(
                {
                    BASE: {i: base[i, n].tobytes() + tails[i] for i in range(num_layers)},
                    MID: {i: mid[i, n].data for i in range(num_layers)},
                }
            )
        return encoded

    def decode(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the centroids of the cells that the given strata tell. See ``BlockCodec``."""
        heads, dim = shape.num_kv_heads, shape.head_dim
        layout = _base_layout(heads, dim)
        base = [strata[BASE].segments() for strata in frames]
        fields = layout.split(_stack(base, layout.bytes, exact_size=False))
        scale = decode_scales(fields["peak"], fields["scale"])
        key_codes, value_codes = (
            unpack_planar(fields["keys"], 2),
            unpack_planar(fields["values"], 2),
        )
        if MID in frames[0]:
            refinements = [strata[MID].segments() for strata in frames]
            if any(sorted(segments) != sorted(base[0]) for segments in refinements):
                raise CorruptFrameError("base and mid of one read hold different layers")
            mid_layout = _mid_layout(heads, dim)
            mid = mid_layout.split(_stack(refinements, mid_layout.bytes, exact_size=True))
            key_codes = (key_codes << 2 | unpack_planar(mid["keys"], 2)) << 1
            key_codes |= unpack_planar(mid["key_bits"], 1)
            value_codes = value_codes << 2 | unpack_planar(mid["values"], 2)
            keys = dequantize_channels(key_codes, fields["minimum"], fields["step"])
            values = dequantize_gaussian(value_codes, scale)
        else:
            keys = dequantize_channels_base(key_codes, fields["minimum"], fields["step"])
            values = dequantize_gaussian(value_codes, scale, GAUSSIAN_BASE_LEVELS)
        values = values @ hadamard(dim)
        escapes = fields["masks"][:, :, ESCAPE_CLASS].flatten(2).any(-1).any(0)
        for n, segments in enumerate(base):
            if escapes[n] or any(len(segment) > layout.bytes for segment in segments.values()):
                _write_escapes(segments, layout, fields["masks"][:, n], keys[:, n], values[:, n])
        # (L, N, H, T, D) to (L, H, N, T, D)
        return keys.transpose(1, 2).to(shape.dtype), values.transpose(1, 2).to(shape.dtype)


Fields = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _base_layout(heads: int, dim: int) -> "_Layout":
    codes = (heads, BLOCK_TOKENS, dim // 4)
    return _Layout(
        {
            "masks": (torch.int64, (3, 2, heads)),
            "tags": (torch.uint8, (BLOCK_TOKENS,)),
            "minimum": (torch.float16, (heads, dim)),
            "step": (torch.float16, (heads, dim)),
            "peak": (torch.float16, (heads,)),
            "scale": (torch.uint8, (heads, BLOCK_TOKENS)),
            "keys": (torch.uint8, codes),
            "values": (torch.uint8, codes),
        }
    )


def _mid_layout(heads: int, dim: int) -> "_Layout":
    return _Layout(
        {
            "keys": (torch.uint8, (heads, BLOCK_TOKENS, dim // 4)),
            "key_bits": (torch.uint8, (heads, BLOCK_TOKENS, dim // 8)),
            "values": (torch.uint8, (heads, BLOCK_TOKENS, dim // 4)),
        }
    )


class _Layout:
    """Offsets of the fixed part of a segment."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.bytes = sum(d.itemsize * int(np.prod(s)) for d, s in fields.values())

    def split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the fields of ``rows``, uint8 (L, N, bytes), each (L, N, *shape)."""
        cursor, fields = 0, {}
        for name, (dtype, shape) in self.fields.items():
            size = dtype.itemsize * int(np.prod(shape))
            part = rows[..., cursor : cursor + size]
            if dtype != torch.uint8:
                part = _dense(part).view(dtype)
            fields[name] = part.unflatten(-1, shape)
            cursor += size
        return fields


def _dense(part: torch.Tensor) -> torch.Tensor:
    """Return a copy that any dtype can view: ``contiguous`` keeps odd strides of size-1 axes."""
    return part.clone(memory_format=torch.contiguous_format)


def _rows(num_blocks: int, *fields: torch.Tensor) -> np.ndarray:
    """Return uint8 (L, N, bytes): the fields, each (L, H, N, ...), side by side, heads first."""
    flat = [
        _dense(field.transpose(1, 2)).view(torch.uint8).reshape(field.shape[0], num_blocks, -1)
        for field in fields
    ]
    return np.ascontiguousarray(torch.cat(flat, -1).numpy())


def _stack(
    blocks: Sequence[Mapping[int, memoryview]], size: int, *, exact_size: bool
) -> torch.Tensor:
    """Return uint8 (L, N, size): the first ``size`` bytes of every segment."""
    layers = sorted(blocks[0])
    rows = np.empty((len(layers), len(blocks), size), dtype=np.uint8)
    for n, segments in enumerate(blocks):
        if sorted(segments) != layers:
            raise CorruptFrameError("blocks of one read hold different layers")
        for i, layer in enumerate(layers):
            segment = segments[layer]
            if len(segment) < size or (exact_size and len(segment) != size):
                raise CorruptFrameError(f"layer {layer} has {len(segment)} bytes, expected {size}")
            rows[i, n] = np.frombuffer(segment, np.uint8, size)
    return torch.from_numpy(rows)


def _masks(escaped: torch.Tensor) -> np.ndarray:
    """Return int64 (L, 6, N, 1): one bit per token for every class, K and V, and head."""
    bits = np.packbits(escaped.numpy(), axis=-1, bitorder="little").view(np.uint64)
    classes = np.stack([np.zeros_like(bits), ~bits, bits], axis=1)  # dropped, mid, escape
    both = np.stack([classes, classes], axis=2)  # (L, 3, 2, H, N, 1)
    return both.reshape(both.shape[0], -1, *both.shape[4:]).view(np.int64)


def _escape_tails(turned: torch.Tensor, escaped: torch.Tensor) -> list[bytes]:
    """Return one block's escapes by layer; ``turned`` (2, L, H, T, D), ``escaped`` (L, H, T)."""
    if not escaped.any():
        return [b""] * escaped.shape[0]
    tails = []
    for layer in range(escaped.shape[0]):
        rows = torch.cat([part[layer][escaped[layer]] for part in turned])
        codes, scales = quantize_int8(rows)
        tails.append(scales.view(torch.uint8).numpy().tobytes() + codes.numpy().tobytes())
    return tails


def _write_escapes(
    segments: Mapping[int, memoryview],
    layout: _Layout,
    masks: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Put one block's escapes in place; ``masks`` (L, 3, 2, H), keys and values (L, H, T, D)."""
    dim = keys.shape[-1]
    shifts = torch.arange(BLOCK_TOKENS)
    escaped = ((masks[:, ESCAPE_CLASS, ..., None] >> shifts) & 1).bool()  # (L, 2, H, T)
    for i, layer in enumerate(sorted(segments)):
        tail = segments[layer][layout.bytes :]
        count = int(escaped[i].sum())
        if len(tail) != count * (2 + dim):
            raise CorruptFrameError(f"layer {layer} has {len(tail)} bytes of {count} escapes")
        if not count:
            continue
        scales = torch.frombuffer(bytearray(tail[: 2 * count]), dtype=torch.bfloat16)
        codes = torch.frombuffer(bytearray(tail[2 * count :]), dtype=torch.int8).view(count, dim)
        rows = dequantize_int8(codes, scales) @ hadamard(dim)
        num_keys = int(escaped[i, 0].sum())
        keys[i][escaped[i, 0]] = rows[:num_keys]
        values[i][escaped[i, 1]] = rows[num_keys:]
