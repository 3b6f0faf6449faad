"""Made-up models whose layers predict one another, and profiles fitted to them."""

from dataclasses import replace
from functools import lru_cache

import torch

from kvstrata.methods import KVBlocks
from kvstrata.methods.prediction_fit import fit_prediction
from kvstrata.methods.profile import Profile
from kvstrata.protos import BLOCK_TOKENS
from tests.methods.profiles import blocks_of, make_profile, make_rates

KINSHIP = 0.9  # how much of a vector comes from the layer before and from its own layer's values


def kin_of(blocks: KVBlocks) -> KVBlocks:
    """Return blocks whose layers resemble the ones before, and keys their layer's values."""
    layers = blocks.keys.shape[0]
    keys, values = (part.float().clone() for part in (blocks.keys, blocks.values))
    rest = (1 - KINSHIP**2) ** 0.5
    for layer in range(layers):
        if layer:
            values[layer] = KINSHIP * values[layer - 1].flip(-1) + rest * values[layer]
        shared = values[layer] if not layer else keys[layer - 1]
        keys[layer] = KINSHIP * shared + rest * keys[layer]
    return replace(blocks, keys=keys.to(blocks.keys.dtype), values=values.to(blocks.values.dtype))


@lru_cache(8)
def predicting_profile(layers: int = 2, heads: int = 2, dim: int = 32) -> Profile:
    """Return a made-up profile with a prediction fitted to what ``kin_of`` returns."""
    profile = make_profile(layers, heads, dim)
    count = max(16, 8 * heads * dim // BLOCK_TOKENS)
    samples = kin_of(blocks_of(profile, count, outliers=0.0, seed=5))

    def read(layer: int) -> torch.Tensor:
        both = torch.cat([samples.values[layer], samples.keys[layer]])
        return both.flatten(1, 2).transpose(0, 1).flatten(1).float()

    prediction = fit_prediction(read, profile, 0.05, lambda done: None)
    return replace(profile, prediction=replace(prediction, rates=make_rates()))
