"""Tenants are served alike, whatever they send."""

import random

from kvstrata.engine.fair_share import FairShare


def test_who_was_served_least_comes_first() -> None:
    fair = FairShare()
    for tenant in "ab":
        fair.arrive(tenant)
    fair.charge("a", prompt=100)
    assert fair.served("b") < fair.served("a")
    fair.charge("b", generated=51)
    assert fair.served("a") < fair.served("b")


def test_a_pause_saves_nothing_up() -> None:
    fair = FairShare()
    fair.arrive("busy")
    fair.arrive("idle")
    fair.leave("idle")
    fair.charge("busy", prompt=1000)
    fair.arrive("idle")
    assert fair.served("idle") == fair.served("busy")


def test_a_debt_is_not_forgotten_by_leaving() -> None:
    fair = FairShare()
    fair.arrive("a")
    fair.arrive("b")
    fair.charge("a", prompt=1000)
    fair.leave("a")
    fair.arrive("a")
    assert fair.served("a") == 1000


def test_two_tenants_get_equal_shares_of_unequal_demand() -> None:
    """One has one request at a time, the other twenty; turns of random size."""
    rng, fair = random.Random(0), FairShare()
    for tenant in ["few", *["many"] * 20]:
        fair.arrive(tenant)
    got = {"few": 0, "many": 0}
    for _ in range(2000):
        tenant = min(got, key=fair.served)
        size = rng.randrange(1, 65)
        fair.charge(tenant, prompt=size)
        got[tenant] += size
    assert abs(got["few"] - got["many"]) <= 64
