"""Hostile bytes at every door: refused by the right error, or harmless; never wrong, never large.

``KVSTRATA_FUZZ`` says how many inputs (``make fuzz``: a million), ``KVSTRATA_FUZZ_SEED`` which
ones; a failure prints the command that replays it.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.fuzz import calls, files, frames, messages, replies, texts
from tests.fuzz.campaign import COUNT, DEFAULT_COUNT, ONLY, Target, run
from tests.fuzz.mutation import MAX_GROWTH, mutate

SIMPLE = [*frames.TARGETS, *messages.TARGETS, *replies.TARGETS, *texts.TARGETS]
MAX_RSS_GROWTH = 128 << 20


@pytest.fixture(scope="module")
def bar() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Show how far a long run is; nothing for the default one."""
    columns = (
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=COUNT <= DEFAULT_COUNT, console=Console(width=80)) as progress:

        def start(name: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda count: progress.advance(task, count)

        yield start


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    before = psutil.Process().memory_info().rss
    yield
    grown = psutil.Process().memory_info().rss - before
    assert grown < MAX_RSS_GROWTH, f"memory grew by {grown:,} bytes"


def report(name: str, outcomes: Counter[str]) -> None:
    if COUNT > DEFAULT_COUNT:
        print(f"{name}: {sum(outcomes.values()):,} inputs, {dict(outcomes.most_common(12))}")


@pytest.mark.parametrize("target", SIMPLE, ids=lambda target: target.name)
def test_changed_bytes(target: Target, bar: Callable[[str, int], Callable[[int], None]]) -> None:
    with bounded_memory():
        run(target, bar(target.name, target.count))
    report(target.name, target.outcomes)


def test_changed_files_of_tenants_and_profiles(
    tmp_path: Path, bar: Callable[[str, int], Callable[[int], None]]
) -> None:
    for target in (texts.make_tenants(tmp_path), files.make_profiles(tmp_path)):
        with bounded_memory():
            run(target, bar(target.name, target.count))
        report(target.name, target.outcomes)


def test_changed_files_of_blocks(
    tmp_path: Path, bar: Callable[[str, int], Callable[[int], None]]
) -> None:
    with files.damaged_disk(tmp_path) as target, bounded_memory():
        run(target, bar(target.name, target.count))
    report(target.name, target.outcomes)


def test_every_call_has_an_example() -> None:
    assert sorted(calls.CORPUS) == sorted(calls.METHODS)


async def test_changed_calls(bar: Callable[[str, int], Callable[[int], None]]) -> None:
    with bounded_memory():
        outcomes = await calls.run(bar("calls", COUNT * calls.SHARE // 1000))
    report("calls", outcomes)
    if not ONLY:
        assert outcomes["answered"] > COUNT * calls.SHARE // 10_000
        assert {"MalformedMessageError", "InvalidRequestError"} <= set(outcomes)


def test_the_count_is_of_frames_and_messages_alone() -> None:
    targets = [*frames.TARGETS, *messages.TARGETS]
    assert sum(target.share for target in targets) + calls.SHARE == 1000


def test_changes_are_changes_and_can_be_repeated() -> None:
    data = bytes(range(200))
    made = [mutate(data, random.Random(seed), [data, b"other"]) for seed in range(500)]
    assert made == [mutate(data, random.Random(seed), [data, b"other"]) for seed in range(500)]
    assert sum(changed != data for changed in made) > 480
    assert len({len(changed) for changed in made}) > 50
    assert max(map(len, made)) <= len(data) + MAX_GROWTH
