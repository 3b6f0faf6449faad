"""What ``attend_items_numba`` does with queries, mid tokens and escapes: rows of one token each."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from kvstrata.kernels.compiled import called, inlined
from kvstrata.kernels.floats_numba import to_float
from kvstrata.kernels.lookups_numba import gather, pick_of_32
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.vectors_numba import (
    LANES,
    add,
    both,
    choose,
    has_bits,
    load,
    load_halves,
    load_ints,
    multiply,
    multiply_add,
    splat,
    splat_at,
    splat_int,
    store,
    store_ints,
    subtract,
    sum_lanes,
    to_floats,
)
from kvstrata.kernels.word_vectors_numba import (
    add_where,
    copy_words,
    fold_1,
    fold_2,
    fold_4,
    fold_8,
    item_of,
    lanes_of,
    load_bits,
    load_codes,
    shift_right,
)

_ZERO, _1, _2 = np.float32(0), np.int32(1), np.int32(2)


@inlined
def dot(a, at, b, start, count):
    """Return the dot product of rows of ``count`` numbers, rounded up to a multiple of 16."""
    total = splat(_ZERO)
    for i in range(0, count, LANES):
        total = multiply_add(load(a, at + i), load(b, start + i), total)
    return sum_lanes(total)


@inlined
def add_row(out, to, row, at, count, factor):
    """Add ``count`` numbers of a row, rounded up to a multiple of 16, times a factor."""
    factor = splat(factor)
    for i in range(0, count, LANES):
        store(out, to + i, multiply_add(load(row, at + i), factor, load(out, to + i)))


@inlined
def add_rows(out, to, rows, step, count, factors, at, tokens, num):
    """Add rows of ``count`` numbers, ``step`` apart, each times the factor of its token."""
    for i in range(0, count, LANES):
        total = load(out, to + i)
        for k in range(num):
            factor = splat_at(factors, at + item_of(tokens, k))
            total = multiply_add(load(rows, k * step + i), factor, total)
        store(out, to + i, total)


@inlined
def scale_row(row, at, count, factor):
    """Multiply ``count`` numbers, a multiple of 16, by a factor."""
    factor = splat(factor)
    for i in range(at, at + count, LANES):
        store(row, i, multiply(load(row, i), factor))


@called
def part_words(words, at, count, halves):
    """Write the low and high halves of words apart; what follows has no meaning."""
    for i in range(0, count, LANES):
        store_ints(halves, i, load_halves(words, at + i, np.int32(0)))
        store_ints(halves, halves.size // 2 + i, load_halves(words, at + i, np.int32(1)))


@called
def stage_words(words, first, count, target, halves):
    """Copy words, so that no vector reads behind them, and write their halves apart."""
    copy_words(words, first, count, target)
    part_words(target, 0, count, halves)


@called
def turn_back(queries, at, scaling, cos, sin, angle, half, group, dim, rows):
    """Write queries times ``scaling``, turned by minus the angles from ``angle`` on.

    Rotary pairs are elements i and ``half`` + i. The last vectors may overlap.
    """
    factor = splat(scaling)
    for j in range(0, group * dim, dim):
        for i in range(2 * half // LANES * LANES, dim, LANES):
            store(rows, j + i, multiply(load(queries, at + j + i), factor))
        i = 0
        while i < half and half >= LANES:
            i = min(i, half - LANES)
            low = multiply(load(queries, at + j + i), factor)
            high = multiply(load(queries, at + j + half + i), factor)
            turned = multiply(high, load(sin, angle + i))
            store(rows, j + i, multiply_add(low, load(cos, angle + i), turned))
            turned = multiply(low, load(sin, angle + half + i))
            other = multiply(high, load(cos, angle + half + i))
            store(rows, j + half + i, subtract(other, turned))
            i += LANES
        if half < LANES:
            for i in range(half):
                low, high = queries[at + j + i] * scaling, queries[at + j + half + i] * scaling
                rows[j + i] = low * cos[angle + i] + high * sin[angle + i]
                rows[j + half + i] = high * cos[angle + half + i] - low * sin[angle + half + i]


def _refiner(planes):
    """Return what refines 16 components of up to three or six planes.

    Each has as many planes as fit: what a component lacks adds 0 to its code, whatever its bits.
    Up to three planes, levels are looked up in registers.
    """

    @called
    def run(halves, plan, place, deltas, rows, at, count, h, c, tokens, num, dim, out):
        starts, one, two = load_ints(plan.starts, h * dim + c), splat_int(_1), splat_int(_2)
        at, is_half = at + c // 8, c + 8 >= count
        first = c - item_of(plan.offsets, place)
        w0, w1 = c, first + item_of(plan.offsets, place + 1)
        p0 = load_ints(plan.places, place * dim + c)
        p1 = load_ints(plan.places, (place + 1) * dim + c)
        w2 = first + item_of(plan.offsets, place + 2)
        p2 = load_ints(plan.places, (place + 2) * dim + c)
        w3, w4, w5, p3, p4, p5 = w2, w2, w2, p2, p2, p2
        if planes > 3:
            w3 = first + item_of(plan.offsets, place + 3)
            p3 = load_ints(plan.places, (place + 3) * dim + c)
            w4 = first + item_of(plan.offsets, place + 4)
            p4 = load_ints(plan.places, (place + 4) * dim + c)
            w5 = first + item_of(plan.offsets, place + 5)
            p5 = load_ints(plan.places, (place + 5) * dim + c)
        for k in range(num):
            t = item_of(tokens, k)
            token = splat_int(np.int32(np.uint32(1) << np.uint32(t & 31)))
            high = (t >> 5) * (halves.size // 2)
            code = add_where(has_bits(load_ints(halves, w0 + high), token), starts, p0)
            code = add_where(has_bits(load_ints(halves, w1 + high), token), code, p1)
            code = add_where(has_bits(load_ints(halves, w2 + high), token), code, p2)
            if planes > 3:
                code = add_where(has_bits(load_ints(halves, w3 + high), token), code, p3)
                code = add_where(has_bits(load_ints(halves, w4 + high), token), code, p4)
                code = add_where(has_bits(load_ints(halves, w5 + high), token), code, p5)
            here = at + k * (count // 4)
            code = add_where(load_bits(rows, here), code, two)
            if is_half:  # a second byte could lie beyond the arena
                low = np.uint64(item_of(rows, here + count // 8))
                code = add_where(lanes_of(low, 0), code, one)
            else:
                code = add_where(load_bits(rows, here + count // 8), code, one)
            if planes == 3:
                above = has_bits(code, splat_int(np.int32(32)))
                value = choose(above, pick_of_32(deltas, 32, code), pick_of_32(deltas, 0, code))
            else:
                value = gather(deltas, code)
            if is_half:
                value = choose(lanes_of(np.uint64(0xFF), 0), value, splat(_ZERO))
            store(out, k * dim + c, value)

    return run


_refine3, _refine6 = map(_refiner, (3, 6))


@called
def refine(halves, plan, deltas, rows, at, count, h, tokens, num, dim, out):
    """Write what refinements add to the base values of mid tokens, as rows of ``dim`` numbers.

    Args:
        halves: Of ``part_words``, the head's words; ``dim`` words behind them are read too.
        plan: The layout's.
        deltas: What each fine code adds to its base value, widths 0 to 6 one after the other.
        rows: uint8, the tokens' MID rows from ``at`` on.
        at: See ``rows``.
        count: Components that are refined, a multiple of 8.
        h: Head.
        tokens: int64, which tokens.
        num: How many.
        dim: Components.
        out: float32; of each row ``count`` numbers, and zeros up to a multiple of 16.
    """
    place = h * MAX_WIDTH
    for c in range(0, count, LANES):
        args = (halves, plan, place, deltas, rows, at, count, h, c, tokens, num, dim, out)
        planes = item_of(plan.widths, h * dim + c)
        if planes <= 3:
            _refine3(*args)
        else:
            _refine6(*args)


@called
def bias_row(codes, at, step, dim, out):
    """Write a bias: nibbles less 8, times a step; the last vectors may overlap."""
    half, i = dim // 2, 0
    less, factor, low = splat(np.float32(8)), splat(step), splat_int(np.int32(15))
    while i < half:
        if half < LANES:
            for k in range(half):
                out[k] = np.float32(np.int32(codes[at + k] & 15) - 8) * step
                out[half + k] = np.float32(np.int32(codes[at + k] >> 4) - 8) * step
            return
        i = min(i, half - LANES)
        pairs = load_ints(codes, at + i)
        store(out, i, multiply(subtract(to_floats(both(pairs, low)), less), factor))
        high = to_floats(shift_right(pairs, np.int32(4)))
        store(out, half + i, multiply(subtract(high, less), factor))
        i += LANES


@called
def escape_row(codes, at, halves, scale, dim, out):
    """Write an escaped token: int8 codes from ``at`` on times a bf16, through Hadamard matrices."""
    size = dim & -dim
    factor = splat(to_float(halves[scale]) * np.float32(1 / np.sqrt(np.float32(size))))
    for i in range(0, dim, LANES):
        value = multiply(load_codes(codes, at + i), factor)
        store(out, i, fold_8(fold_4(fold_2(fold_1(value)))))
    step = LANES
    while step < size:
        for i in range(0, dim, LANES):
            if i & step == 0:
                low, high = load(out, i), load(out, i + step)
                store(out, i, add(low, high))
                store(out, i + step, subtract(low, high))
        step *= 2
