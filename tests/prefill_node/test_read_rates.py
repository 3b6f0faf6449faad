"""Rates learned from what was seen."""

import pytest

from kvstrata.prefill_node.read_plan import TierRate
from kvstrata.prefill_node.read_rates import (
    FADING,
    MAX_AGE_S,
    MAX_RATES,
    MIN_SEEN,
    Arrivals,
    FadingMedian,
    ReadRates,
)
from kvstrata.protos.frame_pb2 import Stratum

BASE, MID = Stratum.STRATUM_BASE, Stratum.STRATUM_MID
FULL = (BASE, MID)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fetch(rates: ReadRates, pieces: list[tuple[str, Stratum, int, float]]) -> None:
    """Let a fetch be seen; of each piece the last number is the seconds that it took to come."""
    clock = Clock()
    arrivals = Arrivals(clock)
    for tier, stratum, num_bytes, seconds in pieces:
        clock.now += seconds
        arrivals.add(tier, stratum, num_bytes)
    rates.fetched(arrivals, "codec", FULL)


def test_a_median_tells_nothing_before_enough_was_seen() -> None:
    median = FadingMedian()
    for _ in range(MIN_SEEN - 1):
        median.add(1.0)
        assert median.value is None
    median.add(1.0)
    assert median.value == 1.0


def test_one_that_hung_changes_nothing_and_new_ones_soon_count() -> None:
    median = FadingMedian()
    for _ in range(10):
        median.add(1.0)
    median.add(500.0)
    assert median.value == 1.0
    for _ in range(8):
        median.add(2.0)
    assert median.value == 2.0
    assert FADING < 1


def test_larger_pieces_count_more() -> None:
    median = FadingMedian()
    median.add(1.0, 10)
    for _ in range(3):
        median.add(2.0, 1)
    assert median.value == 1.0


def test_what_a_link_did_is_forgotten_and_what_the_node_does_is_not() -> None:
    clock = Clock()
    rates = ReadRates(clock)
    for _ in range(MIN_SEEN):
        fetch(rates, [("dram", BASE, 100, 0.5), ("dram", MID, 300, 3.0)])
        rates.computed(64, 6.4)
    assert rates.token_s == 0.1
    found = rates.tier("dram")
    assert found is not None
    assert (found.latency_s, found.byte_s) == pytest.approx((0.5, 0.01))
    clock.now += MAX_AGE_S + 1
    assert rates.tier("dram") is None
    assert rates.token_s == 0.1
    fetch(rates, [("dram", BASE, 100, 0.5), ("dram", MID, 300, 3.0)])
    assert rates.tier("dram") is None  # one alone says little


def test_a_fetch_that_came_in_one_message_tells_the_rate_of_the_link() -> None:
    rates = ReadRates()
    for _ in range(MIN_SEEN):  # 8 MB/s; what is in a message is read from it at once
        pieces = [("redis", BASE, 200_000, 0.1), ("redis", MID, 30_000, 1e-4)]
        fetch(rates, [*pieces, ("redis", BASE, 200_000, 1e-4), ("redis", MID, 370_000, 1e-4)])
    found = rates.tier("redis")
    assert found is not None
    assert found.byte_s == pytest.approx(0.1 / 800_000, rel=0.01)
    assert found.latency_s == 0.0


def test_messages_after_the_first_tell_the_rate_and_the_first_one_the_latency() -> None:
    rates = ReadRates()
    for _ in range(MIN_SEEN):  # 20 ms, then 1 MB in 125
        message = [("redis", BASE, 200_000, 1e-6)] * 4
        first = [("redis", BASE, 200_000, 0.145), *message]
        fetch(rates, [*first, ("redis", MID, 200_000, 0.125), *message])
    found = rates.tier("redis")
    assert found is not None
    assert found.byte_s == pytest.approx(1.25e-7, rel=0.01)
    assert found.latency_s == pytest.approx(0.045, rel=0.01)  # the first piece's own time included
    for _ in range(MIN_SEEN):  # what is known of the latency is not the link's rate
        fetch(rates, [("redis", BASE, 8_000, 0.046), ("redis", MID, 8_000, 0.0)])
    assert rates.tier("redis") == found


def test_a_fast_link_that_answers_late_is_not_taken_for_a_slow_one() -> None:
    rates = ReadRates()
    for _ in range(MIN_SEEN):  # a second, then 20 MB/s: each piece takes a hundredth of that
        pieces = [("object", BASE, 200_000, 0.01)] * 40
        fetch(rates, [("object", BASE, 200_000, 1.01), *pieces, ("object", MID, 200_000, 0.01)])
    found = rates.tier("object")
    assert found is not None
    assert found.byte_s == pytest.approx(5e-8)
    assert found.latency_s == pytest.approx(1.01, rel=0.01)


def test_one_stratum_alone_tells_a_rate_too() -> None:
    rates = ReadRates()
    for _ in range(MIN_SEEN):
        fetch(rates, [("dram", BASE, 1000, 0.5)])
    assert rates.tier("dram") == TierRate(0.0, 0.0005)


def test_tiers_and_strata_are_told_apart() -> None:
    rates = ReadRates()
    assert rates.precision("codec", FULL, FULL) is None
    for _ in range(MIN_SEEN):
        fetch(
            rates,
            [
                ("dram", BASE, 100, 0.1), ("dram", MID, 300, 0.3),
                ("redis", BASE, 100, 10.0), ("redis", MID, 300, 10.0),
            ],
        )  # fmt: skip
        rates.unpacked("codec", FULL, 2, 0.5)
    dram, redis = rates.tier("dram"), rates.tier("redis")
    assert dram is not None
    assert redis is not None
    assert (dram.byte_s, redis.byte_s) == pytest.approx((0.3 / 300, 20.0 / 400))
    assert redis.latency_s == 0.0  # it never came first
    whole, coarse = (rates.precision("codec", strata, FULL) for strata in (FULL, (BASE,)))
    assert whole is not None
    assert coarse is not None
    assert (whole.share, coarse.share) == (1.0, 0.25)
    assert whole.unpack_s == coarse.unpack_s == 0.25
    assert rates.precision("other", FULL, FULL) is None


def test_settings_that_clients_make_up_take_no_memory_for_ever() -> None:
    rates = ReadRates()
    for number in range(3 * MAX_RATES):
        rates.sealed(f"bits={number}", 1, 1.0)
    assert len(rates._medians) == MAX_RATES
