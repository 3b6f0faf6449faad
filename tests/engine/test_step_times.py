"""Chunks of prompts are as large as the bound on a pass allows."""

import pytest

from kvstrata.engine.step_times import MAX_CHUNK, MIN_CHUNK, StepTimes


def learned(*, pass_s: float, token_s: float, max_stall: float = 2.2) -> StepTimes:
    times = StepTimes(max_stall)
    for _ in range(40):
        times.add(4, 0, pass_s)
        times.add(4, 100, pass_s + 100 * token_s)
    return times


def test_a_pass_with_a_chunk_keeps_the_bound() -> None:
    times = learned(pass_s=0.050, token_s=0.001)
    assert times.prompt_token_s == pytest.approx(0.001, rel=1e-3)
    assert times.chunk(4) == pytest.approx(60, abs=1)
    assert 0.050 + times.chunk(4) * 0.001 <= 2.2 * 0.050 + 0.001


@pytest.mark.parametrize(
    ("token_s", "chunk"), [(1.0, MIN_CHUNK), (1e-9, MAX_CHUNK)], ids=["slow", "fast"]
)
def test_a_chunk_is_neither_tiny_nor_endless(token_s: float, chunk: int) -> None:
    assert learned(pass_s=0.05, token_s=token_s).chunk(4) == chunk


def test_without_a_stream_there_is_nobody_to_wait() -> None:
    assert learned(pass_s=0.05, token_s=1.0).chunk(0) == MAX_CHUNK


def test_a_batch_that_was_never_seen_is_judged_by_the_nearest() -> None:
    times = learned(pass_s=0.05, token_s=0.001)
    times.add(9, 0, 0.2)
    assert times.pass_s(5) == pytest.approx(0.05)
    assert times.pass_s(8) == pytest.approx(0.2)


def test_one_slow_pass_does_not_upset_the_estimate() -> None:
    times = learned(pass_s=0.05, token_s=0.001)
    times.add(4, 0, 1.0)
    assert times.pass_s(4) < 0.25
    for _ in range(20):
        times.add(4, 0, 0.05)
    assert times.pass_s(4) == pytest.approx(0.05, rel=0.1)


def test_passes_that_something_disturbs_do_not_allow_longer_chunks() -> None:
    """Such as sealing, which runs beside passes just when no prompt is computed."""
    times = learned(pass_s=0.05, token_s=0.001)
    calm = times.chunk(4)
    for number in range(60):
        times.add(4, 0, 0.1 if number % 3 else 0.05)
    assert times.chunk(4) < 1.3 * calm
    for _ in range(300):  # it is slower for good
        times.add(4, 0, 0.1)
    assert times.pass_s(4) == pytest.approx(0.1, rel=0.01)


def test_the_first_guess_is_a_guess_and_nothing_fails() -> None:
    times = StepTimes(2.0)
    assert MIN_CHUNK <= times.chunk(3) <= MAX_CHUNK
    times.add(0, 64, 0.1)
    assert times.prompt_token_s == pytest.approx(0.1 / 64)


def test_a_pass_that_took_no_longer_for_its_prompt_does_not_end_the_estimate() -> None:
    """The first pass of all is cold, so that the second is faster although it does more."""
    times = StepTimes(2.0)
    times.add(1, 0, 1.0)
    times.add(1, 30, 0.5)
    assert times.chunk(1) == MAX_CHUNK
    assert times.prompt_token_s > 0
