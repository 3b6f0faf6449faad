"""A made-up calibrated layer for tests of its kernels: layout, basis, tokens and classes."""

from dataclasses import dataclass

import torch

from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.component_basis import ComponentBasis
from kvstrata.kernels.token_masks import TokenClasses, to_mask, token_classes

DIMS = (32, 64, 80, 96, 128, 256)


def make_layout(heads: int, dim: int, seed: int = 0) -> PlaneLayout:
    """Return widths 0 to 6 in every mixture, and some refined components."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(0, 7, (heads, dim), generator=generator).sort(-1, descending=True)[0]
    less = torch.randint(0, 4, (heads, 1), generator=generator)
    counts = torch.randint(0, dim // 8 + 1, (heads,), generator=generator) * 8
    return PlaneLayout((widths - less).clamp_min(0).to(torch.uint8), counts)


@dataclass
class Layer:
    basis: ComponentBasis
    tokens: torch.Tensor
    weights: torch.Tensor
    classes: TokenClasses


def make_layer(
    heads: int, blocks: int, dim: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> Layer:
    """Return tokens whose components are Gaussian, and classes that are all in use."""
    generator = torch.Generator().manual_seed(seed)
    deviation = torch.rand(heads, dim, generator=generator).sort(-1, descending=True)[0] + 0.05
    turn = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0]
    mean = 3 * torch.randn(heads, dim, generator=generator)
    basis = ComponentBasis(
        make_layout(heads, dim, seed),
        mean,
        turn / deviation[:, None],
        deviation[..., None] * turn.mT,
        deviation,
    )
    y = torch.randn(heads, blocks * 64, dim, generator=generator)
    tokens = (torch.bmm(y, basis.inverse) + mean[:, None]).view(heads, blocks, 64, dim)
    chance = torch.rand(heads, blocks, 64, generator=generator)
    mid, escape = to_mask((chance < 0.25) | (chance > 0.97)), to_mask(chance > 0.93)
    return Layer(basis, tokens.to(dtype), deviation.square(), token_classes(mid, escape))
