"""Which subsets of strata can be read."""

from itertools import chain, combinations
from typing import Any

import pytest

from kvstrata.methods.codec import readable
from kvstrata.methods.framing import precision_name
from kvstrata.protos.frame_pb2 import Stratum

BASE, MID, FINE, EXACT = (
    Stratum.STRATUM_BASE,
    Stratum.STRATUM_MID,
    Stratum.STRATUM_FINE,
    Stratum.STRATUM_EXACT,
)
LATER: Any = 9  # what a later release may add
TABLE: dict[tuple[Stratum, ...], tuple[Stratum, ...]] = {
    (): (),
    (BASE,): (BASE,),
    (MID,): (),
    (FINE,): (),
    (BASE, MID): (BASE, MID),
    (BASE, FINE): (BASE,),
    (MID, FINE): (),
    (BASE, MID, FINE): (BASE, MID, FINE),
}


def test_the_table_is_complete() -> None:
    lossy = (BASE, MID, FINE)
    subsets = chain.from_iterable(combinations(lossy, size) for size in range(4))
    assert set(subsets) == set(TABLE)


@pytest.mark.parametrize(("held", "best"), TABLE.items(), ids=str)
def test_the_best_subset_is_consecutive_from_base_on(
    held: tuple[Stratum, ...], best: tuple[Stratum, ...]
) -> None:
    assert readable(set(held)) == best
    assert readable({*held, EXACT}) == (EXACT,)


def test_a_stratum_of_a_later_release_is_ignored() -> None:
    assert readable({BASE, LATER}) == (BASE,)
    assert readable({LATER}) == ()


def test_precisions_are_named_by_their_strata() -> None:
    names = [precision_name(read) for read in ([EXACT], [MID, BASE], [BASE])]
    assert names == ["exact", "base+mid", "base"]
