"""Profiles of the tiny models, made from their own caches."""

import torch

from kvstrata.engine import Model
from kvstrata.engine.cache_statistics import CacheStatistics, Segment
from kvstrata.methods.profile import Profile
from tests.engine.families import VOCAB_SIZE
from tests.methods.profiles import make_rates


def tokens_of(length: int, seed: int = 1) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())


def segment_of(context: int = 150, continuation: int = 40, seed: int = 1) -> Segment:
    ids = tokens_of(context + continuation, seed)
    return Segment(ids[:context], ids[context:])


def profile_of(model: Model, num_segments: int = 2) -> Profile:
    statistics = CacheStatistics(model, 1)
    generator = torch.Generator().manual_seed(0)
    for seed in range(num_segments):
        statistics.add(segment_of(seed=seed), generator)
    keys, values = statistics.fit()
    return Profile(model.model_id, keys, values, 1, make_rates(), note=model.name)
