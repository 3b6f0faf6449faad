"""Running many changed inputs against a target: counted, bounded in memory, and replayable."""

import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_COUNT = 20_000
COUNT = int(os.environ.get("KVSTRATA_FUZZ", DEFAULT_COUNT))
SEED = int(os.environ.get("KVSTRATA_FUZZ_SEED", 1))
ONLY = os.environ.get("KVSTRATA_FUZZ_ONLY", "")  # "frames:12345" runs that one input
MEASURED_EVERY = 101
MAX_PEAK_BYTES = 2 << 20
MAX_PEAK_PER_BYTE = 64


@dataclass
class Target:
    """What is fuzzed.

    Attributes:
        name: In messages and in ``KVSTRATA_FUZZ_ONLY``.
        share: Of ``COUNT``, in 1/1000; frames and messages have 1000, texts and files come on top.
        make: Returns the input of a number's random source.
        check: Tries it; returns one word for what came of it, raises for what must not be.
        wanted: Outcomes that must have been seen; a target that always refuses tests little.
    """

    name: str
    share: int
    make: Callable[[random.Random], Any]
    check: Callable[[Any], str]
    wanted: Sequence[str] = ()
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """How many inputs it gets."""
        return max(1, COUNT * self.share // 1000)

    def source(self, number: int) -> random.Random:
        """Return what input ``number`` is drawn from."""
        return random.Random(f"{SEED}/{self.name}/{number}")


class FuzzError(AssertionError):
    """An input that did what no input may do; the message replays it."""


def run(target: Target, advance: Callable[[int], None] = lambda count: None) -> None:
    """Try every input of a target, or the one that ``KVSTRATA_FUZZ_ONLY`` names."""
    name, _, number = ONLY.partition(":")
    if ONLY and name != target.name:
        return
    numbers = [int(number)] if ONLY else range(target.count)
    for count, n in enumerate(numbers):
        _try(target, n, is_measured=count % MEASURED_EVERY == 0)
        if count % 1000 == 999:
            advance(1000)
    if not ONLY:
        missing = set(target.wanted) - set(target.outcomes)
        assert not missing, f"{target.name}: never {missing}, only {dict(target.outcomes)}"


def _try(target: Target, number: int, *, is_measured: bool) -> None:
    made = target.make(target.source(number))
    try:
        outcome = _within_memory(target, made) if is_measured else target.check(made)
    except Exception as error:
        raise FuzzError(replay(target, number, error)) from error
    target.outcomes[outcome] += 1


def replay(target: Target, number: int, error: BaseException) -> str:
    """Return what happened and the command that does it again."""
    return (
        f"{target.name}: {type(error).__name__}: {error}\nreplay: KVSTRATA_FUZZ_SEED={SEED} "
        f"KVSTRATA_FUZZ_ONLY={target.name}:{number} pytest tests/fuzz"
    )


def _within_memory(target: Target, made: Any) -> str:
    """Try an input and measure what it allocates at its worst."""
    tracemalloc.start()
    try:
        outcome = target.check(made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    bound = MAX_PEAK_BYTES + MAX_PEAK_PER_BYTE * size_of(made)
    assert peak <= bound, f"{peak:,} bytes allocated for an input of {size_of(made):,}"
    return outcome


def size_of(made: Any) -> int:
    """Return the bytes of an input, whatever its shape."""
    if isinstance(made, bytes | bytearray | str):
        return len(made)
    if isinstance(made, Sequence):
        return sum(map(size_of, made))
    return 16
