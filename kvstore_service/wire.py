"""Keys and strata as messages, and back."""

from collections.abc import Mapping
from typing import Any

from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest


def key_message(key: BlockKey) -> pb.BlockKey:
    """Return the key as a message."""
    return pb.BlockKey(scope=key.scope, block_hash=key.block_hash)


def key_of(message: pb.BlockKey) -> BlockKey:
    """Return the key in a message; ``ValueError`` unless its parts are 16 bytes each."""
    return BlockKey(ScopeDigest(message.scope), BlockHash(message.block_hash))


def stratum_enum(stratum: int) -> Any:
    """Return ``stratum`` for a message's field: the stubs do not take the plain number it is."""
    return stratum


def size_messages(sizes: Mapping[int, int]) -> list[pb.StratumSize]:
    """Return strata and their sizes as messages, in the order of ``sizes``."""
    return [
        pb.StratumSize(stratum=stratum_enum(stratum), frame_bytes=size)
        for stratum, size in sizes.items()
    ]
