# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention over compressed blocks on CPU: one pass per KV head of a block, in registers.

A plane of sign bits is a mask of vector lanes: the scores of 64 tokens are four vectors of 16, and
one word adds one coefficient to the lanes whose bit is set (``add_rows``), for four query heads at
once. For values the words are turned first (``turn_words``), 64 at a time, so that the same
operation adds one token's weight to 64 components. Sums of +-coefficient are then twice the sum
over the set bits less the sum of all. Mid tokens are counted as if they were base, and what their
refinement adds to each component is looked up in registers and counted as well.

Per KV head of a block, with G query heads: reads its W words and writes nothing; 4 G masked vector
additions per word of K and of V; a transposition per 64 words (71 ns measured); G exponentials per
token; for each mid token about 6 + G operations per 16 refined components.
"""

import zlib
from pathlib import Path

import numpy as np
from numba import njit

from kvstrata.kernels.attend_lanes_numba import (
    TOKEN_BYTES,
    add_rows,
    add_scaled,
    add_scaled_codes,
    add_terms,
    dot,
    fill_factors,
    mid_scores,
    mid_values,
    scale,
    turn_words,
)
from kvstrata.kernels.attend_tokens_numba import (
    brain_float_at,
    byte_at,
    copy_words,
    exponentials,
    integer_at,
    keep,
    largest_of,
    lowest_bit,
    put_integer,
    put_single,
    read_escape,
    read_nibbles,
    single_at,
    spread,
    sum_of,
    turn_back_pairs,
    turn_pair,
    turn_sixteens,
    word_at,
)
from kvstrata.kernels.block_pages import (
    ABSENT,
    BIAS_CODES,
    BIAS_STEPS,
    CODES,
    MASKS,
    MID,
    NUM_FIELDS,
    SCALES,
    SIDE_FIELDS,
    WORDS,
)
from kvstrata.kernels.lane_code_numba import GROUP, place_of

# A block whose scores are all this far below the largest so far adds less than float32 resolves.
_NEGLIGIBLE = np.float32(28.0)
_inline = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
_GROUP_BYTES, _WORD, _TWICE = GROUP.itemsize, place_of(GROUP, "word"), place_of(GROUP, "twice")
# One head of one side: where its words start in bytes, then counts.
HEAD = np.dtype([(n, "i8") for n in ("word", "words", "groups", "turns", "mid", "chunks")])
_HEAD_BYTES = HEAD.itemsize
_FIRST_WORD, _NUM_WORDS, _NUM_GROUPS, _NUM_TURNS, _NUM_MID, _NUM_CHUNKS = range(0, _HEAD_BYTES, 8)
# What a call works on. The tables of a side: addresses of heads, groups and chunks, and how many
# bytes of the latter two a head has. Of ``room`` and ``sums``: where parts of them start.
_SIDE = [(n, "i8") for n in ("heads", "groups", "group_row", "chunks", "chunk_row")]
_NAMES = """
    arena end offsets tokens starts blocks heads queries dim half_turn scaled cos sin mean rows
    constants projected columns refinements steps factor_row padded turned scores chosen word_turns
    components biases escaped state value_mean value_scale inverse parts part_bytes sums out lse
"""
PLAN = np.dtype([*((n, "i8") for n in _NAMES.split()), ("keys", _SIDE), ("values", _SIDE)])
(
    _ARENA, _END, _OFFSETS, _TOKENS, _STARTS, _BLOCKS, _HEADS, _QUERIES, _DIM, _HALF_TURN,
    _SCALED, _COS, _SIN, _MEAN, _ROWS, _CONSTANTS, _PROJECTED, _COLUMNS, _REFINEMENTS, _STEPS,
    _FACTORS, _PADDED, _TURNED, _SCORES, _CHOSEN, _WORD_TURNS, _COMPONENTS, _BIASES, _ESCAPED,
    _STATE, _VALUE_MEAN, _VALUE_SCALE, _INVERSE, _PARTS, _PART_BYTES, _SUMS, _OUT, _LSE, _KEYS,
    _VALUES,
) = (place_of(PLAN, name) for name in PLAN.names or ())  # fmt: skip
_HEAD_TABLE, _GROUP_TABLE, _GROUP_ROW, _CHUNK_TABLE, _CHUNK_ROW = range(0, 40, 8)


@_inline
def _words_of(plan, words, count, room):
    """Return where ``count`` words lie with 15 more behind them that may be read."""
    if words + 8 * (count + 15) <= integer_at(plan + _END):
        return words
    copy_words(words, room + integer_at(plan + _PADDED), count)
    return room + integer_at(plan + _PADDED)


@_inline
def _turn(words, groups, turns, turned):
    """Write 8 bytes per token and 64 words: bit i is the token's bit of word i of four groups."""
    for turn in range(turns):
        at = groups + 4 * _GROUP_BYTES * turn + _WORD
        turn_words(
            words + integer_at(at),
            words + integer_at(at + _GROUP_BYTES),
            words + integer_at(at + 2 * _GROUP_BYTES),
            words + integer_at(at + 3 * _GROUP_BYTES),
            turned + 512 * turn,
        )


@_inline
def _turn_hadamard(row, dim, size):
    """Take the steps of a Hadamard transform above the fourth."""
    step = 64
    while step < 4 * size:
        for i in range(0, 4 * dim, 64):
            if i & step == 0:
                turn_pair(row + i, row + i + step)
        step *= 2


@_inline
def _score(plan, head, item, fields, starts, escapes, mids, room, row):
    """Write the scores (G, 64) of one KV head of a block."""
    heads, dim = integer_at(plan + _QUERIES), integer_at(plan + _DIM)
    arena, scores = integer_at(plan + _ARENA), room + integer_at(plan + _SCORES)
    side = plan + _KEYS
    record = integer_at(side + _HEAD_TABLE) + _HEAD_BYTES * head
    groups = integer_at(side + _GROUP_TABLE) + integer_at(side + _GROUP_ROW) * head
    num_words = integer_at(record + _NUM_WORDS)
    words = arena + integer_at(fields + 8 * WORDS) + integer_at(record + _FIRST_WORD)
    stride, factor_row = integer_at(plan + _COLUMNS), integer_at(plan + _FACTORS)
    queries = integer_at(plan + _PROJECTED) + item * heads * stride
    constants = integer_at(plan + _CONSTANTS) + 4 * item * heads
    for j in range(heads):
        total = fill_factors(
            groups, integer_at(record + _NUM_GROUPS), queries + j * stride, room + j * factor_row
        )
        start = single_at(constants + 4 * j) - np.float32(0.5) * total
        spread(scores + TOKEN_BYTES * j, start)
    add_rows(words, num_words, room, factor_row, scores, heads)
    chunks, mid_at = integer_at(record + _NUM_CHUNKS), integer_at(fields + 8 * MID)
    num_heads = integer_at(plan + _HEADS)
    if mids != 0 and chunks > 0 and mid_at != ABSENT:
        turned = room + integer_at(plan + _TURNED)
        words = _words_of(plan, words, num_words, room)
        _turn(words, groups, integer_at(record + _NUM_TURNS), turned)
        place = arena + mid_at + integer_at(starts + 8 * (num_heads + 1 + head))
        steps = integer_at(side + _CHUNK_TABLE) + integer_at(side + _CHUNK_ROW) * head
        table, size = integer_at(plan + _REFINEMENTS), integer_at(record + _NUM_MID) // 4
        while mids != 0:
            t = lowest_bit(mids)
            mids &= mids - np.uint64(1)
            mid_scores(
                steps, chunks, turned + 8 * t, place, table, queries, stride, scores + 4 * t, heads
            )
            place += size
    if escapes != 0:
        first = integer_at(starts + 8 * head)
        scales = arena + integer_at(fields + 8 * SCALES) + 2 * first
        place = arena + integer_at(fields + 8 * CODES) + dim * first
        queries = integer_at(plan + _ROWS) + 4 * dim * item * heads
        size = dim & -dim
        norm = np.float32(1 / np.sqrt(size))
        while escapes != 0:
            t = lowest_bit(escapes)
            escapes &= escapes - np.uint64(1)
            read_escape(place, brain_float_at(scales) * norm, dim // 16, row)
            _turn_hadamard(row, dim, size)
            for j in range(heads):
                score = dot(queries + 4 * dim * j, row, dim // 16)
                put_single(scores + TOKEN_BYTES * j + 4 * t, score)
            scales, place = scales + 2, place + dim


@_inline
def _sum_values(plan, head, fields, starts, escapes, mids, room, row, sums):
    """Add the values of one KV head of a block, weighted, to the sums of its query heads."""
    heads, dim = integer_at(plan + _QUERIES), integer_at(plan + _DIM)
    arena, weights = integer_at(plan + _ARENA), room + integer_at(plan + _SCORES)
    side, at = plan + _VALUES, fields + 8 * SIDE_FIELDS
    record = integer_at(side + _HEAD_TABLE) + _HEAD_BYTES * head
    row_bytes = 4 * dim
    own = row_bytes * heads * head
    step_at = arena + integer_at(fields + 8 * BIAS_STEPS) + head
    step = single_at(integer_at(plan + _STEPS) + 4 * byte_at(step_at))
    if step > 0:
        place = arena + integer_at(fields + 8 * BIAS_CODES) + head * (dim // 2)
        read_nibbles(place, step, dim // 16, row)
        for j in range(heads):
            mass = sum_of(weights + TOKEN_BYTES * j, ~(escapes | mids))
            target = sums + integer_at(plan + _BIASES) + own + row_bytes * j
            add_scaled(target, mass, row, dim // 16)
    if escapes != 0:
        first, left = integer_at(starts + 8 * head), escapes
        scales = arena + integer_at(at + 8 * SCALES) + 2 * first
        place = arena + integer_at(at + 8 * CODES) + dim * first
        target = sums + integer_at(plan + _ESCAPED) + own
        while left != 0:
            t = lowest_bit(left)
            left &= left - np.uint64(1)
            factor = brain_float_at(scales)
            for j in range(heads):
                weight = single_at(weights + TOKEN_BYTES * j + 4 * t) * factor
                add_scaled_codes(target + row_bytes * j, weight, place, dim // 16)
            scales, place = scales + 2, place + dim
        for j in range(heads):
            keep(weights + TOKEN_BYTES * j, ~escapes)
    planed = sums + integer_at(plan + _STATE) + 12 * heads * head + 8
    for j in range(heads):
        mass = sum_of(weights + TOKEN_BYTES * j, ~np.uint64(0))
        put_single(planed + 12 * j, single_at(planed + 12 * j) + mass)
    num_words = integer_at(record + _NUM_WORDS)
    groups = integer_at(side + _GROUP_TABLE) + integer_at(side + _GROUP_ROW) * head
    words = arena + integer_at(at + 8 * WORDS) + integer_at(record + _FIRST_WORD)
    words = _words_of(plan, words, num_words, room)
    turned, turns = room + integer_at(plan + _TURNED), integer_at(record + _NUM_TURNS)
    _turn(words, groups, turns, turned)
    target = sums + integer_at(plan + _WORD_TURNS) * heads * TOKEN_BYTES * head
    for turn in range(turns):
        add_rows(turned + 512 * turn, 64, weights, TOKEN_BYTES, target, heads)
        target += heads * TOKEN_BYTES
    chunks, mid_at = integer_at(record + _NUM_CHUNKS), integer_at(at + 8 * MID)
    if mids != 0 and chunks > 0 and mid_at != ABSENT:
        tokens, count = room + integer_at(plan + _CHOSEN), 0
        while mids != 0:
            put_integer(tokens + 8 * count, lowest_bit(mids))
            mids &= mids - np.uint64(1)
            count += 1
        place = integer_at(starts + 8 * (integer_at(plan + _HEADS) + 1 + head))
        steps = integer_at(side + _CHUNK_TABLE) + integer_at(side + _CHUNK_ROW) * head
        mid_values(
            steps, chunks, turned, arena + mid_at + place, integer_at(record + _NUM_MID) // 4,
            tokens, count, integer_at(plan + _REFINEMENTS), weights,
            sums + integer_at(plan + _COMPONENTS) + own, row_bytes, heads,
        )  # fmt: skip


@_inline
def _rescale(plan, query, factor, sums):
    """Multiply the sums of one query head."""
    heads, dim = integer_at(plan + _QUERIES), integer_at(plan + _DIM)
    turns = integer_at(plan + _WORD_TURNS)
    head, j = query // heads, query % heads
    for turn in range(turns):
        scale(sums + ((head * turns + turn) * heads + j) * TOKEN_BYTES, factor, 4)
    for part in (_COMPONENTS, _BIASES, _ESCAPED):
        scale(sums + integer_at(plan + part) + 4 * dim * query, factor, dim // 16)
    state = sums + integer_at(plan + _STATE) + 12 * query
    put_single(state + 4, single_at(state + 4) * factor)
    put_single(state + 8, single_at(state + 8) * factor)


@_inline
def _weigh(plan, head, valid, room, sums):
    """Turn scores into weights, relative to the largest so far; tell whether any counts.

    As in FlashAttention (arXiv:2205.14135, algorithm 1).
    """
    heads, counts = integer_at(plan + _QUERIES), False
    scores = room + integer_at(plan + _SCORES)
    state = sums + integer_at(plan + _STATE) + 12 * heads * head
    for j in range(heads):
        top, largest = largest_of(scores + TOKEN_BYTES * j, valid), single_at(state + 12 * j)
        counts |= not top < largest - _NEGLIGIBLE
        if top > largest:
            _rescale(plan, head * heads + j, np.float32(np.exp(largest - top)), sums)
            put_single(state + 12 * j, top)
    if counts:
        for j in range(heads):
            at = state + 12 * j
            total = exponentials(scores + TOKEN_BYTES * j, single_at(at))
            put_single(at + 4, single_at(at + 4) + total)
    return counts


@_inline
def _attend(plan, first, stop, room, sums):
    """Attend to items ``first`` to ``stop``, item = head * N + block, into one thread's sums."""
    num_blocks, num_heads = integer_at(plan + _BLOCKS), integer_at(plan + _HEADS)
    arena, row = integer_at(plan + _ARENA), room + integer_at(plan + _CHOSEN) + 512
    for item in range(first, stop):
        head, block = item // num_blocks, item % num_blocks
        fields = integer_at(plan + _OFFSETS) + 8 * NUM_FIELDS * block
        masks = arena + integer_at(fields + 8 * MASKS) + 8 * head
        k_escape, k_mid = word_at(masks), word_at(masks + 8 * num_heads)
        masks = arena + integer_at(fields + 8 * (SIDE_FIELDS + MASKS)) + 8 * head
        v_escape, v_mid = word_at(masks), word_at(masks + 8 * num_heads)
        count = integer_at(integer_at(plan + _TOKENS) + 8 * block)
        valid = ~((k_escape & k_mid) | (v_escape & v_mid))
        valid &= ~np.uint64(0) >> np.uint64(64 - count)
        if valid == 0:
            continue
        starts = integer_at(plan + _STARTS) + 32 * (num_heads + 1) * block
        _score(plan, head, item, fields, starts, k_escape & ~k_mid, k_mid & ~k_escape, room, row)
        if _weigh(plan, head, valid, room, sums):
            starts += 16 * (num_heads + 1)
            escapes, mids = v_escape & ~v_mid, v_mid & ~v_escape
            _sum_values(plan, head, fields, starts, escapes, mids, room, row, sums)


@_inline
def _turn_queries(plan, first, stop):
    """Turn queries by minus each block's position, and multiply them by the mean key."""
    num_blocks, heads = integer_at(plan + _BLOCKS), integer_at(plan + _QUERIES)
    dim, half = integer_at(plan + _DIM), integer_at(plan + _HALF_TURN)
    for item in range(first, stop):
        head, block = item // num_blocks, item % num_blocks
        cos = integer_at(plan + _COS) + 8 * half * block
        sin = integer_at(plan + _SIN) + 8 * half * block
        for j in range(heads):
            query = integer_at(plan + _SCALED) + 4 * dim * (head * heads + j)
            out = integer_at(plan + _ROWS) + 4 * dim * (item * heads + j)
            turn_back_pairs(query, query + 4 * half, cos, sin, 4 * half, half // 16, out)
            for i in range(half // 16 * 16, half):
                x, y = single_at(query + 4 * i), single_at(query + 4 * (half + i))
                c, s = single_at(cos + 4 * i), single_at(sin + 4 * i)
                put_single(out + 4 * i, x * c + y * s)
                c, s = single_at(cos + 4 * (half + i)), single_at(sin + 4 * (half + i))
                put_single(out + 4 * (half + i), y * c - x * s)
            for i in range(2 * half, dim):
                put_single(out + 4 * i, single_at(query + 4 * i))
            mean = integer_at(plan + _MEAN) + 4 * dim * head
            constant = dot(out, mean, dim // 16)
            put_single(integer_at(plan + _CONSTANTS) + 4 * (item * heads + j), constant)


@_inline
def _merge(plan, query):
    """Add the sums of all parts to those of the first; return the planed weight, or -1."""
    parts, size = integer_at(plan + _PARTS), integer_at(plan + _PART_BYTES)
    sums = integer_at(plan + _SUMS)
    state, dim = integer_at(plan + _STATE) + 12 * query, integer_at(plan + _DIM)
    heads, turns = integer_at(plan + _QUERIES), integer_at(plan + _WORD_TURNS)
    top = np.float32(-np.inf)
    for part in range(parts):
        top = max(top, single_at(sums + size * part + state))
    lse = integer_at(plan + _LSE) + 4 * query
    put_single(lse, top)
    if top == -np.inf:
        return np.float32(-1)
    total = 0.0
    for part in range(parts):
        at = sums + size * part + state
        share = np.float32(np.exp(single_at(at) - top))
        if part > 0 or share != 1:
            _rescale(plan, query, share, sums + size * part)
        total += single_at(at + 4)
    put_single(lse, np.float32(top + np.log(total)))
    norm, planed = np.float32(1 / total), np.float32(0)
    one = np.float32(1)
    _rescale(plan, query, norm, sums)
    for part in range(parts):
        other = sums + size * part
        if part > 0:
            _rescale(plan, query, norm, other)
            for turn in range(turns):
                at = ((query // heads * turns + turn) * heads + query % heads) * TOKEN_BYTES
                add_scaled(sums + at, one, other + at, 4)
            for start in (_COMPONENTS, _BIASES, _ESCAPED):
                at = integer_at(plan + start) + 4 * dim * query
                add_scaled(sums + at, one, other + at, dim // 16)
        planed += single_at(other + state + 8)
    return planed


@_inline
def _finish(plan):
    """Put the parts' sums together and turn them back into values."""
    dim, heads = integer_at(plan + _DIM), integer_at(plan + _QUERIES)
    sums, size, turns = integer_at(plan + _SUMS), dim & -dim, integer_at(plan + _WORD_TURNS)
    side = plan + _VALUES
    for query in range(integer_at(plan + _HEADS) * heads):
        out = integer_at(plan + _OUT) + 4 * dim * query
        for i in range(dim):
            put_single(out + 4 * i, np.float32(0))
        planed = _merge(plan, query)
        if planed < 0:
            continue
        head, j = query // heads, query % heads
        components = sums + integer_at(plan + _COMPONENTS) + 4 * dim * query
        groups = integer_at(side + _GROUP_TABLE) + integer_at(side + _GROUP_ROW) * head
        for group in range(
            integer_at(integer_at(side + _HEAD_TABLE) + _HEAD_BYTES * head + _NUM_GROUPS)
        ):
            at = groups + _GROUP_BYTES * group
            words = sums + ((head * turns + group // 4) * heads + j) * TOKEN_BYTES
            words += 64 * (group % 4)
            add_terms(at + _TWICE, words, np.float32(0.5) * planed, components + integer_at(at))
        add_scaled(out, planed, integer_at(plan + _VALUE_MEAN) + 4 * dim * head, dim // 16)
        for c in range(dim):
            number = single_at(components + 4 * c)
            number *= single_at(integer_at(plan + _VALUE_SCALE) + 4 * (dim * head + c))
            number += single_at(sums + integer_at(plan + _BIASES) + 4 * (dim * query + c))
            row = integer_at(plan + _INVERSE) + 4 * dim * (dim * head + c)
            add_scaled(out, number, row, dim // 16)
        row = sums + integer_at(plan + _ESCAPED) + 4 * dim * query
        turn_sixteens(row, np.float32(1 / np.sqrt(size)), dim // 16)
        _turn_hadamard(row, dim, size)
        add_scaled(out, np.float32(1), row, dim // 16)


def _entries(stamp):
    """Return the functions that are compiled to disk.

    Numba looks only at the file of a function for changes, so what it compiles in from other files
    is told by a number that belongs to the key.
    """

    @njit(cache=True, nogil=True, error_model="numpy")
    def turn_queries(plan, first, stop):
        if stamp >= 0:
            _turn_queries(plan, first, stop)

    @njit(cache=True, nogil=True, error_model="numpy")
    def attend(plan, first, stop, room, sums):
        if stamp >= 0:
            _attend(plan, first, stop, room, sums)

    @njit(cache=True, nogil=True, error_model="numpy")
    def finish(plan):
        if stamp >= 0:
            _finish(plan)

    return turn_queries, attend, finish


_INCLUDED = ("attend_blocks", "attend_lanes_numba", "attend_tokens_numba", "lane_code_numba")
_here = Path(__file__)
_stamp = zlib.crc32(b"".join((_here.with_name(f"{name}.py")).read_bytes() for name in _INCLUDED))
turn_queries, attend, finish = _entries(_stamp)
