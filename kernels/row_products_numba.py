"""Products of pages of rows with a few rows of queries or weights: by pairs of bf16, or by FMA.

The numbers of the few rows tell who multiplies: uint16 is bf16, two of which are multiplied and
added at once (AVX512-BF16), float32 is FMA with what the pages hold widened. Up to four rows are
handled together, so that what is read once serves all of them, each number of rows by its own code.

While a half of a page is multiplied, that of a page later on is fetched: pages lie anywhere, and no
processor guesses the next.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvstrata.kernels.compiled import called, inlined
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.row_pages import PAGE_TOKENS
from kvstrata.kernels.vectors_numba import (
    HAS_PAIRS,
    LANES,
    add,
    add_pairs,
    call,
    floats,
    intrinsic,
    ints,
    load,
    many,
    multiply,
    pointer_to,
    splat,
    splat_at,
    splat_pair_at,
    store,
)
from kvstrata.kernels.word_vectors_numba import prefetch

_I16, _I32 = ir.IntType(16), ir.IntType(32)


@intrinsic
def _load_channels(typingctx, memory, at, factors):
    """Return two channels of 16 tokens, side by side as pairs or as a tuple of ``Floats``."""
    load_signature, load_one = load._defn(typingctx, memory, at)

    def generate_pairs(context, builder, signature, args):
        both = _load_32(context, builder, signature, args)
        order = [lane // 2 + lane % 2 * LANES for lane in range(2 * LANES)]
        return _shuffled(builder, both, both, order)

    def generate(context, builder, signature, args):
        places = (args[1], builder.add(args[1], args[1].type(LANES)))
        both = [load_one(context, builder, load_signature, (args[0], place)) for place in places]
        return context.make_tuple(builder, signature.return_type, both)

    if factors.dtype == types.uint16:
        return ints(memory, types.intp, factors), generate_pairs
    return types.UniTuple(floats, 2)(memory, types.intp, factors), generate


@intrinsic
def _load_tokens(typingctx, memory, low, high, row, factors):
    """Return 16 columns of two tokens at ``low``, and those at ``high``, as ``_load_channels``.

    As pairs, 32 columns from ``low`` on are interleaved within groups of eight: in each of these,
    four belong to the first result and four to the second. ``_in_order`` undoes that to sums.
    """
    load_signature, load_one = load._defn(typingctx, memory, low)
    arguments = (memory, *[types.intp] * 3, factors)

    def generate_pairs(context, builder, signature, args):
        one, two = (
            _load_32(context, builder, signature, (args[0], place))
            for place in (args[1], builder.add(args[1], args[3]))
        )
        found = [_shuffled(builder, one, two, order) for order in _INTERLEAVED]
        return context.make_tuple(builder, signature.return_type, found)

    def generate(context, builder, signature, args):
        found = []
        for place in args[1:3]:
            both = [
                load_one(context, builder, load_signature, (args[0], token))
                for token in (place, builder.add(place, args[3]))
            ]
            found.append(context.make_tuple(builder, types.UniTuple(floats, 2), both))
        return context.make_tuple(builder, signature.return_type, found)

    if factors.dtype == types.uint16:
        return types.UniTuple(ints, 2)(*arguments), generate_pairs
    return types.UniTuple(types.UniTuple(floats, 2), 2)(*arguments), generate


@intrinsic
def _in_order(typingctx, first, second, factors):
    """Return sums of what ``_load_tokens`` returned, in the order of columns."""

    def generate(context, builder, signature, args):
        both = args[:2]
        if factors.dtype == types.uint16:
            orders = (_IN_ORDER[:LANES], _IN_ORDER[LANES:])
            masks = (ir.Constant(many(_I32), order) for order in orders)
            both = [builder.shuffle_vector(*both, mask) for mask in masks]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(floats, 2)(floats, floats, factors), generate


# Four columns of every eight, of two tokens with 32 each: what one instruction interleaves.
_INTERLEAVED = [
    [8 * part + 4 * half + i // 2 + 32 * (i % 2) for part in range(4) for i in range(8)]
    for half in (0, 1)
]
_IN_ORDER = [column // 8 * 4 + column % 4 + column % 8 // 4 * LANES for column in range(2 * LANES)]


def _load_32(context, builder, signature, args):
    kind = ir.VectorType(_I16, 2 * LANES)
    found = builder.load(pointer_to(context, builder, signature.args[0], args[0], args[1], kind))
    found.align = 1
    return found


def _shuffled(builder, first, second, order):
    mask = ir.Constant(ir.VectorType(_I32, 2 * LANES), order)
    return builder.bitcast(builder.shuffle_vector(first, second, mask), many(_I32))


@intrinsic
def _add_two(typingctx, total, factors, at, two):
    """Return total + factors[at] * the first of two + factors[at + 1] * the second."""
    if two == ints:
        splat_signature, splat_pair = splat_pair_at._defn(typingctx, factors, at)
        _, add_both = add_pairs._defn(typingctx, floats, ints, ints)

        def generate_pairs(context, builder, signature, args):
            pair = splat_pair(context, builder, splat_signature, args[1:3])
            return add_both(context, builder, None, [args[0], pair, args[3]])

        return floats(floats, factors, types.intp, ints), generate_pairs
    splat_signature, splat_one = splat_at._defn(typingctx, factors, at)

    def generate(context, builder, signature, args):
        total, kind = args[0], many(ir.FloatType())
        for i, value in enumerate(cgutils.unpack_tuple(builder, args[3], 2)):
            place = builder.add(args[2], args[2].type(i))
            factor = splat_one(context, builder, splat_signature, [args[1], place])
            total = call(builder, "llvm.fma.v16f32", kind, [factor, value, total])
        return total

    return floats(floats, factors, types.intp, two), generate


AHEAD = 2  # pages that are fetched before their turn


def rows_of(queries: torch.Tensor, is_generic: bool = False) -> Any:
    """Return queries of any shape as ``score_pages`` reads them, flat.

    Args:
        queries: Of the dtype of the pages.
        is_generic: Multiply as machines do that have no pairs.
    """
    is_paired = HAS_PAIRS and queries.dtype == torch.bfloat16 and queries.shape[-1] % 32 == 0
    return as_numpy((queries if is_paired and not is_generic else queries.float()).flatten())


def _scorer(count):
    """Return what ``score_pages`` calls for ``count`` rows: two pages at once, to read rows once.

    That is also enough sums under way to hide their latency. An odd last page is its own other.
    """

    @called
    def run(q, at, memory, tables, pages, dim, scaling, scores, step):
        factor, size = splat(scaling), 2 * PAGE_TOKENS * dim
        for one in range(0, pages, 2):
            two = min(one + 1, pages - 1)
            low, high = np.int64(tables[one]) * size, np.int64(tables[two]) * size
            next_low = np.int64(tables[one + AHEAD]) * size
            next_high = np.int64(tables[two + AHEAD]) * size
            a, b = splat(np.float32(0)), splat(np.float32(0))
            c, d, e, f, g, h = a, b, a, b, a, b
            for i in range(at, at + dim, 2):
                x, y = _load_channels(memory, low, q), _load_channels(memory, high, q)
                prefetch(memory, next_low)
                prefetch(memory, next_high)
                a, b = _add_two(a, q, i, x), _add_two(b, q, i, y)
                if count > 1:
                    c, d = _add_two(c, q, i + dim, x), _add_two(d, q, i + dim, y)
                if count > 2:
                    e, f = _add_two(e, q, i + 2 * dim, x), _add_two(f, q, i + 2 * dim, y)
                if count > 3:
                    g, h = _add_two(g, q, i + 3 * dim, x), _add_two(h, q, i + 3 * dim, y)
                low, high = low + 2 * PAGE_TOKENS, high + 2 * PAGE_TOKENS
                next_low, next_high = next_low + 2 * PAGE_TOKENS, next_high + 2 * PAGE_TOKENS
            place, other = one * PAGE_TOKENS, two * PAGE_TOKENS
            _store_both(scores, place, other, multiply(a, factor), multiply(b, factor))
            if count > 1:
                place, other = place + step, other + step
                _store_both(scores, place, other, multiply(c, factor), multiply(d, factor))
            if count > 2:
                place, other = place + step, other + step
                _store_both(scores, place, other, multiply(e, factor), multiply(f, factor))
            if count > 3:
                place, other = place + step, other + step
                _store_both(scores, place, other, multiply(g, factor), multiply(h, factor))

    return run


@inlined
def _store_both(out, place, other, x, y):
    store(out, place, x)
    store(out, other, y)


_score_one, _score_two, _score_three, _score_four = map(_scorer, (1, 2, 3, 4))


@called
def score_pages(count, q, at, memory, tables, pages, dim, scaling, scores, step):
    """Write the scores of all tokens of some pages for one to four rows of queries.

    Args:
        count: Rows, one behind the other.
        q: Of ``rows_of``.
        at: Where the first row starts.
        memory: Of ``RowPages``, flat.
        tables: int32, page numbers, and ``AHEAD`` more: any that exist, best those that come next.
        pages: How many.
        dim: A multiple of 16; for pairs, of 32.
        scaling: float32, factor on the scores.
        scores: float32.
        step: From one row of scores to the next.
    """
    if count == 1:
        _score_one(q, at, memory, tables, pages, dim, scaling, scores, step)
    elif count == 2:
        _score_two(q, at, memory, tables, pages, dim, scaling, scores, step)
    elif count == 3:
        _score_three(q, at, memory, tables, pages, dim, scaling, scores, step)
    else:
        _score_four(q, at, memory, tables, pages, dim, scaling, scores, step)


def _adder(count):
    """Return what ``add_pages`` calls for ``count`` rows: 32 columns at a time, in registers."""

    @called
    def run(weights, at, step, memory, tables, pages, dim, out, to):
        for low in range(0, dim, 2 * LANES):
            high = min(low + LANES, dim - LANES)
            a, b = splat(np.float32(0)), splat(np.float32(0))
            c, d, e, f, g, h = a, b, a, b, a, b
            own = at
            for page in range(pages):
                half = (np.int64(tables[page]) * 2 + 1) * PAGE_TOKENS * dim
                next_half = (np.int64(tables[page + AHEAD]) * 2 + 1) * PAGE_TOKENS * dim + low
                for t in range(0, PAGE_TOKENS, 2):
                    token = half + t * dim
                    x, y = _load_tokens(memory, token + low, token + high, dim, weights)
                    prefetch(memory, next_half + t * dim)
                    prefetch(memory, next_half + t * dim + dim)
                    a, b = _add_two(a, weights, own, x), _add_two(b, weights, own, y)
                    if count > 1:
                        k = own + step
                        c, d = _add_two(c, weights, k, x), _add_two(d, weights, k, y)
                    if count > 2:
                        k = own + 2 * step
                        e, f = _add_two(e, weights, k, x), _add_two(f, weights, k, y)
                    if count > 3:
                        k = own + 3 * step
                        g, h = _add_two(g, weights, k, x), _add_two(h, weights, k, y)
                    own += 2
            _add_both(out, to + low, to + high, _in_order(a, b, weights))
            if count > 1:
                _add_both(out, to + dim + low, to + dim + high, _in_order(c, d, weights))
            if count > 2:
                _add_both(out, to + 2 * dim + low, to + 2 * dim + high, _in_order(e, f, weights))
            if count > 3:
                _add_both(out, to + 3 * dim + low, to + 3 * dim + high, _in_order(g, h, weights))

    return run


@inlined
def _add_both(out, place, other, sums):
    _store_both(out, place, other, add(load(out, place), sums[0]), add(load(out, other), sums[1]))


_sum_one, _sum_two, _sum_three, _sum_four = map(_adder, (1, 2, 3, 4))


@called
def add_pages(count, weights, at, step, memory, tables, pages, dim, out, to):
    """Add the values of some pages, weighted for one to four heads, to as many rows.

    Args:
        count: Rows of weights.
        weights: As the queries of ``score_pages``.
        at: Where the first row starts.
        step: From one row of weights to the next.
        memory: As there, as all that follows; no value may be infinite or no number.
        tables: See above.
        pages: See above.
        dim: See above.
        out: float32, rows one behind the other.
        to: Where the first one starts.
    """
    if count == 1:
        _sum_one(weights, at, step, memory, tables, pages, dim, out, to)
    elif count == 2:
        _sum_two(weights, at, step, memory, tables, pages, dim, out, to)
    elif count == 3:
        _sum_three(weights, at, step, memory, tables, pages, dim, out, to)
    else:
        _sum_four(weights, at, step, memory, tables, pages, dim, out, to)
