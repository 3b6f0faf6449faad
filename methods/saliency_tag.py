"""Saliency as one byte per token: a logarithmic scale over nine orders of magnitude.

Code 0 means "no saliency known"; code c in 1..255 means 2 ** ((c - 255) / 8), so 1.0 is code 255
and one step is an eighth of an octave (9 %).
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Buffer
from kvstrata.protos.identity import BLOCK_TOKENS

STEPS_PER_OCTAVE = 8


def encode_tags(saliency: torch.Tensor) -> torch.Tensor:
    """Return uint8 tags of ``saliency``, float (...), larger is more attended; 0 or NaN is 0."""
    known = saliency > 0
    code = (saliency.clamp_min(1e-30).log2() * STEPS_PER_OCTAVE).round().nan_to_num() + 255
    return torch.where(known, code.clamp(1, 255), torch.zeros_like(code)).to(torch.uint8)


def decode_tags(tags: torch.Tensor) -> torch.Tensor:
    """Return float32 saliency of uint8 ``tags``; unknown is 0."""
    value = torch.exp2((tags.float() - 255) / STEPS_PER_OCTAVE)
    return torch.where(tags > 0, value, torch.zeros_like(value))


def read_tags(
    segments: Sequence[Sequence[Buffer]], begins: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return the tags in segments, uint8 (L, N, 64).

    Args:
        segments: [block][layer].
        begins: Where the tags lie in each.

    Raises:
        CorruptFrameError: A segment ends before its tags do, or blocks hold different layers.
    """
    tags = np.empty((len(segments[0]), len(segments), BLOCK_TOKENS), np.uint8)
    for n, (layers, places) in enumerate(zip(segments, begins, strict=True)):
        if len(layers) != len(tags):
            raise CorruptFrameError("blocks of one read hold different layers")
        for layer, (segment, begin) in enumerate(zip(layers, places, strict=True)):
            if len(segment) < begin + BLOCK_TOKENS:
                raise CorruptFrameError(f"layer {layer} has {len(segment)} bytes, too few for tags")
            tags[layer, n] = np.frombuffer(segment, np.uint8, BLOCK_TOKENS, begin)
    return torch.from_numpy(tags)
