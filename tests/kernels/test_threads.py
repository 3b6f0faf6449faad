"""Ranges over threads: each item once, errors raised, no more threads than torch's."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from kvstrata.kernels import threads
from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.threads import for_ranges


@pytest.fixture(params=[1, 2, 5, "2 of our own"])
def num_threads(request: pytest.FixtureRequest, monkeypatch) -> Iterator[int]:
    before, count = torch.get_num_threads(), request.param
    if isinstance(count, str):
        count = 2
        monkeypatch.setattr(threads, "_team", lambda: None)
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


@pytest.mark.parametrize("total", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("grain", [0, 1, 3, 5000])
def test_every_item_is_handled_once_by_few_threads(num_threads, total, grain):
    handled: list[int] = []
    threads: set[int] = set()

    def work(start: int, stop: int) -> None:
        assert start < stop
        handled.extend(range(start, stop))
        threads.add(threading.get_ident())

    for_ranges(work, total, grain)
    assert sorted(handled) == list(range(total))
    assert len(threads) <= num_threads


@pytest.mark.parametrize("bad", [0, 99])
def test_an_error_is_raised_after_all_have_ended(num_threads, bad):
    ended = []

    def work(start: int, stop: int) -> None:
        if start <= bad < stop:
            raise ValueError("broken item")
        ended.append(start)

    with pytest.raises(ValueError, match="broken item"):
        for_ranges(work, 100)
    assert len(ended) == num_threads - 1


def test_a_range_that_is_left_undone_is_told(num_threads, monkeypatch):
    # As after an interrupt in the callback, which ctypes prints and does not raise.
    monkeypatch.setattr(threads, "_team", lambda: lambda region, *_: None)
    if num_threads > 1:
        with pytest.raises(RuntimeError, match="not done"):
            for_ranges(lambda start, stop: None, 100)


def test_callers_on_several_threads_do_not_disturb_each_other():
    sums = [0] * 8

    def call(index: int) -> None:
        parts: list[int] = []
        for _ in range(50):
            for_ranges(lambda a, b: parts.append(sum(range(a, b))), 100)
        sums[index] = sum(parts)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sums == [50 * 4950] * 8


def test_torchs_own_threads_are_used_where_torch_has_gnus_library():
    has_library = any(
        name.startswith("libgomp")
        for name in os.listdir(os.path.join(os.path.dirname(torch.__file__), "lib"))
    )
    assert (threads._team() is not None) == has_library


_FORKING = """
import os, torch
from kvstrata.kernels.threads import for_ranges
torch.set_num_threads(2)
found = []
for_ranges(lambda a, b: found.append((a, b)), 10)
child = os.fork()
if child == 0:
    for_ranges(lambda a, b: found.append((a, b)), 10)
    os._exit(0 if sorted(found) == [(0, 5), (0, 5), (5, 10), (5, 10)] else 1)
assert os.waitpid(child, 0)[1] == 0
"""


_FORKING_COMPILED = """
import os, numpy as np, torch
from kvstrata.kernels.compiled import c_function
from kvstrata.kernels.atoms_numba import add_at, array_at
from kvstrata.kernels.threads import on_team

@c_function
def count(address):
    add_at(array_at(address, np.int64), 0, 1)

calls = np.zeros(1, np.int64)
on_team(count.address, calls.ctypes.data, 2)
assert 1 <= calls[0] <= 2
calls[:] = 0
child = os.fork()
if child == 0:
    on_team(count.address, calls.ctypes.data, 2)
    os._exit(0 if calls[0] == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_compiled_code_runs_on_the_callers_thread_alone_in_a_forked_child(tmp_path):
    (tmp_path / "forking.py").write_text(_FORKING_COMPILED)  # Numba reads its source
    command = [sys.executable, "-P", "-W", "ignore", str(tmp_path / "forking.py")]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0


def test_a_forked_child_does_not_wait_for_threads_that_its_parent_has():
    command = [sys.executable, "-P", "-W", "ignore", "-c", _FORKING]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0


def test_the_version_follows_the_device():
    assert backend_of(torch.zeros(1)) == "numba"
    assert backend_of(torch.zeros(1, device="meta")) == "reference"
    with pytest.raises(ValueError, match=r"one device, not on \['cpu', 'meta'\]"):
        backend_of(torch.zeros(1), torch.zeros(1, device="meta"))
