"""The read plan: properties of the pure function over random sizes and rates."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.prefill_node.read_plan import (
    Precision,
    Reading,
    ReadPlan,
    StoredBlock,
    TierRate,
    plan_read,
    predicted_s,
)
from kvstrata.protos.frame_pb2 import Stratum

BASE, MID = Stratum.STRATUM_BASE, Stratum.STRATUM_MID
FULL = Precision((BASE, MID), 1.0, 0.002)
COARSE = Precision((BASE,), 0.4, 0.001)
TIERS = ("dram", "redis", "ssd")

seconds = st.floats(0, 2)


@st.composite
def readings(draw: st.DrawFn) -> Reading:
    sizes = st.builds(StoredBlock, st.integers(1, 1 << 20), st.sampled_from(TIERS))
    blocks = tuple(draw(st.lists(sizes, min_size=1, max_size=12)))
    inner = draw(st.sets(st.integers(0, len(blocks) - 1)))
    rates = st.builds(TierRate, st.floats(0, 1), st.floats(0, 1e-5))
    return Reading(
        blocks=blocks,
        num_blocks=len(blocks) + draw(st.integers(0, 4)),
        precisions=draw(st.sampled_from([(FULL,), (FULL, COARSE)])),
        cuts=(*sorted(inner), len(blocks)),
        tiers={tier: draw(rates) for tier in TIERS},
        block_s=draw(seconds),
        seal_s=draw(seconds),
        seals_all=draw(st.booleans()),
        queue_s=draw(seconds),
        limit_s=draw(st.sampled_from([math.inf, 0.0, 0.5, 2.0])),
        worth_s=draw(st.sampled_from([0.0, 0.1])),
        answer_s=draw(st.sampled_from([0.0, 0.5, 2.0, math.inf])),
    )


def precision_of(reading: Reading, plan: ReadPlan) -> Precision:
    return next(p for p in reading.precisions if p.strata == plan.strata)


def every_time(reading: Reading, *, floor: int | None = None) -> list[float]:
    """Return the time of every plan; with ``floor`` 1 of those at full precision."""
    return [
        predicted_s(reading, precision, cut)
        for precision in reading.precisions[:floor]
        for cut in reading.cuts
    ]


@given(readings())
def test_a_plan_is_one_of_those_allowed_and_its_time_is_the_sum(reading: Reading) -> None:
    plan = plan_read(reading)
    assert plan.num_fetched in reading.cuts
    assert plan.num_stored == len(reading.blocks)
    assert plan.predicted_s == predicted_s(reading, precision_of(reading, plan), plan.num_fetched)
    if plan.num_fetched < plan.num_stored:
        assert plan.choice == ("part" if plan.num_fetched else "recompute")
    elif plan.strata == FULL.strata:
        assert plan.choice == "full"
    else:
        assert plan.choice in ("refine", "fewer_strata")


@given(readings())
def test_what_was_given_up_is_fetched_behind_if_it_comes_before_the_answer_ends(
    reading: Reading,
) -> None:
    plan = plan_read(reading)
    assert bool(plan.refining) == (plan.choice == "refine")
    if plan.strata == FULL.strata or plan.num_fetched < plan.num_stored:
        assert plan.choice != "refine"
        return
    rest = Precision((MID,), FULL.share - COARSE.share, FULL.unpack_s)
    rest_s = predicted_s(replace(reading, num_blocks=plan.num_stored), rest, plan.num_stored)
    assert (plan.choice == "refine") == (rest_s <= reading.answer_s)
    if plan.choice == "refine":
        assert plan.refining == (MID,)
        assert plan.refined_s == pytest.approx(plan.predicted_s + rest_s)
    patient = plan_read(replace(reading, answer_s=math.inf))
    assert replace(patient, choice="", refining=(), refined_s=0.0) == replace(
        plan, choice="", refining=(), refined_s=0.0
    )


@given(readings())
def test_no_neighbour_is_faster_by_the_plans_own_figures(reading: Reading) -> None:
    plan = plan_read(reading)
    precision = precision_of(reading, plan)
    at = reading.cuts.index(plan.num_fetched)
    for cut in reading.cuts[max(0, at - 1) : at + 2]:
        other = predicted_s(reading, precision, cut)
        assert plan.predicted_s <= other + (reading.worth_s if plan.choice == "full" else 0)


@given(readings())
def test_a_limit_is_kept_where_it_can_be(reading: Reading) -> None:
    plan = plan_read(reading)
    if min(every_time(reading)) <= reading.limit_s:
        assert plan.predicted_s <= reading.limit_s
    else:
        assert plan.predicted_s == min(every_time(reading))


@given(readings())
def test_precision_is_given_up_for_a_limit_alone(reading: Reading) -> None:
    plan = plan_read(reading)
    if plan.num_fetched and plan.strata != FULL.strata:
        assert min(every_time(reading, floor=1)) > reading.limit_s
    allowed_less = plan_read(replace(reading, precisions=(FULL, COARSE), limit_s=math.inf))
    assert allowed_less.strata == FULL.strata
    assert plan_read(replace(reading, precisions=(FULL,))).strata == FULL.strata


@given(readings())
def test_without_a_limit_the_fastest_is_taken_if_it_is_worth_it(reading: Reading) -> None:
    reading = replace(reading, limit_s=math.inf)
    plan = plan_read(reading)
    saved = predicted_s(reading, FULL, len(reading.blocks)) - min(every_time(reading, floor=1))
    if saved > reading.worth_s:
        assert plan.predicted_s == min(every_time(reading, floor=1))
    else:
        assert plan.choice == "full"


@given(readings(), st.floats(1, 10))
def test_a_slower_link_never_fetches_more(reading: Reading, factor: float) -> None:
    reading = replace(reading, limit_s=math.inf, precisions=(FULL,))
    slower = {
        tier: TierRate(rate.latency_s * factor, rate.byte_s * factor)
        for tier, rate in reading.tiers.items()
    }
    assert (
        plan_read(replace(reading, tiers=slower, worth_s=0.0)).num_fetched
        <= plan_read(replace(reading, worth_s=0.0)).num_fetched
    )


HUNDRED_KB = 100_000
MIXED = (*[StoredBlock(HUNDRED_KB, "dram")] * 4, *[StoredBlock(HUNDRED_KB, "redis")] * 4)


@pytest.mark.parametrize(
    ("redis_byte_s", "limit_s", "answer_s", "choice", "num_fetched"),
    [
        pytest.param(1e-8, math.inf, 9.0, "full", 8, id="fast"),
        pytest.param(1e-5, math.inf, 9.0, "part", 4, id="what-is-far-is-computed"),
        pytest.param(1e-6, 0.3, 0.2, "fewer_strata", 8, id="a-limit-that-less-keeps"),
        pytest.param(1e-6, 0.3, 9.0, "refine", 8, id="and-time-for-the-rest"),
    ],
)
def test_each_choice_where_it_belongs(
    redis_byte_s: float, limit_s: float, answer_s: float, choice: str, num_fetched: int
) -> None:
    tiers = {"dram": TierRate(0.001, 1e-9), "redis": TierRate(0.001, redis_byte_s)}
    reading = Reading(
        MIXED,
        8,
        (FULL, COARSE),
        tuple(range(9)),
        tiers,
        block_s=0.2,
        limit_s=limit_s,
        answer_s=answer_s,
    )
    plan = plan_read(reading)
    assert (plan.choice, plan.num_fetched) == (choice, num_fetched)


def test_a_queue_speaks_for_fetching_and_a_slow_link_for_computing() -> None:
    tiers = {"dram": TierRate(0.01, 2e-6), "redis": TierRate(0.01, 2e-6)}
    reading = Reading(MIXED, 8, (FULL,), (0, 8), tiers, block_s=0.1)
    assert plan_read(reading).choice == "recompute"
    assert plan_read(replace(reading, queue_s=2.0)).choice == "full"
