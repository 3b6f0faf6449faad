"""Rows in pages are what was written, whatever is reserved, dropped and moved meanwhile."""

import random

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.kv_arena import ArenaFullError
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.paged_rows import PagedRows
from kvstrata.engine.row_buffer import RowBuffer
from kvstrata.kernels.row_pages import PAGE_TOKENS


@pytest.fixture
def pool(models: dict[str, Model]) -> KVPool:
    return KVPool(models["llama"], 1 << 20, max_sequences=3)


def made(model: Model, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as a cache has them: (layers, heads, n, D)."""
    spec = model.spec
    keys, values = torch.randn(2, spec.num_layers, spec.num_kv_heads, count, spec.head_dim).to(
        spec.dtype
    )
    return keys, values


def bytes_of(pool: KVPool, num_rows: int) -> int:
    """Return what rows take: whole pages, then a tail's and one per KV head, if those are fewer."""
    per_step = pool.pages_per_step
    columns, left = divmod(num_rows, PAGE_TOKENS)
    tail = -(-left * per_step // PAGE_TOKENS) + pool.model.spec.num_kv_heads
    return pool.arena.page_bytes * (columns * per_step + (min(tail, per_step) if left else 0))


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 33, 64])
def test_rows_take_their_bytes_and_hardly_more(pool: KVPool, count: int) -> None:
    rows = PagedRows(pool, pool.take_slot())
    for n in range(count + 1):
        rows.reserve(n)
        assert rows.num_bytes == pool.arena.used_bytes == bytes_of(pool, n)
        spare = rows.num_bytes - RowBuffer.bytes_for(pool.model.spec, n)
        assert 0 <= spare < pool.arena.page_bytes * (1 + pool.model.spec.num_kv_heads)
    rows.release()
    assert rows.num_bytes == pool.arena.used_bytes == 0
    pool.check_integrity()


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_writes_and_drops_keeps_the_rows(pool: KVPool, seed: int) -> None:
    rng = random.Random(seed)
    model = pool.model
    held: list[tuple[PagedRows, list[torch.Tensor]]] = []
    for _ in range(3):
        held.append((PagedRows(pool, pool.take_slot()), list(made(model, 0))))
    for _ in range(120):
        rows, have = rng.choice(held)
        kind, count = rng.randrange(4), have[0].shape[2]
        if kind == 0 and count > 2 * PAGE_TOKENS:
            rows.drop(PAGE_TOKENS)
            have[:] = [part[:, :, PAGE_TOKENS:] for part in have]
        elif kind == 1 and rng.random() < 0.2:
            rows.release()
            have[:] = made(model, 0)
        else:
            first = rng.randrange(max(0, count - 3), count + 1)
            new = made(model, rng.choice([1, 1, 2, 20]))
            rows.reserve(max(count, first + new[0].shape[2]))
            for layer in range(model.spec.num_layers):
                own = slice(layer, layer + 1)
                rows.write(first, new[0][own], new[1][own], own)
            have[:] = [
                torch.cat([old[:, :, :first], part, old[:, :, first + part.shape[2] :]], 2)
                for old, part in zip(have, new, strict=True)
            ]
        total = have[0].shape[2]
        begin = rng.randrange(total + 1)
        for got, wanted in zip(rows.read(begin, total), have, strict=True):
            assert torch.equal(got, wanted[:, :, begin:])
        for got, wanted in zip(rows.read(0, total, slice(1, 2)), have, strict=True):
            assert torch.equal(got, wanted[1:2])
        pool.check_integrity()
        assert pool.arena.used_bytes == sum(each.num_bytes for each, _ in held)
    for rows, _ in held:
        rows.release()
    assert pool.arena.used_bytes == 0


@pytest.mark.parametrize("count", [0, 1, 14, 15, 16, 40])
def test_a_buffer_s_rows_are_taken_over(pool: KVPool, count: int) -> None:
    buffer = RowBuffer(pool.model.spec, pool.arena, count + 1)
    new = made(pool.model, count)
    buffer.keys[:, :, :count], buffer.values[:, :, :count] = new
    rows = PagedRows(pool, pool.take_slot())
    rows.take_over(buffer, count)
    for got, wanted in zip(rows.read(0, count), new, strict=True):
        assert torch.equal(got, wanted)
    assert rows.num_bytes == pool.arena.used_bytes == bytes_of(pool, count + 1)


def test_without_room_the_rows_stay(pool: KVPool) -> None:
    rows, new = PagedRows(pool, pool.take_slot()), made(pool.model, 8)
    rows.reserve(8)
    rows.write(0, *new)
    before = rows.num_bytes
    pool.arena.take_pages(pool.arena.free_bytes // pool.arena.page_bytes)
    with pytest.raises(ArenaFullError):
        rows.reserve(9)
    assert rows.num_bytes == before
    for got, wanted in zip(rows.read(0, 8), new, strict=True):
        assert torch.equal(got, wanted)


def test_without_a_tail_all_rows_are_in_pages_of_their_heads(pool: KVPool) -> None:
    rows, new = PagedRows(pool, pool.take_slot(), shares_tail=False), made(pool.model, 40)
    for count in range(1, 41):
        rows.reserve(count)
        columns = -(-count // PAGE_TOKENS)
        assert rows.num_bytes == columns * pool.pages_per_step * pool.arena.page_bytes
        assert not rows.has_tail
        rows.write(count - 1, *(part[:, :, count - 1 : count] for part in new))
    for got, wanted in zip(rows.read(0, 40), new, strict=True):
        assert torch.equal(got, wanted)
    rows.release()
    assert pool.arena.used_bytes == 0
