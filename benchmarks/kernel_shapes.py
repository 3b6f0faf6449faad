"""The blocks that kernels are timed on: sizes of two models, and made-up balanced tables.

The tables have components whose variance falls by so much that ``allocate`` gives them the widths
that `balanced` gives SmolLM2: 1.4 bits for keys, two components in five none; 2.4 for values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.methods.codec import Segments
from kvstrata.methods.profile import Profile, SideTables
from kvstrata.protos.frame import Frame, encode_frame
from kvstrata.protos.frame_pb2 import FrameHeader, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS

BLOCKS = 32
THRESHOLD = 1.0
# log10 of the variance of the first component, and by how much it falls to the last.
KEY_DECAY, VALUE_DECAY = (1.88, 2.78), (2.07, 2.64)
MID_SHARE = {"K": 0.10, "V": 0.06}
ESCAPE_SHARE = {"K": 0.017, "V": 0.008}
# Few tokens are read much: with this spread the codec makes as many of them mid.
SALIENCY_SPREAD = 2.0


@dataclass(frozen=True)
class Shape:
    """A model's KV, cut to ``layers`` so that two copies and the results fit into memory."""

    name: str
    layers: int
    kv_heads: int
    heads: int
    dim: int

    def tokens(self, layers: int = 0, blocks: int = BLOCKS) -> torch.Tensor:
        """Return bf16 noise (layers, kv_heads, blocks, 64, dim); all layers by default."""
        return torch.randn(
            layers or self.layers, self.kv_heads, blocks, BLOCK_TOKENS, self.dim
        ).bfloat16()


SHAPES = (Shape("SmolLM2-135M", 29, 3, 9, 64), Shape("Llama-3-8B", 8, 8, 32, 128))
TINY = Shape("tiny", 1, 2, 4, 64)


def tables(shape: Shape, decay: tuple[float, float], layers: int = 0) -> SideTables:
    """Return the transform of one side, every head with a little more or less variance."""
    size = (layers or shape.layers, shape.kv_heads, shape.dim)
    first, fall = decay
    shift = 0.4 * torch.rand(*size[:2], 1) - 0.2
    variance = 10 ** (first + shift - fall * torch.linspace(0, 1, shape.dim))
    turn = torch.linalg.qr(torch.randn(*size, shape.dim))[0]
    basis = (turn * (0.3 + torch.rand(*size, 1))).half()
    return SideTables(torch.randn(size), basis, variance)


def profile(shape: Shape) -> Profile:
    """Return a whole model's tables."""
    keys, values = tables(shape, KEY_DECAY), tables(shape, VALUE_DECAY)
    rates = np.array([[THRESHOLD, 2.1, 0.005], [2 * THRESHOLD, 1.6, 0.01]])
    return Profile(b"made up", {"pre": keys}, values, 0, rates)


def tokens_of(side: SideTables, blocks: int = BLOCKS) -> torch.Tensor:
    """Return bf16 (L, H, N, 64, D) whose components are unit Gaussian."""
    layers, heads, dim = side.mean.shape
    y = torch.randn(layers, heads, blocks * BLOCK_TOKENS, dim)
    x = y @ side.basis.float() + side.mean[:, :, None]
    return x.bfloat16().unflatten(2, (blocks, BLOCK_TOKENS))


def saliency(shape: Shape, blocks: int = BLOCKS) -> torch.Tensor:
    """Return float32 (L, H, N, 64), mean 1."""
    drawn = torch.randn(shape.layers, shape.kv_heads, blocks, BLOCK_TOKENS)
    return (SALIENCY_SPREAD * drawn - SALIENCY_SPREAD**2 / 2).exp()


def opened(encoded: Sequence[Segments]) -> list[dict[Stratum, Frame]]:
    """Return what a codec encoded as the frames that a store hands out."""
    return [
        {
            stratum: Frame.open(
                encode_frame(FrameHeader(stratum=stratum, num_layers=len(segments)), segments)
            )
            for stratum, segments in strata.items()
        }
        for strata in encoded
    ]
