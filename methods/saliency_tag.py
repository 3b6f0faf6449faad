"""Saliency as one byte per token: a logarithmic scale over nine orders of magnitude.

Code 0 means "no saliency known"; code c in 1..255 means 2 ** ((c - 255) / 8), so 1.0 is code 255
and one step is an eighth of an octave (9 %).
"""

import torch

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
