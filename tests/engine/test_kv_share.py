"""What running sequences hold of the real model, with its own profile, against bf16."""

import pydoc_data.topics
from dataclasses import replace

import torch

from kvstrata.engine import Model, encode_text
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.engine.sequence import RunningSequence
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.presets import from_preset
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.engine.test_paged_rows import made
from tests.engine.test_sequence import opened


def test_blocks_read_in_place_and_newer_rows_take_about_a_sixth_of_bf16() -> None:
    """`balanced` as 8 sequences of 2,048 cached tokens and 33 newer ones hold it, tables included.

    Eight of a text's blocks stand for all, so that the test computes 512 tokens only. This text is
    one of the larger ones: .1687, where the 2,048 tokens of ``bench_decode.py`` take .1654.
    """
    model = Model.load(dtype=torch.bfloat16, device="cpu")
    balanced = from_preset("balanced", profile=model.profile)
    assert isinstance(balanced.codec, CalibratedCodec)
    method = replace(balanced, codec=replace(balanced.codec, form="frame"))
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    tokens = encode_text(model.tokenizer, text)[:2049]
    pool = KVPool(model, 96 << 20)
    sequence = RunningSequence(model, method, tokens[:512], pool=pool)
    for _ in sequence.compute(512):
        pass
    blocks = opened(sequence.seal(0, 8), method.wanted)
    sequence.cache.close()  # type: ignore[union-attr]
    caches = [PagedCache(pool, method.codec, tokens) for _ in range(8)]
    for cache in caches:
        cache.hold(blocks * 4, 0)
        assert cache.base == 32 * BLOCK_TOKENS
        cache.write(cache.base, *made(model, 33))
        assert cache.num_rows == 33
    bf16 = 8 * (2048 + 33) * model.spec.kv_bytes_per_token_bf16
    assert sum(cache.num_bytes for cache in caches) == pool.arena.used_bytes < pool.num_bytes
    assert pool.num_bytes / bf16 < 0.170
