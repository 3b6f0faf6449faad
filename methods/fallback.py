"""The codec that needs no calibration: 2+3 bits for keys, 2+2 for values, sinks as int8 escapes.

Keys are taken before RoPE, min/max per channel in groups of one block; values are turned by a
Hadamard matrix, scaled by their root mean square and coded with nested Lloyd-Max cells. It is what
`balanced` means for a model without a profile.

Segment of one layer, H heads, D head_dim, E escaped tokens of all heads together:

    BASE  uint64  escapes    (K, V) x H, a bit per token; a token in none has all its codes
          uint8   tags       64
          the BASE record of ``NestedLayout``: parameters, scales, 2 bits of each code
          bf16    escape scales (E), then int8 escape codes (E x D); keys first, then values,
                  heads ascending, tokens ascending
    MID   the MID record: 3 more bits of each key, 2 of each value

Codes are dense: an escaped token's codes are there and mean nothing. With four sinks in the first
block only, that costs nothing and keeps every block but the first of one size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.kernels.hadamard import turn
from kvstrata.kernels.nested_block import decode_blocks, encode_blocks
from kvstrata.kernels.nested_layout import NestedLayout, Rows
from kvstrata.kernels.quantize import quantize_int8
from kvstrata.methods.codec import BlockShape, KVBlocks, Segments
from kvstrata.methods.saliency_tag import encode_tags, read_tags
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import RopeForm, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS

BASE, MID = Stratum.STRATUM_BASE, Stratum.STRATUM_MID
STRATA: tuple[Stratum, ...] = (BASE, MID)
_MASK_BYTES = 2 * BLOCK_TOKENS // 8  # of one head: keys and values


@dataclass(frozen=True, slots=True)
class FallbackCodec:
    """Nested 2+3 bits for the keys and 2+2 for the values of every token.

    Attributes:
        sink_tokens: The first tokens of the sequence, which all queries attend and which quantise
            badly: stored as int8 instead. At most one block.
    """

    sink_tokens: int = 4

    name = "fallback"
    version = 2
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
        num_layers, heads, num_blocks = blocks.keys.shape[:3]
        sinks = max(0, self.sink_tokens - blocks.first_position) if num_blocks else 0
        lead = _lead_bytes(heads)
        base, mid = encode_blocks(blocks.keys, blocks.values, sinks, lead)
        fixed, fine = base.numpy(), mid.numpy()
        tags = encode_tags(blocks.saliency.mean(1)).transpose(0, 1)
        fixed[..., lead - BLOCK_TOKENS : lead] = tags.numpy()
        fixed[..., : lead - BLOCK_TOKENS] = 0
        tails = [b""] * num_layers
        if sinks:
            fixed[0, :, : lead - BLOCK_TOKENS] = _escape_masks(heads, sinks)
            tails = _escape_tails(blocks, sinks)
        encoded: list[Segments] = [
            {
                BASE: {i: fixed[n, i].data for i in range(num_layers)},
                MID: {i: fine[n, i].data for i in range(num_layers)},
            }
            for n in range(num_blocks)
        ]
        if sinks:
            encoded[0][BASE] = {i: fixed[0, i].tobytes() + tail for i, tail in enumerate(tails)}
        return encoded

    def decode(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the centroids of the cells that the given strata tell. See ``BlockCodec``."""
        layout = NestedLayout.of(shape.num_kv_heads, shape.head_dim)
        lead = _lead_bytes(layout.heads)
        size = lead + layout.base_bytes
        base = [strata[BASE].segments() for strata in frames]
        layers = sorted(base[0])
        if not layers:
            raise CorruptFrameError("a block of no layers", "fetch or compute it again")
        fixed = [
            _rows(strata[BASE], segments, layers, size)
            for strata, segments in zip(frames, base, strict=True)
        ]
        fine: list[Rows] | None = None
        if MID in frames[0]:
            fine = []
            for strata in frames:
                segments = strata[MID].segments()
                fine.append(_rows(strata[MID], segments, layers, layout.mid_bytes))
                for layer, segment in segments.items():
                    if len(segment) != layout.mid_bytes:
                        raise _wrong_size(layer, len(segment), layout.mid_bytes)
        keys, values = decode_blocks(
            [rows[:, lead:] for rows in fixed], fine, layout, shape.dtype, shape.device
        )
        for n, segments in enumerate(base):
            masks = fixed[n][:, : lead - BLOCK_TOKENS]
            if masks.any() or any(len(segments[layer]) > size for layer in layers):
                _write_escapes(segments, masks, size, keys[:, :, n], values[:, :, n])
        return keys, values

    def tags(self, frames: Sequence[Mapping[Stratum, Frame]]) -> torch.Tensor:
        """Return the saliency tags. See ``BlockCodec.tags``."""
        held = [list(f[BASE].segments().values()) for f in frames]
        begins = [
            [_lead_bytes(f[BASE].header.num_kv_heads) - BLOCK_TOKENS] * len(layers)
            for f, layers in zip(frames, held, strict=True)
        ]
        return read_tags(held, begins)


def _lead_bytes(heads: int) -> int:
    """Return the size of what comes before the BASE record: masks and tags."""
    return _MASK_BYTES * heads + BLOCK_TOKENS


def _rows(frame: Frame, segments: Mapping[int, memoryview], layers: list[int], size: int) -> Rows:
    """Return the first ``size`` bytes of every layer's segment, uint8 (L, size), read-only.

    Nothing is copied where segments lie at equal distances, as those of equal size do.
    """
    held = [e for e in frame.header.segments if e.layer in segments]
    if [e.layer for e in held] != layers:
        raise CorruptFrameError("strata or blocks of one read hold different layers")
    for layer, segment in segments.items():
        if len(segment) < size:
            raise _wrong_size(layer, len(segment), size)
    begins = [e.offset for e in held]
    step = begins[1] - begins[0] if len(begins) > 1 else size
    if begins == list(range(begins[0], begins[0] + step * len(begins), step)):
        first = begins[0] - frame.first_byte
        return np.ndarray((len(layers), size), np.uint8, frame.payload, first, (step, 1))
    return np.stack([np.frombuffer(segments[layer], np.uint8, size) for layer in layers])


def _wrong_size(layer: int, size: int, expected: int) -> CorruptFrameError:
    return CorruptFrameError(f"layer {layer} has {size} bytes, expected {expected}")


def _escape_masks(heads: int, sinks: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return the mask bytes of a block whose first ``sinks`` tokens are escaped everywhere."""
    mask = np.array([(1 << sinks) - 1], "<u8").view(np.uint8)
    return np.tile(mask, 2 * heads)


def _escape_tails(blocks: KVBlocks, sinks: int) -> list[bytes]:
    """Return the first block's escapes by layer."""
    both = torch.stack([part[:, :, 0, :sinks] for part in (blocks.keys, blocks.values)], 1)
    codes, scales = quantize_int8(turn(both.float()))
    return [
        scale.flatten().view(torch.uint8).numpy().tobytes() + code.numpy().tobytes()
        for code, scale in zip(codes, scales, strict=True)
    ]


def _write_escapes(
    segments: Mapping[int, memoryview],
    masks: Rows,
    size: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Put one block's escapes in place; ``masks`` (L, 16 H), keys and values (L, H, T, D)."""
    layers, heads, tokens, dim = keys.shape
    unit = torch.tensor(NestedLayout.of(heads, dim).unit)
    bits = np.unpackbits(masks, axis=-1, bitorder="little").reshape(layers, 2, heads, tokens)
    escaped = torch.from_numpy(bits).bool()
    tails = [segments[layer][size:] for layer in sorted(segments)]
    counts = bits.sum((1, 2, 3), dtype=np.int64).tolist()
    for layer, tail, count in zip(sorted(segments), tails, counts, strict=True):
        if len(tail) != count * (2 + dim):
            raise CorruptFrameError(f"layer {layer} has {len(tail)} bytes of {count} escapes")
    scales = b"".join(tail[: 2 * count] for tail, count in zip(tails, counts, strict=True))
    codes = b"".join(tail[2 * count :] for tail, count in zip(tails, counts, strict=True))
    if not codes:
        return
    device = keys.device
    whole = torch.frombuffer(bytearray(codes), dtype=torch.int8).view(-1, dim).to(device)
    scale = torch.frombuffer(bytearray(scales), dtype=torch.bfloat16).to(device).float() * unit
    # Sums of integers are exact and cannot overflow; then one product.
    rows = (turn(whole.float(), scaled=False) * scale[:, None]).to(keys.dtype)
    places = escaped.nonzero()  # ascending: layer, K or V, head, token, as the rows are
    for side, out in enumerate((keys, values)):
        mine = places[:, 1] == side
        layer, _, head, token = places[mine].T.to(device)
        out[layer, head, token] = rows[mine.to(device)]
