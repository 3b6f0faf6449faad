"""Who a block is: cache scope, chained block hash, block key.

A block is named by two 16-byte values. The *scope* says under which conditions its bytes mean
anything (model, dtype, codec, method settings, adapter, tenant); the *block hash* chains the token
ids from the first on. Both are truncated SHA-256 over length-prefixed fields, so they are equal in
every process, on every machine, without any environment variable, and no field can run into the
next one.

An image is a run of token ids that no vocabulary has: each holds 62 bits of a hash of the image's
content and of the token's place in it (``image_token_ids``). So whatever is done with token ids,
naming blocks above all, tells images apart, and knows an image again.

Blocks are one canonical copy per KV head; nothing about tensor parallelism enters the identity.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import NewType

BLOCK_TOKENS = 64
HASH_BYTES = 16
_IMAGE_TOKENS = 1 << 62  # the first id of those that stand for pieces of images

BlockHash = NewType("BlockHash", bytes)
ScopeDigest = NewType("ScopeDigest", bytes)


def digest(domain: str, parts: Iterable[bytes]) -> bytes:
    """Return the 16-byte hash of length-prefixed ``parts``; ``domain`` separates uses."""
    h = hashlib.sha256()
    for part in (b"kvstrata", domain.encode(), *parts):
        h.update(struct.pack("<Q", len(part)))
        h.update(part)
    return h.digest()[:HASH_BYTES]


@dataclass(frozen=True, slots=True)
class CacheScope:
    """The conditions under which two equal token prefixes have interchangeable KV.

    Attributes:
        model: Fingerprint of weights, config and rope, 16 bytes.
        kv_dtype: "float32", "bfloat16" or "float16".
        codec: Name and version, such as "fallback/1".
        method: Canonical text of every method setting that changes KV; empty without any.
        adapter: Identity of the adapter in use; empty without one.
        salt: The tenant's secret; equal salts share blocks.
        profile: Hash of the calibration profile; empty without one.
    """

    model: bytes
    kv_dtype: str
    codec: str
    method: str = ""
    adapter: str = ""
    salt: bytes = field(default=b"", repr=False)
    profile: bytes = b""

    def digest(self) -> ScopeDigest:
        """Return the scope's 16-byte name, the seed of the block-hash chain."""
        values = (getattr(self, f.name) for f in fields(self))
        return ScopeDigest(
            digest("scope", (v if isinstance(v, bytes) else v.encode() for v in values))
        )


@dataclass(frozen=True, slots=True)
class BlockKey:
    r"""The only name of a block: one ``encode``, one ``decode``.

    ``BlockKey(b"\x00" * 16, b"\x01" * 16).encode()`` is 65 characters: the scope in hex, a dot,
    the block hash in hex.
    """

    scope: ScopeDigest
    block_hash: BlockHash

    def __post_init__(self) -> None:
        if len(self.scope) != HASH_BYTES or len(self.block_hash) != HASH_BYTES:
            raise ValueError(
                f"a block key is two {HASH_BYTES}-byte values, got {len(self.scope)} and "
                f"{len(self.block_hash)} bytes"
            )

    def encode(self) -> str:
        """Return the printable form, safe in Redis keys, file names and URLs."""
        return f"{self.scope.hex()}.{self.block_hash.hex()}"

    @classmethod
    def decode(cls, text: str) -> "BlockKey":
        """Return the key that ``encode`` printed.

        Raises:
            ValueError: ``text`` is not such a form.
        """
        scope, dot, block_hash = text.partition(".")
        if not dot or len(scope) != 2 * HASH_BYTES or len(block_hash) != 2 * HASH_BYTES:
            raise ValueError(f"not a block key (32 hex digits, dot, 32 hex digits): {text[:80]!r}")
        return cls(ScopeDigest(bytes.fromhex(scope)), BlockHash(bytes.fromhex(block_hash)))


def image_token_ids(content: bytes, num_tokens: int) -> list[int]:
    """Return the token ids that stand for an image in a prompt.

    Args:
        content: A digest of its pixels.
        num_tokens: As many as the model makes of one image.
    """
    ids = []
    for index in range(num_tokens):
        hashed = digest("image token", (content, struct.pack("<I", index)))
        ids.append(_IMAGE_TOKENS | int.from_bytes(hashed[:8], "little") >> 2)
    return ids


def is_of_image(token_id: int) -> bool:
    """Tell whether a token stands for a piece of an image."""
    return token_id >= _IMAGE_TOKENS


def has_images(token_ids: Sequence[int]) -> bool:
    """Tell whether some tokens stand for a piece of an image."""
    return is_of_image(max(token_ids, default=0))


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """Return token ids as little-endian uint32; as uint64 where one of them needs it."""
    kind = "Q" if max(token_ids, default=0) >= 1 << 32 else "I"
    return struct.pack(f"<{len(token_ids)}{kind}", *token_ids)


def block_hash(parent: bytes, token_ids: Sequence[int]) -> BlockHash:
    """Return the hash of one block: H(parent, token ids as little-endian uint32).

    Where one of them needs more, as those of images do, all are uint64.
    """
    return BlockHash(digest("block", (parent, pack_token_ids(token_ids))))


def block_hashes(scope: ScopeDigest, token_ids: Sequence[int]) -> list[BlockHash]:
    """Return the chained hash of every full block of ``token_ids``, first block first.

    The chain starts at the scope, so equal tokens under another scope share no hash. Tokens after
    the last full block have none.
    """
    hashes: list[BlockHash] = []
    parent: bytes = scope
    for first in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        hashes.append(block_hash(parent, token_ids[first : first + BLOCK_TOKENS]))
        parent = hashes[-1]
    return hashes


def split_hashes(joined: bytes) -> list[BlockHash]:
    """Return the 16-byte hashes that were concatenated for the wire.

    Raises:
        ValueError: The length is no multiple of 16.
    """
    if len(joined) % HASH_BYTES:
        raise ValueError(f"block_hashes must be {HASH_BYTES} bytes each, got {len(joined)} in all")
    return [BlockHash(joined[i : i + HASH_BYTES]) for i in range(0, len(joined), HASH_BYTES)]
