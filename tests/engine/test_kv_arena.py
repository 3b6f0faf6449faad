"""The arena hands every byte to one holder, keeps what they wrote, and never grows."""

import random
import resource

import numpy as np
import pytest
import torch

from kvstrata.engine.kv_arena import ArenaFullError, Extent, KVArena

PAGE = 256


def filled(arena: KVArena) -> tuple[list[Extent], list[int]]:
    """Fill an arena with extents of 1,024 bytes, but every eighth movable; returns moves made."""
    moves: list[int] = []
    extents = []
    while arena.free_bytes >= 1024:
        index = len(extents)
        on_move = moves.append if index % 8 else None
        extents.append(arena.allocate(1024, on_move))
        arena.view(extents[-1]).fill_(index)
    return extents, moves


def test_extents_and_pages_share_the_memory_up_to_its_last_byte() -> None:
    arena = KVArena(16 * PAGE, PAGE)
    extent = arena.allocate(10 * PAGE - 5)
    pages = arena.take_pages(6)
    assert arena.free_bytes == 0
    assert pages.tolist() == [15, 14, 13, 12, 11, 10]
    for take in (lambda: arena.allocate(1), lambda: arena.take_pages(1)):
        with pytest.raises(ArenaFullError):
            take()
    arena.release(extent)
    arena.release_pages(pages)
    arena.check_integrity()
    assert arena.allocate(16 * PAGE).offset == 0


def test_what_was_touched_costs_no_page_faults() -> None:
    arena = KVArena(64 << 20, PAGE)
    arena.touch(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arena.view(arena.allocate(16 << 20)).fill_(1)
    arena.memory[-16 << 20 :].fill_(1)
    pages = (32 << 20) // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages / 50
    small = KVArena(2 * PAGE, PAGE)
    small.touch(1 << 30)
    assert small.take_pages(2).tolist() == [1, 0]


def test_an_extent_takes_the_smallest_gap() -> None:
    arena = KVArena(64 * PAGE, PAGE)
    large, _, small, _ = (arena.allocate(n * PAGE) for n in (8, 1, 3, 1))
    arena.release(large)
    arena.release(small)
    assert arena.allocate(2 * PAGE).offset == 9 * PAGE
    assert arena.allocate(4 * PAGE).offset == 0


def test_gaps_are_closed_when_only_then_an_extent_fits() -> None:
    arena = KVArena(64 * 1024, PAGE)
    extents, moves = filled(arena)
    for extent in extents[1::2]:
        arena.release(extent)
    kept = range(0, len(extents), 2)
    assert not moves
    new = arena.allocate(3000)
    assert moves
    assert arena.view(new).numel() == 3008
    for i in kept:
        assert bool((arena.view(extents[i]) == i).all())
    assert all(extents[i].offset == 1024 * i for i in kept if i % 8 == 0)
    arena.check_integrity()


def test_pages_get_room_by_moving_extents() -> None:
    arena = KVArena(16 * PAGE, PAGE)
    first = arena.allocate(8 * PAGE, lambda _: None)
    second = arena.allocate(8 * PAGE, lambda _: None)
    arena.view(second).fill_(7)
    arena.release(first)
    assert len(arena.take_pages(8)) == 8
    assert second.offset == 0
    assert bool((arena.view(second) == 7).all())


def test_free_pages_at_the_lower_end_go_back() -> None:
    arena = KVArena(16 * PAGE, PAGE)
    pages = arena.take_pages(16)
    arena.release_pages(pages[pages < 8])
    arena.check_integrity()
    arena.allocate(8 * PAGE)
    assert arena.free_bytes == 0


def test_an_extent_shrinks_and_never_grows() -> None:
    arena = KVArena(16 * PAGE, PAGE)
    extent = arena.allocate(4 * PAGE)
    for size in (0, 4 * PAGE + 1):
        with pytest.raises(ValueError, match="cannot shrink"):
            arena.shrink(extent, size)
    arena.shrink(extent, PAGE + 1)
    assert arena.used_bytes == extent.num_bytes == PAGE + 64
    arena.check_integrity()


def test_nobody_releases_what_he_does_not_hold() -> None:
    arena = KVArena(16 * PAGE, PAGE)
    extent, pages = arena.allocate(5), arena.take_pages(2)
    arena.release(extent)
    for release in (
        lambda: arena.release(extent),
        lambda: arena.release_pages(np.array([0], np.int32)),
        lambda: arena.release_pages(np.concatenate([pages, pages])),
    ):
        with pytest.raises(ValueError, match="once, by its holder"):
            release()
    arena.release_pages(pages)
    arena.check_integrity()


@pytest.mark.parametrize(("capacity", "page"), [(100, 256), (1024, 100), (1024, 0)])
def test_sizes_that_make_no_sense_are_refused(capacity: int, page: int) -> None:
    with pytest.raises(ValueError, match="page"):
        KVArena(capacity, page)


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_random_operations_keep_every_byte(seed: int) -> None:
    """Against a plain model: who holds what, and what he wrote there."""
    rng = random.Random(seed)
    arena = KVArena(200 * PAGE, PAGE)
    extents: dict[Extent, int] = {}
    pages: dict[int, int] = {}
    for step in range(1500):
        mark = step % 251
        kind = rng.randrange(5)
        try:
            if kind == 0:
                on_move = (lambda _: None) if rng.random() < 0.8 else None
                extent = arena.allocate(rng.randrange(1, 20 * PAGE), on_move)
                arena.view(extent).fill_(mark)
                extents[extent] = mark
            elif kind == 1:
                for page in arena.take_pages(rng.randrange(1, 9)).tolist():
                    arena.memory.view(-1, PAGE)[page] = mark
                    pages[page] = mark
        except ArenaFullError:
            pass
        if kind == 2 and extents:
            extent = rng.choice(list(extents))
            assert bool((arena.view(extent) == extents.pop(extent)).all())
            arena.release(extent)
        elif kind == 3 and pages:
            chosen = rng.sample(list(pages), min(len(pages), rng.randrange(1, 6)))
            for page in chosen:
                assert bool((arena.memory.view(-1, PAGE)[page] == pages.pop(page)).all())
            arena.release_pages(np.array(chosen, np.int32))
        elif kind == 4 and extents:
            extent = rng.choice(list(extents))
            count = rng.randrange(1, 25)
            if arena.can_replace(extent, count):  # then it never fails half way
                size, mark = extent.num_bytes, extents.pop(extent)
                for left in reversed(range(count)):
                    assert bool((arena.view(extent) == mark).all())
                    if left:
                        arena.shrink(extent, max(1, size * left // count))
                    else:
                        arena.release(extent)
                    page = int(arena.take_pages(1)[0])
                    arena.memory.view(-1, PAGE)[page] = mark
                    pages[page] = mark
        arena.check_integrity()
        held = sum(e.num_bytes for e in extents) + PAGE * len(pages)
        assert arena.used_bytes == held
    for extent, mark in extents.items():
        assert bool((arena.view(extent) == torch.tensor(mark)).all())
