"""e ** x of 16 lanes, for softmax."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from kvstrata.kernels.compiled import inlined
from kvstrata.kernels.vectors_numba import (
    add_ints,
    as_floats,
    choose,
    floor,
    multiply,
    multiply_add,
    reaches,
    shift_left,
    splat,
    splat_int,
    subtract,
    to_ints,
)

_LOG2E, _LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_TERMS = tuple(np.float32(x) for x in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0))
_T0, _T1, _T2, _T3, _T4, _T5, _T6 = _TERMS
_LOWEST, _HALF, _ZERO = np.float32(-60.0), np.float32(0.5), np.float32(0.0)


@inlined
def exponential(x):
    """Return e ** x for x <= 0, 3 in 10 million off; below e ** -60 it is 0.

    2^n 2^f with |f| <= 1/2 and the Taylor polynomial of degree 6. What is below e^-60 does not
    count beside 1, and its products would be slow denormal numbers. No number gives 0.
    """
    counts = reaches(x, splat(_LOWEST))
    x = choose(counts, x, splat(_ZERO))
    n = floor(multiply_add(x, splat(_LOG2E), splat(_HALF)))
    f = multiply(subtract(multiply(x, splat(_LOG2E)), n), splat(_LN2))
    p = splat(_T0)
    p = multiply_add(p, f, splat(_T1))
    p = multiply_add(p, f, splat(_T2))
    p = multiply_add(p, f, splat(_T3))
    p = multiply_add(p, f, splat(_T4))
    p = multiply_add(p, f, splat(_T5))
    p = multiply_add(p, f, splat(_T6))
    power = as_floats(shift_left(add_ints(to_ints(n), splat_int(np.int32(127))), np.int32(23)))
    return choose(counts, multiply(p, power), splat(_ZERO))
