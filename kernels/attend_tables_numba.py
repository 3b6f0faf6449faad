"""Looks up sums of four bits at a time: for tokens of keys, for words of values.

Legend: G query heads per KV head.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from kvstrata.kernels.compiled import called, inlined
from kvstrata.kernels.lookups_numba import pick
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.token_masks import TOKENS
from kvstrata.kernels.vectors_numba import (
    LANES,
    add,
    load,
    load_ints,
    multiply,
    multiply_add,
    signed,
    splat,
    splat_at,
    store,
)
from kvstrata.kernels.word_vectors_numba import shift_right

_NIBBLES = TOKENS // 4
_NUMBERS = np.arange(LANES)
# For each of four bits its sign in every lane: -1 where the lane's number has it.
SIGNS = np.concatenate([1 - 2 * (_NUMBERS >> bit & 1) for bit in range(4)]).astype(np.float32)


def _for_groups(make):
    """Return a function for any number of query heads of functions for one to four."""
    one, two, three, four = map(make, (1, 2, 3, 4))

    @inlined
    def run(group, *args):
        j = 0
        while j + 4 <= group:
            four(group, j, *args)
            j += 4
        if j + 3 == group:
            three(group, j, *args)
        elif j + 2 == group:
            two(group, j, *args)
        elif j < group:
            one(group, j, *args)

    return run


def _key_adder(heads):
    """Return what adds, for some heads, each token's entries of the tables to its scores.

    Every other head's sums are FMAs by one: some processors have other units for these than for
    additions. Tokens come 32 at a time, so that a table is loaded once for two look-ups, and enough
    sums are under way to hide their latency.
    """

    @called
    def run(group, j, bits, num_bytes, tables, one, scores):
        unit = splat(one)
        for low in range(0, TOKENS, 2 * LANES):
            at, high = j * TOKENS + low, j * TOKENS + low + LANES
            a, b = load(scores, at), load(scores, high)
            c, d, e, f, g, h = a, b, a, b, a, b
            if heads > 1:
                c, d = load(scores, at + TOKENS), load(scores, high + TOKENS)
            if heads > 2:
                e, f = load(scores, at + 2 * TOKENS), load(scores, high + 2 * TOKENS)
            if heads > 3:
                g, h = load(scores, at + 3 * TOKENS), load(scores, high + 3 * TOKENS)
            for i in range(num_bytes):
                x = load_ints(bits, i * TOKENS + low)
                y = load_ints(bits, i * TOKENS + low + LANES)
                place = (2 * i * group + j) * LANES
                for _ in range(2):
                    a, b = add(a, pick(tables, place, x)), add(b, pick(tables, place, y))
                    if heads > 1:
                        k = place + LANES
                        c = multiply_add(pick(tables, k, x), unit, c)
                        d = multiply_add(pick(tables, k, y), unit, d)
                    if heads > 2:
                        k = place + 2 * LANES
                        e, f = add(e, pick(tables, k, x)), add(f, pick(tables, k, y))
                    if heads > 3:
                        k = place + 3 * LANES
                        g = multiply_add(pick(tables, k, x), unit, g)
                        h = multiply_add(pick(tables, k, y), unit, h)
                    x, y = shift_right(x, np.int32(4)), shift_right(y, np.int32(4))
                    place += group * LANES
            _store_both(scores, at, high, a, b)
            if heads > 1:
                _store_both(scores, at + TOKENS, high + TOKENS, c, d)
            if heads > 2:
                _store_both(scores, at + 2 * TOKENS, high + 2 * TOKENS, e, f)
            if heads > 3:
                _store_both(scores, at + 3 * TOKENS, high + 3 * TOKENS, g, h)

    return run


@inlined
def _store_both(out, place, other, x, y):
    store(out, place, x)
    store(out, other, y)


def _value_adder(heads):
    """Return what adds, for some heads, each word's entries of the tables to its sum."""

    @called
    def run(group, j, halves, num_words, tables, one, sums):
        unit, row, high = splat(one), sums.size // group, halves.size // 2
        for w in range(0, num_words, LANES):
            at = j * row + w
            a = load(sums, at)
            b = load(sums, at + row) if heads > 1 else a
            c = load(sums, at + 2 * row) if heads > 2 else a
            d = load(sums, at + 3 * row) if heads > 3 else a
            place = j * LANES
            for half in range(2):
                x = load_ints(halves, w + half * high)
                for _ in range(_NIBBLES // 2):
                    a = add(a, pick(tables, place, x))
                    if heads > 1:
                        b = multiply_add(pick(tables, place + LANES, x), unit, b)
                    if heads > 2:
                        c = add(c, pick(tables, place + 2 * LANES, x))
                    if heads > 3:
                        d = multiply_add(pick(tables, place + 3 * LANES, x), unit, d)
                    x = shift_right(x, np.int32(4))
                    place += group * LANES
            store(sums, at, a)
            if heads > 1:
                store(sums, at + row, b)
            if heads > 2:
                store(sums, at + 2 * row, c)
            if heads > 3:
                store(sums, at + 3 * row, d)

    return run


add_keys, add_values = _for_groups(_key_adder), _for_groups(_value_adder)


@called
def fill_tables(factors, count, group, signs, tables):
    """Write the 16 sums of +-factor of every four factors: bit i set takes factor i off.

    Half of the factors get their signs without a multiplication, for which there are fewer units.
    """
    s0, s1, s2, s3 = load(signs, 0), load(signs, 16), load(signs, 32), load(signs, 48)
    row, to = factors.size // group, 0
    for i in range(0, count, 4):
        for j in range(group):
            at = j * row + i
            low = multiply_add(s1, splat_at(factors, at + 1), signed(splat_at(factors, at), s0))
            third = signed(splat_at(factors, at + 2), s2)
            high = multiply_add(s3, splat_at(factors, at + 3), third)
            store(tables, to, add(low, high))
            to += LANES


@inlined
def fill_factors(queries, at, plan, h, dim, factors, to):
    """Write minus a component's query times the coefficient of its plane, for each word."""
    place = h * MAX_WIDTH
    first = plan.offsets[place]
    for plane in range(plan.widths[h * dim]):
        start = to + plan.offsets[place + plane] - first
        for c in range(0, plan.sizes[place + plane], LANES):
            step = load(plan.steps, (place + plane) * dim + c)
            store(factors, start + c, multiply(load(queries, at + c), step))
