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
    """Return a function for any number of query heads of functions for one, two or four."""
    one, two, four = map(make, (1, 2, 4))

    @inlined
    def run(group, *args):
        j = 0
        while j + 4 <= group:
            four(group, j, *args)
            j += 4
        if j + 2 <= group:
            two(group, j, *args)
            j += 2
        if j < group:
            one(group, j, *args)

    return run


def _key_adder(heads):
    """Return what adds, for some heads, each token's entries of the tables to its scores.

    Every other sum is an FMA by one: some processors have other units for it than for additions.
    """

    @called
    def run(group, j, bits, num_bytes, tables, one, scores):
        unit = splat(one)
        for quarter in range(0, TOKENS, LANES):
            at = j * TOKENS + quarter
            a = load(scores, at)
            b = load(scores, at + TOKENS) if heads > 1 else a
            c = load(scores, at + 2 * TOKENS) if heads > 2 else a
            d = load(scores, at + 3 * TOKENS) if heads > 3 else a
            for i in range(num_bytes):
                x = load_ints(bits, i * TOKENS + quarter)
                place = (2 * i * group + j) * LANES
                for _ in range(2):
                    a = add(a, pick(tables, place, x))
                    if heads > 1:
                        b = multiply_add(pick(tables, place + LANES, x), unit, b)
                    if heads > 2:
                        c = add(c, pick(tables, place + 2 * LANES, x))
                    if heads > 3:
                        d = multiply_add(pick(tables, place + 3 * LANES, x), unit, d)
                    x = shift_right(x, np.int32(4))
                    place += group * LANES
            store(scores, at, a)
            if heads > 1:
                store(scores, at + TOKENS, b)
            if heads > 2:
                store(scores, at + 2 * TOKENS, c)
            if heads > 3:
                store(scores, at + 3 * TOKENS, d)

    return run


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
    """Write the 16 sums of +-factor of every four factors: bit i set takes factor i off."""
    s0, s1, s2, s3 = load(signs, 0), load(signs, 16), load(signs, 32), load(signs, 48)
    row, to = factors.size // group, 0
    for i in range(0, count, 4):
        for j in range(group):
            at = j * row + i
            total = multiply(s0, splat_at(factors, at))
            total = multiply_add(s1, splat_at(factors, at + 1), total)
            total = multiply_add(s2, splat_at(factors, at + 2), total)
            store(tables, to, multiply_add(s3, splat_at(factors, at + 3), total))
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
