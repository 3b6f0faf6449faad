"""How KV becomes blocks: the codecs, their frames, and the presets that name them."""

from kvstrata.methods.codec import BlockCodec, BlockShape, KVBlocks
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.framing import BlockIdentity, SealedBlock, UnusableBlockError
from kvstrata.methods.presets import Method

__all__ = [
    "BlockCodec",
    "BlockIdentity",
    "BlockShape",
    "ExactCodec",
    "FallbackCodec",
    "KVBlocks",
    "Method",
    "SealedBlock",
    "UnusableBlockError",
]
