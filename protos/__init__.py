"""The contract: messages, identity of blocks, frame layout, errors."""

from kvstrata.protos.errors import KVStrataError
from kvstrata.protos.frame import Frame, encode_frame
from kvstrata.protos.identity import BLOCK_TOKENS, BlockHash, BlockKey, CacheScope, block_hashes

__all__ = [
    "BLOCK_TOKENS",
    "BlockHash",
    "BlockKey",
    "CacheScope",
    "Frame",
    "KVStrataError",
    "block_hashes",
    "encode_frame",
]
