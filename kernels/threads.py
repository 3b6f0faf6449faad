"""Ranges of work over a few threads, for kernels that release the interpreter lock.

Numba's own thread pools are not used: one of them (``workqueue``, what is left where no OpenMP is
installed) ends the process when two threads call it at once, and all add seconds of compilation.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="kernel")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has no threads yet


def for_ranges(work: Callable[[int, int], object], total: int, grain: int = 1) -> None:
    """Call ``work(start, stop)`` for ranges that cover 0 to ``total``, on several threads at once.

    Uses at most ``torch.get_num_threads()`` threads, the caller's among them, and returns when all
    are done. ``work`` must not call this function.

    Args:
        work: Handles one range; called with ``start < stop``.
        total: Items in all; zero calls nothing.
        grain: Items that are worth a thread of their own, about 20 microseconds of work.

    Raises:
        Exception: The first that ``work`` raised, after all ranges have ended.
    """
    parts = max(1, min(torch.get_num_threads(), total // max(1, grain)))
    bounds = [total * part // parts for part in range(parts + 1)]
    ranges = [(a, b) for a, b in pairwise(bounds) if a < b]
    if not ranges:
        return
    others = [_pool().submit(work, a, b) for a, b in ranges[1:]]
    try:
        work(*ranges[0])
    finally:
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error
