"""Products of few rows, one to four at a time, by a matrix packed for FMA."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from kvstrata.kernels.compiled import called, inlined
from kvstrata.kernels.vectors_numba import LANES, load, multiply_add, splat, splat_at, store


def _multiplier(count):
    """Return what multiplies ``count`` rows, 32 columns at a time, so that sums stay in registers.

    Each load of weights serves all rows, and enough sums are under way to hide their latency.
    """

    @called
    def run(a, at, row, packed, start, depth, columns, out, to, step):
        c = 0
        while c < columns:
            left, right = start + c * depth, start + min(c + LANES, columns - LANES) * depth
            s0, r0 = splat(np.float32(0)), splat(np.float32(0))
            s1, r1, s2, r2, s3, r3 = s0, r0, s0, r0, s0, r0
            for k in range(depth):
                x, y = load(packed, left + k * LANES), load(packed, right + k * LANES)
                factor = splat_at(a, at + k)
                s0, r0 = multiply_add(factor, x, s0), multiply_add(factor, y, r0)
                if count > 1:
                    factor = splat_at(a, at + row + k)
                    s1, r1 = multiply_add(factor, x, s1), multiply_add(factor, y, r1)
                if count > 2:
                    factor = splat_at(a, at + 2 * row + k)
                    s2, r2 = multiply_add(factor, x, s2), multiply_add(factor, y, r2)
                if count > 3:
                    factor = splat_at(a, at + 3 * row + k)
                    s3, r3 = multiply_add(factor, x, s3), multiply_add(factor, y, r3)
            place, other = to + c, to + min(c + LANES, columns - LANES)
            _store_both(out, place, other, s0, r0)
            if count > 1:
                _store_both(out, place + step, other + step, s1, r1)
            if count > 2:
                _store_both(out, place + 2 * step, other + 2 * step, s2, r2)
            if count > 3:
                _store_both(out, place + 3 * step, other + 3 * step, s3, r3)
            c += 2 * LANES

    return run


@inlined
def _store_both(out, place, other, x, y):
    store(out, place, x)
    store(out, other, y)


_one, _two, _three, _four = map(_multiplier, (1, 2, 3, 4))


@called
def multiply_few(a, at, row, count, packed, start, depth, columns, out, to, step):
    """Write ``count`` rows of ``a``, ``row`` apart, times the first ``columns`` of a matrix.

    Args:
        a: float32.
        at: Where its first row starts.
        row: From one row to the next.
        count: Rows.
        packed: Matrices of ``pack(..., "floats")``; the one at ``start`` is ``depth`` deep.
        start: See ``packed``.
        depth: A multiple of 16.
        columns: At least 1; rounded up to a multiple of 16.
        out: float32, of which rows of that many columns are written.
        to: Where its first row starts.
        step: From one of its rows to the next.
    """
    columns = (columns + LANES - 1) // LANES * LANES
    while count >= 4:
        _four(a, at, row, packed, start, depth, columns, out, to, step)
        at, to, count = at + 4 * row, to + 4 * step, count - 4
    if count == 3:
        _three(a, at, row, packed, start, depth, columns, out, to, step)
    elif count == 2:
        _two(a, at, row, packed, start, depth, columns, out, to, step)
    elif count == 1:
        _one(a, at, row, packed, start, depth, columns, out, to, step)
