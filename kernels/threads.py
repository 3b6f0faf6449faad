"""Ranges of work over a few threads, for kernels that release the interpreter lock.

They are torch's own OpenMP threads where torch has GNU's library: these go on spinning for
milliseconds after each of its operators, and threads beside them would get half of a core.

Numba's own thread pools are not used: one of them (``workqueue``, what is left where no OpenMP is
installed) ends the process when two threads call it at once, and all add seconds of compilation.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_NATIVE = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_SIZES = (ctypes.c_uint, ctypes.c_uint)
_REGION_CALL = ctypes.CFUNCTYPE(None, _REGION, ctypes.c_void_p, *_SIZES)
_NATIVE_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, *_SIZES)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="kernel")


@cache
def _library() -> Any:
    """Return the GNU OpenMP library that torch has loaded already, never another one; or None."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    shipped = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    for name in (*map(str, shipped), "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name, os.RTLD_NOLOAD)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel"):
            return library
    return None


@cache
def _team() -> Any:
    """Return what runs a Python function on each of a team of torch's threads, or None."""
    library = _library()
    return None if library is None else _REGION_CALL(("GOMP_parallel", library))


@cache
def _native_team() -> Any:
    """Return ``_team`` for addresses."""
    return _NATIVE_CALL(("GOMP_parallel", _library()))


class Addresses(NamedTuple):
    """Where C functions are that compiled code calls on a team; 0 where there is none.

    Attributes:
        thread: ``int f(void)``, which thread of the team runs, from 0.
        give_way: ``int f(void)``, lets another thread have the processor.
    """

    thread: int
    give_way: int


@cache
def addresses() -> Addresses:
    """Return what compiled code needs to know."""
    library = _library()
    thread = 0 if library is None else _address(library.omp_get_thread_num)
    return Addresses(thread, _address(ctypes.CDLL(None).sched_yield))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def on_team(function: int, argument: int, num_threads: int) -> None:
    """Call a C function on threads of a team, at most so many; returns when all have returned.

    The function must do all of the work also where there are fewer threads. It may not raise.

    Args:
        function: Address of ``void f(int64_t)``.
        argument: What each thread gets.
        num_threads: The caller's thread is one of them.
    """
    if num_threads > 1 and not _Child.forked and _library() is not None:
        _native_team()(function, argument, num_threads, 0)
    else:
        _NATIVE(function)(argument)


class _Child:
    """Whether this process was forked: GNU's threads are gone then, and would be waited for."""

    forked = False


def _start_child() -> None:
    _pool.cache_clear()  # a child process has no threads yet
    _Child.forked = True


os.register_at_fork(after_in_child=_start_child)


def for_ranges(work: Callable[[int, int], object], total: int, grain: int = 1) -> None:
    """Call ``work(start, stop)`` for ranges that cover 0 to ``total``, on several threads at once.

    Uses at most ``torch.get_num_threads()`` threads, the caller's among them, and returns when all
    are done. ``work`` must not call this function.

    Args:
        work: Handles one range; called with ``start < stop``.
        total: Items in all; zero calls nothing.
        grain: Items that are worth a thread of their own, about 20 microseconds of work.

    Raises:
        Exception: One that ``work`` raised, after all ranges have ended.
        RuntimeError: A range was left undone.
    """
    parts = max(1, min(torch.get_num_threads(), total // max(1, grain)))
    bounds = [total * part // parts for part in range(parts + 1)]
    ranges = [(a, b) for a, b in pairwise(bounds) if a < b]
    if len(ranges) < 2:
        for one in ranges:
            work(*one)
        return
    errors: list[BaseException] = []
    done: list[int] = []
    left = iter(ranges)

    def take(_: object = None) -> None:
        """Handle ranges until none is left; a team may have fewer threads than asked for."""
        _handle(work, left, done, errors)

    run = None if _Child.forked else _team()
    if run is not None:
        run(_REGION(take), None, len(ranges), 0)
    else:
        others = [_pool().submit(take) for _ in ranges[1:]]
        take()
        for other in others:
            other.result()
    if errors:
        raise errors[0]
    if len(done) < len(ranges):  # an interrupt between two ranges, which the team keeps to itself
        raise RuntimeError("work on threads was interrupted: part of it is not done")


def _handle(
    work: Callable[[int, int], object],
    left: Iterator[tuple[int, int]],
    done: list[int],
    errors: list[BaseException],
) -> None:
    for start, stop in left:  # a list's iterator gives each of its items to one thread
        try:
            work(start, stop)
            done.append(start)
        except BaseException as error:  # raised again by the caller's thread
            errors.append(error)
