"""Memory for large results: in huge pages, and used again once its tensor is gone.

First writes to fresh pages cost more than decoding into them: the system clears each page first,
and malloc gives blocks beyond 32 MiB back at once.
"""

import mmap
import threading
import weakref
from collections import deque

import numpy as np
import torch

LEAST_BYTES = 1 << 22
KEPT_BYTES = 1 << 27  # memory that is kept for later, at most
_HUGE_PAGE = 1 << 21


class _Pool:
    """Memory that no tensor uses any more.

    A tensor may end in any thread, also while this one is in here, so nothing waits for the lock:
    who does not get it takes fresh memory, or leaves what is over to the next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over: deque[mmap.mmap] = deque()  # the oldest first

    def take(self, num_bytes: int) -> mmap.mmap:
        """Return memory of ``num_bytes`` or up to twice as many, of any content."""
        size = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
        if self._lock.acquire(blocking=False):
            try:
                fitting = [m for m in self._over.copy() if size <= len(m) <= 2 * size]
                if fitting:
                    found = min(fitting, key=len)
                    self._over.remove(found)
                    return found
            finally:
                self._lock.release()
        fresh = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # changes nothing but speed, where the system takes it
            fresh.madvise(mmap.MADV_HUGEPAGE)
        return fresh

    def give(self, memory: mmap.mmap) -> None:
        """Keep memory for later, and let go of the oldest beyond the bound."""
        self._over.append(memory)
        if self._lock.acquire(blocking=False):
            try:
                while sum(map(len, self._over.copy())) > KEPT_BYTES:
                    self._over.popleft()
            finally:
                self._lock.release()


_pool = _Pool()


def empty_huge(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return ``torch.empty``; on a CPU and from 4 MiB on in huge pages, which are used again."""
    count = int(np.prod(shape, dtype=np.int64))
    num_bytes = count * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _pool.take(num_bytes)
    array = np.frombuffer(memory, np.uint8, num_bytes)
    weakref.finalize(array, _pool.give, memory).atexit = False
    return torch.from_numpy(array).view(dtype).view(shape)
