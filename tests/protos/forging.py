"""Frames put together by hand, with checksums that hold, independently of the encoder."""

import struct

import xxhash

from kvstrata.protos.frame_pb2 import FrameHeader


def prelude_of(
    head: bytes,
    frame_bytes: int,
    *,
    magic: bytes = b"KVSTRATA",
    version: int = 1,
    flags: int = 0,
    head_bytes: int | None = None,
) -> bytes:
    """Return the 32 bytes before a header, checksum included."""
    size = len(head) if head_bytes is None else head_bytes
    prelude = struct.pack("<8sHHIQ", magic, version, flags, size, frame_bytes)
    return prelude + struct.pack("<Q", xxhash.xxh3_64_intdigest(prelude + head))


def forge(
    header: FrameHeader | bytes,
    body: bytes = b"",
    *,
    frame_bytes: int | None = None,
    magic: bytes = b"KVSTRATA",
    version: int = 1,
    flags: int = 0,
    head_bytes: int | None = None,
) -> bytes:
    """Return a frame of ``header`` as it is, followed by ``body``; every field may lie."""
    head = header if isinstance(header, bytes) else header.SerializeToString()
    told = 32 + len(head) + len(body) if frame_bytes is None else frame_bytes
    prelude = prelude_of(
        head, told, magic=magic, version=version, flags=flags, head_bytes=head_bytes
    )
    return prelude + head + body
