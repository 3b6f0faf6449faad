"""The papers' stages through real nodes and a real store."""

import pytest

from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import Method
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.methods.zipvl import ZipVL
from kvstrata.prefill_node import WorkerConfig
from tests.prefill_node.nodes import (
    BALANCED,
    EXACT,
    decoded,
    prefilled,
    prompt_of,
    running,
    task_of,
)

PROMPT = prompt_of(200)  # three shared blocks and a rest
PUBLISHED = ZipCacheCodec(ZipCache())
EVICT, SPARSE = H2O(heavy=0.1, recent=0.1, sinks=1), ZipVL(tau=0.7, min_tokens=10)
METHODS = {
    "h2o on balanced": Method(BALANCED.codec, pipeline=Pipeline.of(EVICT)),
    "h2o on exact": Method(EXACT.codec, pipeline=Pipeline.of(EVICT)),
    "zipcache": Method(PUBLISHED, pipeline=Pipeline.of(PUBLISHED.stage)),
    "zipvl": Method(PUBLISHED, pipeline=Pipeline.of(SPARSE, PUBLISHED.stage)),
    "all": Method(
        PUBLISHED, pipeline=Pipeline.of(ZipVL(tau=0.7, rest="evict"), EVICT, PUBLISHED.stage)
    ),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
async def test_a_hit_a_miss_and_a_replay_give_the_same_tokens(
    config: WorkerConfig, method: Method
) -> None:
    async with running(config) as nodes:
        alone = await decoded(nodes.decode, task_of(PROMPT, method, max_tokens=12))
    async with LocalStore() as store, running(config, store.address) as nodes:
        report = await prefilled(nodes.prefill, task_of(PROMPT, method))
        assert report.committed_blocks == 3
        hit = await decoded(nodes.decode, task_of(PROMPT, method, expected_blocks=3, max_tokens=12))
        assert hit.reasons == {}
        assert hit.cache.bytes_fetched > 0
        replayed = await decoded(
            nodes.decode,
            task_of(PROMPT, method, expected_blocks=3, generated=alone.tokens[:5], max_tokens=12),
        )
    assert hit.tokens == alone.tokens
    assert replayed.tokens == alone.tokens[5:]


async def test_the_report_says_what_was_kept_and_how_many_bits_each_layer_has(
    config: WorkerConfig,
) -> None:
    async with running(config) as nodes:
        plain = await decoded(nodes.decode, task_of(PROMPT))
        evicting = await decoded(nodes.decode, task_of(PROMPT, METHODS["h2o on balanced"]))
        exact = await decoded(nodes.decode, task_of(PROMPT, EXACT))
    assert plain.cache.kept_fraction == 1.0
    assert evicting.cache.kept_fraction == pytest.approx(40 / 207, abs=0.01)
    # Layer 0 is recomputed; the others have 4.7 bits, and layers of a tiny head more.
    assert plain.cache.layer_bits[0] == 0
    assert all(4 < bits < 16 for bits in plain.cache.layer_bits[1:])
    assert list(evicting.cache.layer_bits) == list(plain.cache.layer_bits)
    assert len(exact.cache.layer_bits) == 3
    assert all(20 < bits < 40 for bits in exact.cache.layer_bits)


async def test_what_is_generated_after_eviction_is_not_stored(config: WorkerConfig) -> None:
    async with LocalStore() as store, running(config, store.address) as nodes:
        answer = await decoded(
            nodes.decode, task_of(PROMPT, METHODS["h2o on balanced"], max_tokens=120)
        )
        assert answer.cache.committed_blocks == 3  # the prompt's, whole, for every question
        plain = await decoded(nodes.decode, task_of(PROMPT, max_tokens=120))
    assert plain.cache.bytes_fetched > 0
    assert plain.cache.committed_blocks == 1  # the one that filled: nobody had stored it


async def test_an_evicting_request_reads_what_others_stored(config: WorkerConfig) -> None:
    async with LocalStore() as store, running(config, store.address) as nodes:
        await prefilled(nodes.prefill, task_of(PROMPT))
        answer = await decoded(
            nodes.decode, task_of(PROMPT, METHODS["h2o on balanced"], expected_blocks=3)
        )
    assert answer.reasons == {}
    assert answer.cache.bytes_fetched > 0
    assert answer.cache.kept_fraction < 0.25
