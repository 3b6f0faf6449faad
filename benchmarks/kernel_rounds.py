"""Times implementations of one op in rounds: each runs once in every round, in turning order.

So noise of the machine hits all alike. A ratio is taken within each round; the median counts.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

MEMCPY = "memcpy"
MIN_ROUNDS = 7


@dataclass
class Entry:
    """One implementation.

    Attributes:
        impl: Its name.
        call: What is timed.
        num_bytes: bf16 KV that one call takes in or gives out.
        limits: The impls whose slowest is the speed that this one can reach.
        is_ours: Whether it is KVStrata's; only then it is held against the others.
    """

    impl: str
    call: Callable[[], object]
    num_bytes: int
    limits: tuple[str, ...] = (MEMCPY,)
    is_ours: bool = False


@dataclass
class Contest:
    """Implementations of one op on one shape; memcpy of as many bytes takes part by itself.

    Attributes:
        op: Its name.
        shape: For people.
        entries: The others than memcpy.
        tokens: Cached tokens, where they make the difference.
        num_layers: Where times shall be of one layer: how many a call goes through.
    """

    op: str
    shape: str
    entries: list[Entry]
    tokens: int | None = None
    num_layers: int = 1

    def with_memcpy(self) -> list[Entry]:
        """Return all entries, memcpy first."""
        num_bytes = max(entry.num_bytes for entry in self.entries)
        source = torch.ones(num_bytes // 2, dtype=torch.bfloat16)
        target = torch.zeros_like(source)
        return [Entry(MEMCPY, lambda: target.copy_(source), num_bytes), *self.entries]


def measure(
    contest: Contest, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """Return one row per implementation, memcpy's first."""
    entries = contest.with_memcpy()
    for entry in entries:
        entry.call()
    times: dict[str, list[float]] = {entry.impl: [] for entry in entries}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for entry in _turned(entries, number):
                start = clock()
                entry.call()
                times[entry.impl].append(clock() - start)
    finally:
        gc.enable()
    rates = {
        entry.impl: [entry.num_bytes / seconds / 1e9 for seconds in times[entry.impl]]
        for entry in entries
    }
    return [_row(contest, entry, entries, times[entry.impl], rates) for entry in entries]


def _turned(entries: Sequence[Entry], number: int) -> Iterator[Entry]:
    first = number % len(entries)
    yield from entries[first:]
    yield from entries[:first]


def _row(
    contest: Contest,
    entry: Entry,
    entries: Sequence[Entry],
    times: Sequence[float],
    rates: dict[str, list[float]],
) -> dict[str, Any]:
    mine = rates[entry.impl]
    limit = [min(one) for one in zip(*(rates[name] for name in entry.limits), strict=True)]
    row = {
        "bench": "kernels",
        "op": contest.op,
        "impl": entry.impl,
        "shape": contest.shape,
        "tokens": contest.tokens,
        "gbps": median(mine),
        "of_memcpy": _ratio(mine, rates[MEMCPY]),
        "of_limit": _ratio(mine, limit),
        "seconds": median(times) / contest.num_layers,
        "spread": [end / contest.num_layers for end in (min(times), max(times))],
        "rounds": len(times),
        "mb": entry.num_bytes / 1e6,
    }
    if entry.is_ours:
        row["over"] = {
            other.impl: _ratio(mine, rates[other.impl]) for other in entries if not other.is_ours
        }
    return row


def _ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    return median(a / b for a, b in zip(mine, other, strict=True))
