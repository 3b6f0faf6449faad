# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What ``attend_blocks_numba`` does with 16 lanes at a time, as LLVM code.

A plane of sign bits is a mask of lanes, which no loop over numbers expresses; and small code of
fixed vectors compiles in a fraction of the time of loops that LLVM must vectorise first. Arguments
are addresses (``int64``) unless they are called count, factor or the like, and distances are in
bytes: arrays would carry shapes and reference counts through every call. Nothing is checked.
"""

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kvstrata.kernels.lane_code_numba import (
    CHUNK,
    CODES,
    F32,
    GROUP,
    I16,
    I32,
    I64,
    LANES,
    LONGS,
    Code,
    place_of,
    same,
)

_inline = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
_HALF = ir.VectorType(I64, 32)
_nothing, _integer, _single = types.void, types.int64, types.float32

_SOURCE, _FACTOR, _TWICE = (place_of(GROUP, name) for name in ("source", "factor", "twice"))
TOKEN_BYTES = 4 * 64  # a row of one number per token


def _for_heads(make):
    """Return ``make`` for one to four query heads, whose sums stay in registers."""
    return tuple(make(heads) for heads in range(1, 5))


def _add_rows_of(heads):
    @intrinsic
    def add_rows(typingctx, words, count, factors, stride, sums):
        def generate(*call):
            code = Code(*call)
            words, count, factors, stride, sums = code.args

            def add(word, totals):
                at, new = code.times(word, 8), []
                lanes = [code.mask(code.load(I16, words, at, 2 * q)) for q in range(4)]
                for head in range(heads):
                    skipped = (code.times(word, 4), code.times(stride, head))
                    factor = code.splat(code.load(F32, factors, *skipped))
                    for mask, total in zip(lanes, totals[4 * head : 4 * head + 4], strict=True):
                        new.append(code.b.select(mask, code.b.fadd(total, factor), total))
                return new

            old = [code.load(LANES, sums, 64 * cell) for cell in range(4 * heads)]
            for cell, total in enumerate(code.loop(count, old, add)):
                code.store(total, sums, 64 * cell)
            return code.context.get_dummy_value()

        i = _integer
        return _nothing(i, i, i, i, i), generate

    return add_rows


def _mid_scores_of(heads):
    @intrinsic
    def mid_scores(typingctx, chunks, count, turned, place, table, queries, stride, scores):
        def generate(*call):
            code = Code(*call)
            chunks, count, turned, place, table, queries, stride, scores = code.args

            def add(i, totals):
                chunk = code.b.add(chunks, code.times(i, CHUNK.itemsize))
                steps = code.mid_steps(chunk, turned, place, table)
                rows = [(code.times(i, 64), code.times(stride, head)) for head in range(heads)]
                queried = [code.load(LANES, queries, *row) for row in rows]
                return [
                    code.add_product(*each, steps) for each in zip(totals, queried, strict=True)
                ]

            totals = code.loop(count, [same(0.0)] * heads, add)
            for head, total in enumerate(totals):
                old = code.load(F32, scores, TOKEN_BYTES * head)
                new = code.b.fadd(old, code.fold(total, code.b.fadd))
                code.store(new, scores, TOKEN_BYTES * head)
            return code.context.get_dummy_value()

        return _nothing(*[_integer] * 8), generate

    return mid_scores


def _mid_values_of(heads):
    @intrinsic
    def mid_values(
        typingctx, chunks, count, turned, place, row, tokens, num, table, weights, sums, stride
    ):
        def generate(*call):
            code = Code(*call)
            chunks, count, turned, place, row, tokens, num, table, weights, sums, stride = code.args

            def add_chunk(i, _):
                chunk = code.b.add(chunks, code.times(i, CHUNK.itemsize))

                def add(k, totals):
                    token = code.load(I64, tokens, code.times(k, 8))
                    bits = code.b.add(turned, code.times(token, 8))
                    steps = code.mid_steps(
                        chunk, bits, code.b.add(place, code.b.mul(row, k)), table
                    )
                    at = code.times(token, 4)
                    factors = [
                        code.splat(code.load(F32, weights, at, TOKEN_BYTES * head))
                        for head in range(heads)
                    ]
                    return [
                        code.add_product(*one, steps) for one in zip(totals, factors, strict=True)
                    ]

                cells = [(code.times(i, 64), code.times(stride, head)) for head in range(heads)]
                old = [code.load(LANES, sums, *cell) for cell in cells]
                for cell, total in zip(cells, code.loop(num, old, add), strict=True):
                    code.store(total, sums, *cell)
                return []

            code.loop(count, [], add_chunk)
            return code.context.get_dummy_value()

        return _nothing(*[_integer] * 11), generate

    return mid_values


_add_one, _add_two, _add_three, _add_four = _for_heads(_add_rows_of)
_score_one, _score_two, _score_three, _score_four = _for_heads(_mid_scores_of)
_value_one, _value_two, _value_three, _value_four = _for_heads(_mid_values_of)


@_inline
def add_rows(words, count, factors, stride, sums, heads):
    """Add factor i of each head to the lanes of word i: sums (heads, 64), four heads at once."""
    while heads >= 4:
        _add_four(words, count, factors, stride, sums)
        factors, sums, heads = factors + 4 * stride, sums + 4 * TOKEN_BYTES, heads - 4
    if heads == 3:
        _add_three(words, count, factors, stride, sums)
    elif heads == 2:
        _add_two(words, count, factors, stride, sums)
    elif heads == 1:
        _add_one(words, count, factors, stride, sums)


@_inline
def mid_scores(chunks, count, turned, place, table, queries, stride, scores, heads):
    """Add what its refinement adds to the scores of a mid token, ``TOKEN_BYTES`` apart.

    Args:
        chunks: How to read 16 components each; see CHUNK.
        count: How many.
        turned: The token's plane bits.
        place: Its MID row.
        table: float32, what each fine code adds to its base value.
        queries: float32, in components.
        stride: From one query head to the next.
        scores: float32, the token's.
        heads: Query heads.
    """
    while heads >= 4:
        _score_four(chunks, count, turned, place, table, queries, stride, scores)
        queries, scores, heads = queries + 4 * stride, scores + 4 * TOKEN_BYTES, heads - 4
    if heads == 3:
        _score_three(chunks, count, turned, place, table, queries, stride, scores)
    elif heads == 2:
        _score_two(chunks, count, turned, place, table, queries, stride, scores)
    elif heads == 1:
        _score_one(chunks, count, turned, place, table, queries, stride, scores)


@_inline
def mid_values(
    chunks, count, turned, place, row, tokens, num, table, weights, sums, stride, heads
):  # fmt: skip
    """Add the refinements of ``num`` mid tokens, weighted: sums float32 (heads, components).

    ``tokens`` are int64 numbers of tokens, whose MID rows are ``row`` bytes apart from ``place``;
    for the rest see ``mid_scores``.
    """
    while heads >= 4:
        _value_four(chunks, count, turned, place, row, tokens, num, table, weights, sums, stride)
        weights, sums, heads = weights + 4 * TOKEN_BYTES, sums + 4 * stride, heads - 4
    if heads == 3:
        _value_three(chunks, count, turned, place, row, tokens, num, table, weights, sums, stride)
    elif heads == 2:
        _value_two(chunks, count, turned, place, row, tokens, num, table, weights, sums, stride)
    elif heads == 1:
        _value_one(chunks, count, turned, place, row, tokens, num, table, weights, sums, stride)


@intrinsic
def turn_words(typingctx, first, second, third, fourth, target):
    """Write the transpose of 4 x 16 words of 64 bits: bit i of word j becomes bit j of word i.

    Six times, words i and i + 32 swap half of their bits and become words 2i and 2i + 1: after six
    rounds each word's number has gone round into its bits.
    """

    def generate(*call):
        code = Code(*call)
        b, halves = code.b, []
        for pair in (code.args[:2], code.args[2:4]):
            a, c = (code.load(LONGS, place) for place in pair)
            order = ir.Constant(ir.VectorType(I32, 32), list(range(32)))
            halves.append(b.shuffle_vector(a, c, order))
        low, high = halves
        for shift in (32, 16, 8, 4, 2, 1):
            kept = sum(((1 << shift) - 1) << bit for bit in range(0, 64, 2 * shift))
            by, mask = (ir.Constant(_HALF, [value] * 32) for value in (shift, kept))
            moved = b.and_(b.xor(b.lshr(low, by), high), mask)
            high, low = b.xor(high, moved), b.xor(low, b.shl(moved, by))
            orders = [[i + j for i in range(n, n + 16) for j in (0, 32)] for n in (0, 16)]
            low, high = (
                b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 32), order))
                for order in orders
            )
        code.store(low, code.args[4])
        return code.store(high, code.args[4], 256)

    i = _integer
    return _nothing(i, i, i, i, i), generate


@intrinsic
def fill_factors(typingctx, groups, count, queries, factors):
    """Write each word's factor, a query times twice a coefficient, and return the sum of all."""

    def generate(*call):
        code = Code(*call)
        groups, count, queries, factors = code.args

        def multiply(i, totals):
            group = code.b.add(groups, code.times(i, GROUP.itemsize))
            query = code.load(LANES, queries, code.load(I64, group, _SOURCE))
            product = code.b.fmul(query, code.load(LANES, group, _TWICE))
            code.store(product, factors, code.load(I64, group, _FACTOR))
            return [code.b.fadd(totals[0], product)]

        (total,) = code.loop(count, [same(0.0)], multiply)
        return code.fold(total, code.b.fadd)

    i = _integer
    return _single(i, i, i, i), generate


@intrinsic
def add_terms(typingctx, twice, sums, less, target):
    """Add (sums - less) * twice, 16 numbers."""

    def generate(*call):
        code = Code(*call)
        twice, sums, less, target = code.args
        terms = code.b.fsub(code.load(LANES, sums), code.splat(less))
        old = code.load(LANES, target)
        return code.store(code.add_product(old, code.load(LANES, twice), terms), target)

    i = _integer
    return _nothing(i, i, _single, i), generate


@intrinsic
def dot(typingctx, left, right, count):
    """Return the dot product of ``count`` times 16 numbers."""

    def generate(*call):
        code = Code(*call)
        left, right, count = code.args

        def add(i, totals):
            at = code.times(i, 64)
            return [
                code.add_product(totals[0], code.load(LANES, left, at), code.load(LANES, right, at))
            ]

        (total,) = code.loop(count, [same(0.0)], add)
        return code.fold(total, code.b.fadd)

    return _single(_integer, _integer, _integer), generate


def _add_scaled(is_code):
    @intrinsic
    def add_scaled(typingctx, target, factor, row, count):
        def generate(*call):
            code = Code(*call)
            target, factor, row, count = code.args
            factor = code.splat(factor)

            def add(i, _):
                at = code.times(i, 64)
                if is_code:
                    value = code.load(CODES, row, code.times(i, 16))
                    value = code.b.sitofp(value, LANES)
                else:
                    value = code.load(LANES, row, at)
                code.store(
                    code.add_product(code.load(LANES, target, at), value, factor), target, at
                )
                return []

            code.loop(count, [], add)
            return code.context.get_dummy_value()

        return _nothing(_integer, _single, _integer, _integer), generate

    return add_scaled


# Add ``count`` times 16 float32 numbers, or int8 codes, times a factor.
add_scaled, add_scaled_codes = _add_scaled(False), _add_scaled(True)


@intrinsic
def scale(typingctx, target, factor, count):
    """Multiply ``count`` times 16 numbers by a factor."""

    def generate(*call):
        code = Code(*call)
        target, factor, count = code.args
        factor = code.splat(factor)

        def multiply(i, _):
            at = code.times(i, 64)
            code.store(code.b.fmul(code.load(LANES, target, at), factor), target, at)
            return []

        code.loop(count, [], multiply)
        return code.context.get_dummy_value()

    return _nothing(_integer, _single, _integer), generate
