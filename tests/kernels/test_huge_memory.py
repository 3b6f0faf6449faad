"""Memory of large results is used again when, and only when, nothing refers to it any more."""

import gc
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvstrata.kernels import huge_memory
from kvstrata.kernels.huge_memory import empty_huge

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> huge_memory._Pool:
    """A pool of its own, of 4 MiB at most, for all tensors of 1 MiB or more."""
    monkeypatch.setattr(huge_memory, "LEAST_BYTES", SIZE)
    monkeypatch.setattr(huge_memory, "KEPT_BYTES", 4 * SIZE)
    monkeypatch.setattr(huge_memory, "_pool", huge_memory._Pool())
    return huge_memory._pool


def sizes(pool: huge_memory._Pool) -> list[int]:
    gc.collect()
    return [len(memory) for memory in pool._over]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64], ids=str
)
def test_it_has_the_shape_and_dtype(dtype: torch.dtype) -> None:
    for shape in ((3, SIZE), (SIZE // dtype.itemsize,), (1, 7, 5), (0, SIZE), ()):
        tensor = empty_huge(shape, dtype)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert (tensor.zero_() == 0).all()


def test_memory_is_used_again_once_the_last_view_is_gone(pool: huge_memory._Pool) -> None:
    tensor = empty_huge((2 * SIZE,), torch.uint8)
    place, view = tensor.data_ptr(), tensor.view(2, SIZE)[1].numpy()
    del tensor
    assert sizes(pool) == []
    assert empty_huge((2 * SIZE,), torch.uint8).data_ptr() != place
    del view
    assert 2 * SIZE in sizes(pool)
    held = [empty_huge((SIZE + 1,), torch.uint8) for _ in range(2)]
    assert place in [tensor.data_ptr() for tensor in held]
    assert len({tensor.data_ptr() for tensor in held}) == 2


def test_what_is_kept_has_a_bound_and_what_is_too_large_is_not_used(
    pool: huge_memory._Pool,
) -> None:
    held = [empty_huge((2 * SIZE,), torch.uint8) for _ in range(5)]
    held.append(empty_huge((8 * SIZE,), torch.uint8))
    held.clear()
    assert sum(sizes(pool)) <= huge_memory.KEPT_BYTES
    pool._over.clear()
    pool.give(mmap.mmap(-1, 4 * SIZE))
    tensor = empty_huge((SIZE,), torch.uint8)  # 2 MiB, half of what is there
    assert sizes(pool) == []
    del tensor
    pool._over.clear()
    pool._over.append(mmap.mmap(-1, 6 * SIZE))
    tensor = empty_huge((SIZE,), torch.uint8)
    assert len(pool._over) == 1
    del tensor


def test_nothing_waits_for_the_lock(pool: huge_memory._Pool) -> None:
    """A tensor may end, by garbage collection, in the very thread that holds the lock."""
    with pool._lock:
        tensor = empty_huge((SIZE,), torch.uint8)
        del tensor
        assert len(sizes(pool)) == 1


def test_threads_never_share_memory(pool: huge_memory._Pool) -> None:
    def work(number: int) -> bool:
        good = True
        for _ in range(20):
            tensor = empty_huge((SIZE,), torch.uint8).fill_(number)
            good &= bool((tensor == number).all())
        return good

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
