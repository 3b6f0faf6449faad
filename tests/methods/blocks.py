"""Random blocks, and their way through frames and back."""

from collections.abc import Sequence

import torch

from kvstrata.methods import BlockCodec, BlockIdentity, BlockShape, KVBlocks
from kvstrata.methods.framing import SealedBlock, seal
from kvstrata.protos import BLOCK_TOKENS, Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import ScopeDigest, block_hashes

SCOPE = ScopeDigest(b"scope of a test.")
BASE, MID, EXACT = Stratum.STRATUM_BASE, Stratum.STRATUM_MID, Stratum.STRATUM_EXACT


def random_blocks(
    num_layers: int,
    heads: int,
    dim: int,
    num_blocks: int,
    dtype: torch.dtype = torch.float32,
    *,
    first_position: int = 0,
    seed: int = 0,
) -> KVBlocks:
    """Return Gaussian values, and keys whose channels differ in offset and width."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, heads, num_blocks, BLOCK_TOKENS, dim)
    channel = torch.linspace(-2, 2, dim)
    keys = torch.randn(shape, generator=generator) * channel.exp2() + 4 * channel
    values = torch.randn(shape, generator=generator) * 0.7
    saliency = torch.rand(shape[:4], generator=generator)
    return KVBlocks(keys.to(dtype), values.to(dtype), saliency, first_position)


def shape_of(blocks: KVBlocks) -> BlockShape:
    return BlockShape(blocks.keys.shape[1], blocks.keys.shape[-1], blocks.keys.dtype)


def identities(num_blocks: int, first_position: int = 0) -> list[BlockIdentity]:
    """Return the identities of consecutive blocks of one sequence."""
    first = first_position // BLOCK_TOKENS
    tokens = [(7 * i) % 1000 for i in range((first + num_blocks) * BLOCK_TOKENS)]
    hashes = block_hashes(SCOPE, tokens)
    return [
        BlockIdentity(
            scope=SCOPE,
            block_hash=hashes[n],
            parent_hash=hashes[n - 1] if n else SCOPE,
            token_ids=tuple(tokens[n * BLOCK_TOKENS : (n + 1) * BLOCK_TOKENS]),
            first_position=n * BLOCK_TOKENS,
        )
        for n in range(first, first + num_blocks)
    ]


def seal_all(codec: BlockCodec, blocks: KVBlocks) -> list[SealedBlock]:
    """Return every block's real frames."""
    shape = shape_of(blocks)
    encoded = codec.encode(blocks)
    return [
        seal(
            codec,
            segments,
            identity,
            rope=codec.rope,
            kv_dtype=str(shape.dtype).removeprefix("torch."),
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )
        for segments, identity in zip(
            encoded, identities(len(encoded), blocks.first_position), strict=True
        )
    ]


def open_all(
    sealed: Sequence[SealedBlock], strata: Sequence[Stratum] | None = None
) -> list[dict[Stratum, Frame]]:
    """Return the opened frames of the wanted strata; all without ``strata``."""
    return [
        {s: Frame.open(data) for s, data in block.frames.items() if strata is None or s in strata}
        for block in sealed
    ]


def round_trip(
    codec: BlockCodec, blocks: KVBlocks, strata: Sequence[Stratum] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a reader of ``strata`` gets."""
    return codec.decode(open_all(seal_all(codec, blocks), strata), shape_of(blocks))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes, equal for equal NaNs and unequal for 0.0 and -0.0."""
    return tensor.contiguous().view(torch.uint8)
