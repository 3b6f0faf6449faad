"""A frame at rest, encrypted: what lies in Redis, on disk or in a bucket in its place.

Layout::

    offset  size  field
    0       8     magic "KVSEALED"
    8       8     key id: which key of which tenant, see ``key_ring``
    16      16    session: what a process derived its cipher's key with
    32      12    nonce: a number that the process has used once
    44      4     zero
    48      n     the frame, AES-256-GCM
    48+n    16    tag

The tag covers the header above, the block's key and the stratum, so a value that is moved to
another place, in part or as a whole, does not open.
"""

import struct

from cryptography.exceptions import InvalidTag

from kvstrata.kvstore_service.key_ring import KEY_ID_BYTES, SALT_BYTES, KeyRing, Session
from kvstrata.kvstore_service.tier import SEAL_BYTES, SEALED_MAGIC
from kvstrata.protos.identity import BlockKey

_HEADER = struct.Struct(f"<8s{KEY_ID_BYTES}s{SALT_BYTES}s4xQ4x")
HEADER_BYTES = _HEADER.size
TAG_BYTES = 16
assert SEAL_BYTES == HEADER_BYTES + TAG_BYTES
_NONCE = slice(32, 44)


class NoKeyError(Exception):
    """A sealed value whose key is not in the ring."""


class TamperedError(Exception):
    """A sealed value that its key does not open: damaged, or not of this place."""


def seal(session: Session, key: BlockKey, stratum: int, frame: bytes) -> bytes:
    """Return ``frame`` encrypted for this place."""
    header = _HEADER.pack(SEALED_MAGIC, session.key.key_id, session.salt, next(session.numbers))
    sealed = session.cipher.encrypt(header[_NONCE], frame, _context(header, key, stratum))
    return b"".join((header, sealed))


def unseal(ring: KeyRing, key: BlockKey, stratum: int, value: bytes) -> tuple[str, bytes]:
    """Return the tenant whose key opens a sealed value, and the frame.

    Raises:
        NoKeyError: The key is not here.
        TamperedError: It is, and does not open the value.
    """
    if len(value) < SEAL_BYTES:
        raise TamperedError
    _, key_id, salt, _ = _HEADER.unpack_from(value)
    session = ring.opening(key_id, salt)
    if session is None:
        raise NoKeyError
    view = memoryview(value)
    header = bytes(view[:HEADER_BYTES])
    try:
        frame = session.cipher.decrypt(
            header[_NONCE], view[HEADER_BYTES:], _context(header, key, stratum)
        )
    except InvalidTag:
        raise TamperedError from None
    return session.key.tenant, frame


def _context(header: bytes, key: BlockKey, stratum: int) -> bytes:
    return b"".join((header, key.scope, key.block_hash, struct.pack("<I", stratum)))
