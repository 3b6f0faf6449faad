"""The lossless codec: KV bytes in their own dtype, byte planes apart, zstd where it pays.

Segment of one layer: 64 saliency tags, then per byte plane one flag byte (0 raw, 1 zstd), the
plane's stored size as uint32, and its bytes. A plane holds that byte of all keys, then of all
values. All layers are stored, the first too: recomputing it in another batch shape may change its
last bits.
"""

import struct
from collections.abc import Mapping, Sequence

import torch
import zstandard

from kvstrata.kernels.byte_planes import merge_bytes, split_bytes
from kvstrata.methods.codec import BlockShape, KVBlocks, Segments
from kvstrata.methods.saliency_tag import encode_tags, read_tags
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Buffer, Frame
from kvstrata.protos.frame_pb2 import RopeForm, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS

_PLANE = struct.Struct("<BI")
_RAW, _ZSTD = 0, 1
_PROBE_BYTES = 2048  # mantissa planes are noise: try a sample before compressing all of it


class ExactCodec:
    """Restores keys and values bit for bit."""

    name = "exact"
    version = 1
    lossless = True
    rope = RopeForm.ROPE_FORM_POST
    first_layer = 0
    strata: tuple[Stratum, ...] = (Stratum.STRATUM_EXACT,)

    def settings(self) -> str:
        """Return the empty text: there is nothing to set."""
        return ""

    def encode(self, blocks: KVBlocks) -> list[Segments]:
        """Return one EXACT stratum per block. See ``BlockCodec.encode``."""
        tags = encode_tags(blocks.saliency.mean(1))
        compressor = zstandard.ZstdCompressor(level=1)
        num_layers, _, num_blocks = blocks.keys.shape[:3]
        encoded: list[Segments] = []
        for n in range(num_blocks):
            layers: dict[int, Buffer] = {}
            for layer in range(num_layers):
                both = torch.stack([blocks.keys[layer, :, n], blocks.values[layer, :, n]])
                planes = [p.numpy().tobytes() for p in split_bytes(both)]
                layers[layer] = tags[layer, n].numpy().tobytes() + b"".join(
                    _pack_plane(plane, compressor) for plane in planes
                )
            encoded.append({Stratum.STRATUM_EXACT: layers})
        return encoded

    def decode(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the very bytes that were stored. See ``BlockCodec.decode``."""
        decompressor = zstandard.ZstdDecompressor()
        blocks = [strata[Stratum.STRATUM_EXACT].segments() for strata in frames]
        num_layers = len(blocks[0])
        for segments, strata in zip(blocks, frames, strict=True):
            told = strata[Stratum.STRATUM_EXACT].header.num_layers
            if told != num_layers or sorted(segments) != list(range(num_layers)):
                raise CorruptFrameError("blocks of one read lack layers or hold different ones")
        heads, dim = shape.num_kv_heads, shape.head_dim
        both = torch.empty(
            (2, num_layers, heads, len(frames), BLOCK_TOKENS, dim),
            dtype=shape.dtype,
            device=shape.device,
        )
        numel = 2 * heads * BLOCK_TOKENS * dim
        for n, segments in enumerate(blocks):
            for layer, segment in segments.items():
                planes = _unpack_planes(segment, numel, shape.dtype.itemsize, decompressor)
                flat = merge_bytes(planes.to(shape.device), shape.dtype)
                both[:, layer, :, n] = flat.view(2, heads, BLOCK_TOKENS, dim)
        return both[0], both[1]

    def tags(self, frames: Sequence[Mapping[Stratum, Frame]]) -> torch.Tensor:
        """Return the saliency tags. See ``BlockCodec.tags``."""
        held = [list(f[Stratum.STRATUM_EXACT].segments().values()) for f in frames]
        return read_tags(held, [[0] * len(layers) for layers in held])


def _pack_plane(plane: bytes, compressor: zstandard.ZstdCompressor) -> bytes:
    sample = plane[:_PROBE_BYTES]
    if len(compressor.compress(sample)) < 0.95 * len(sample):
        packed = compressor.compress(plane)
        if len(packed) < len(plane):
            return _PLANE.pack(_ZSTD, len(packed)) + packed
    return _PLANE.pack(_RAW, len(plane)) + plane


def _unpack_planes(
    segment: memoryview, plane_bytes: int, num_planes: int, decompressor: zstandard.ZstdDecompressor
) -> torch.Tensor:
    planes = torch.empty((num_planes, plane_bytes), dtype=torch.uint8)
    cursor = BLOCK_TOKENS
    for plane in planes:
        if cursor + _PLANE.size > len(segment):
            raise CorruptFrameError("a segment of the exact stratum is cut short")
        flag, size = _PLANE.unpack_from(segment, cursor)
        data = segment[cursor + _PLANE.size : cursor + _PLANE.size + size]
        cursor += _PLANE.size + size
        if flag == _ZSTD:
            data = _decompress(data, plane_bytes, decompressor)
        elif flag != _RAW:
            raise CorruptFrameError(f"a plane has the unknown flag {flag}")
        if len(data) != plane_bytes:
            raise CorruptFrameError(f"a plane has {len(data)} bytes, not {plane_bytes}")
        plane.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if cursor != len(segment):
        raise CorruptFrameError(f"a segment of {len(segment)} bytes ends at {cursor}")
    return planes


def _decompress(
    data: memoryview, plane_bytes: int, decompressor: zstandard.ZstdDecompressor
) -> memoryview:
    try:
        if zstandard.frame_content_size(data) != plane_bytes:
            raise CorruptFrameError("a compressed plane has the wrong size")
        return memoryview(decompressor.decompress(data, max_output_size=plane_bytes))
    except zstandard.ZstdError as error:
        raise CorruptFrameError(f"a compressed plane is unreadable: {error}") from error
