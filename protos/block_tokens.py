"""Which tokens of a block are kept how well, read off its BASE segments without the codec.

A store must not know codecs and a client must not need torch, yet both shall show a block to
people. So the two fields that say it, masks and saliency tags, are read here, at the offsets that
``methods/fallback.py`` and ``methods/calibrated.py`` document, H KV heads, D head_dim, E escapes:

    fallback/2     uint64 escape (K, V) x H, uint8 saliency 64, ...
                   a token that is no escape has all its planes: it is mid
    calibrated/1   uint64 escape (K, V) x H, uint64 mid (K, V) x H, planes,
                   uint8 saliency 64, bias H x (D/2 + 1), escapes E x (2 + D)
                   both bits: the token is dropped
    predicted/1    as calibrated/1

The planes' size is known to the profile alone, so the saliency of a calibrated segment is found
from its end.
"""

import struct
from dataclasses import dataclass

from kvstrata.protos.errors import CorruptFrameError, NotFoundError
from kvstrata.protos.frame import Buffer
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BLOCK_TOKENS

_ALL = (1 << BLOCK_TOKENS) - 1
MAX_HEADS = 4096


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """The tokens of a block in one layer; bit t of a mask is token t.

    Attributes:
        saliency: A byte a token: 0 unknown, else 2 ** ((byte - 255) / 8), more is more attended.
        escape: Tokens kept as int8, a mask a KV head, of K, then of V.
        mid: Tokens that have refinement planes in MID; as above.
        dropped: Tokens that have nothing; as above.
    """

    saliency: bytes
    escape: tuple[int, ...]
    mid: tuple[int, ...]
    dropped: tuple[int, ...]


def read_layer_tokens(header: FrameHeader, segment: Buffer) -> LayerTokens:
    """Return what one layer's BASE segment says of its tokens.

    Args:
        header: Of the segment's frame.
        segment: Verified.

    Raises:
        NotFoundError: The codec is none whose masks are known here.
        CorruptFrameError: The segment is too short for what its header says.
    """
    codec = f"{header.codec}/{header.codec_version}"
    if codec not in ("fallback/2", "calibrated/1", "predicted/1"):
        raise NotFoundError(
            f"codec {codec[:64]!r} has no token masks that are known here",
            "use a release that knows the codec; lossless codecs have none",
        )
    if not 0 < header.num_kv_heads <= MAX_HEADS:
        raise CorruptFrameError(f"a block of {header.num_kv_heads} KV heads")
    rows = 2 * header.num_kv_heads
    if codec == "fallback/2":
        escape = _masks(segment, 0, rows)
        saliency = _bytes(segment, 8 * rows, BLOCK_TOKENS)
        return LayerTokens(saliency, escape, tuple(_ALL & ~m for m in escape), (0,) * rows)
    escape, marked = _masks(segment, 0, rows), _masks(segment, 8 * rows, rows)
    escapes = tuple(e & ~m for e, m in zip(escape, marked, strict=True))
    dim = header.head_dim
    tail = header.num_kv_heads * (dim // 2 + 1)
    tail += (2 + dim) * sum(mask.bit_count() for mask in escapes)
    return LayerTokens(
        _bytes(segment, len(segment) - tail - BLOCK_TOKENS, BLOCK_TOKENS),
        escapes,
        tuple(m & ~e for e, m in zip(escape, marked, strict=True)),
        tuple(e & m for e, m in zip(escape, marked, strict=True)),
    )


def _masks(segment: Buffer, first: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", _bytes(segment, first, 8 * count))


def _bytes(segment: Buffer, first: int, size: int) -> bytes:
    if first < 0 or first + size > len(segment):
        raise CorruptFrameError(
            f"a segment of {len(segment)} bytes is too short for its header", "compute it again"
        )
    return bytes(memoryview(segment)[first : first + size])
