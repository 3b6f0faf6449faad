"""Made-up profiles, and blocks that look as they expect."""

import numpy as np
import torch

from kvstrata.methods import KVBlocks
from kvstrata.methods.profile import Profile, SideTables
from kvstrata.protos import BLOCK_TOKENS

MODEL_ID = b"a made-up model."


def make_side(layers: int, heads: int, dim: int, seed: int) -> SideTables:
    """Return a transform of full rank whose components cost from 10 down to 0.0001."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, heads, dim)
    turn = torch.linalg.qr(torch.randn(*shape, dim, generator=generator))[0]
    decay = torch.linspace(1, -4, dim) + 0.3 * torch.rand(shape, generator=generator)
    variance = (10**decay).sort(-1, descending=True)[0]
    return SideTables(
        mean=2 * torch.randn(shape, generator=generator),
        basis=(variance.sqrt()[..., None] * turn).half(),
        variance=variance,
    )


def make_rates() -> np.ndarray:
    """Return ten thresholds, at which fewer bits cost more divergence."""
    thresholds = np.geomspace(1e-3, 1.0, 10)
    return np.column_stack([thresholds, np.linspace(4.0, 1.0, 10), np.geomspace(1e-4, 0.3, 10)])


def make_profile(
    layers: int = 2,
    heads: int = 2,
    dim: int = 32,
    *,
    forms: tuple[str, ...] = ("pre", "frame"),
    first_layer: int = 1,
    model_id: bytes = MODEL_ID,
    seed: int = 0,
    note: str = "made up",
) -> Profile:
    return Profile(
        model_id=model_id,
        keys={form: make_side(layers, heads, dim, seed + i) for i, form in enumerate(forms)},
        values=make_side(layers, heads, dim, seed + 10),
        first_layer=first_layer,
        rates=make_rates(),
        note=note,
    )


def blocks_of(
    profile: Profile,
    count: int = 2,
    dtype: torch.dtype = torch.float32,
    *,
    form: str = "pre",
    first_position: int = 0,
    outliers: float = 0.03,
    seed: int = 0,
) -> KVBlocks:
    """Return blocks whose components are Gaussian, some tokens six times as far out."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads, dim = profile.shape
    shape = (layers, heads, count, BLOCK_TOKENS)

    def draw(tables: SideTables) -> torch.Tensor:
        y = torch.randn(*shape, dim, generator=generator)
        y *= torch.where(torch.rand(shape, generator=generator) < outliers, 6.0, 1.0)[..., None]
        x = y.flatten(2, 3) @ tables.basis.float() + tables.mean[:, :, None]
        return x.unflatten(2, (count, BLOCK_TOKENS)).to(dtype)

    saliency = torch.rand(shape, generator=generator).square() / 100 + 1e-5
    return KVBlocks(draw(profile.keys[form]), draw(profile.values), saliency, first_position)
