"""Which subsets of strata can be read."""

from itertools import chain, combinations

import pytest

from kvstrata.methods.codec import readable
from kvstrata.methods.framing import precision_name
from kvstrata.protos.frame_pb2 import Stratum

BASE, MID, FINE, EXACT = 1, 2, 3, 4
TABLE: dict[tuple[int, ...], tuple[int, ...]] = {
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
    held: tuple[int, ...], best: tuple[int, ...]
) -> None:
    strata = {Stratum.ValueType(s) for s in held}
    assert readable(strata) == best
    assert readable(strata | {Stratum.STRATUM_EXACT}) == (EXACT,)


def test_a_stratum_of_a_later_release_is_ignored() -> None:
    assert readable({Stratum.STRATUM_BASE, Stratum.ValueType(9)}) == (BASE,)
    assert readable({Stratum.ValueType(9)}) == ()


def test_precisions_are_named_by_their_strata() -> None:
    names = [precision_name([Stratum.ValueType(s) for s in read]) for read in ((4,), (2, 1), (1,))]
    assert names == ["exact", "base+mid", "base"]
