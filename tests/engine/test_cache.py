"""The cache of one sequence."""

import pytest
import torch

from kvstrata.engine import KVSpec, Model, SequenceCache

SPEC = KVSpec(
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float32, rope="pre",
    max_positions=100, vocab_size=10, eos_token_ids=frozenset(),
)  # fmt: skip


def _append(cache: SequenceCache, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 4, num_tokens, 8, generator=generator)
    for layer in range(2):
        keys = queries[layer, :2]
        cache.append(layer, queries[layer], keys, -keys)
    cache.advance(num_tokens)
    return queries


def test_bytes_per_token_count_keys_and_values_of_all_layers() -> None:
    assert SPEC.kv_bytes_per_token_bf16 == 2 * 2 * 8 * 2 * 2


def test_it_grows_by_doubling_and_keeps_what_it_holds() -> None:
    cache = SequenceCache(SPEC, 8)
    first = _append(cache, 7)
    second = _append(cache, 30, seed=1)
    assert (cache.length, cache.capacity) == (37, 64)
    assert cache.nbytes == 2 * 2 * 2 * 64 * 8 * 4
    keys, values = cache.read(0, 37)
    torch.testing.assert_close(keys, torch.cat([first, second], dim=2)[:, :2])
    torch.testing.assert_close(values, -keys)
    cache.grow(65)
    assert cache.capacity == 100


def test_it_refuses_to_grow_beyond_the_models_positions() -> None:
    cache = SequenceCache(SPEC, 8)
    with pytest.raises(ValueError, match="limit is 100"):
        cache.grow(101)
    with pytest.raises(ValueError, match=r"capacity must be in 1\.\.100"):
        SequenceCache(SPEC, 101)


def test_layers_written_one_by_one_read_back_together() -> None:
    source, target = SequenceCache(SPEC, 50), SequenceCache(SPEC, 4)
    _append(source, 40)
    keys, values = source.read(0, 40)
    target.write(0, keys[1:], values[1:], slice(1, 2))
    target.write(0, keys[:1].bfloat16().float(), values[:1], slice(0, 1))
    read_keys, read_values = target.read(0, 40)
    torch.testing.assert_close(read_keys[1], keys[1])
    torch.testing.assert_close(read_values, values)


def test_writes_that_leave_a_gap_or_have_a_wrong_shape_are_refused() -> None:
    cache = SequenceCache(SPEC, 50)
    block = torch.zeros(2, 2, 4, 8)
    with pytest.raises(ValueError, match="gap"):
        cache.write(1, block, block)
    with pytest.raises(ValueError, match="expected keys and values of shape"):
        cache.write(0, block[:1], block)
    with pytest.raises(ValueError, match="not within the 0 held"):
        cache.read(0, 1)


def test_a_cache_filled_in_inference_mode_can_be_written_outside_of_it() -> None:
    cache = SequenceCache(SPEC, 4)
    with torch.inference_mode():
        _append(cache, 20)
        cache.expect_probes(20, 30)
    cache.write(20, torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8))
    assert cache.length == 24


def test_probes_are_the_queries_of_the_expected_positions() -> None:
    cache = SequenceCache(SPEC, 64, probe_tokens=10)
    assert cache.probes()[1].tolist() == []
    cache.expect_probes(5, 40)
    assert cache.probe_rows == range(30, 40)
    parts = [_append(cache, 33), _append(cache, 1, seed=1)]
    assert cache.probes()[1].tolist() == [30, 31, 32, 33]
    parts.append(_append(cache, 16, seed=2))
    queries, positions = cache.probes()
    assert positions.tolist() == list(range(30, 40))
    torch.testing.assert_close(queries, torch.cat(parts, dim=2)[:, :, 30:40])


def test_truncation_forgets_tokens_and_their_probes() -> None:
    cache = SequenceCache(SPEC, 64)
    cache.expect_probes(10, 20)
    _append(cache, 20)
    cache.truncate(15)
    assert cache.length == 15
    assert cache.probes()[1].tolist() == list(range(10, 15))
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate(16)


def test_probes_and_cached_keys_reproduce_the_models_queries(models: dict[str, Model]) -> None:
    model = models["qwen3"]
    whole, chunked = model.new_cache(64), model.new_cache(64)
    for cache, cuts in ((whole, [60]), (chunked, [13, 40, 60])):
        cache.expect_probes(30, 60)
        first = 0
        for last in cuts:
            model.forward(cache, [5 + i % 90 for i in range(first, last)])
            first = last
    torch.testing.assert_close(whole.probes()[0], chunked.probes()[0], rtol=1e-4, atol=1e-4)
    assert whole.probes()[0].shape == (3, 6, 30, 16)
