"""Decode attention over compressed blocks on CPU: what is done with one KV head of a block.

An item is one KV head of one block of one sequence. A plane of sign bits is looked up four bits at
a time: for keys the 16 sums of four words' +-factor lie in one register, and a token's bits of
these words say which one to take; for values the 16 sums of four tokens' +-weight, and a word's
bits of these tokens say which. So 64 bits take one permutation and one addition per query head,
where masked additions would take four. Bits of keys are transposed first, eight words at once
(``turn_eight``). Sums of values stay one per word until a run of blocks ends. Mid tokens are
counted as if they were base, and what their refinement adds is counted as well.

Per item, with G query heads, D = head_dim, and W words of each side: reads the words and writes
nothing; D * R multiply-adds of G rows by R components for the queries; W / 16 * 16 * 2 G vector
operations on each side, for keys about as many for the tables; G exponentials per token; for each
mid token about 20 + G operations per 16 refined components. At D = 128, G = 4 and 2.3 bits some
11,000 vector operations for 32 KiB of bf16 keys and values: bound by instructions, not by memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from kvstrata.kernels.attend_places_numba import (
    escapes_before,
    fetch_side,
    fits,
    mid_bytes_before,
    num_words,
)
from kvstrata.kernels.attend_tables_numba import (
    add_keys,
    add_values,
    fill_factors,
    fill_tables,
)
from kvstrata.kernels.attend_tokens_numba import (
    add_row,
    add_rows,
    bias_row,
    dot,
    escape_row,
    part_words,
    refine,
    scale_row,
    turn_back,
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
from kvstrata.kernels.compiled import VECTORS, inlined, kernel
from kvstrata.kernels.exponential_numba import exponential
from kvstrata.kernels.few_products_numba import multiply_few
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.token_masks import TOKENS
from kvstrata.kernels.vectors_numba import (
    LANES,
    add,
    choose,
    larger,
    largest_lane,
    load,
    multiply,
    multiply_add,
    splat,
    store,
    subtract,
    sum_lanes,
)
from kvstrata.kernels.word_vectors_numba import copy_words, lanes_of, lowest_bit, turn_eight

# A block whose scores are all this far below the largest so far adds less than float32 resolves.
_NEGLIGIBLE = np.float32(28.0)
_NONE = np.float32(-np.inf)
_ALL = np.uint64(2**64 - 1)
_ZERO, _ONE = np.float32(0), np.float32(1)


@inlined
def _list_tokens(mask, tokens):
    """Write the numbers of a mask's tokens, and return how many there are."""
    count = 0
    while mask != 0:
        tokens[count] = lowest_bit(mask)
        mask &= mask - np.uint64(1)
        count += 1
    return count


@inlined
def _whole(pages, room, first, words):
    """Return where words may be read by whole vectors; at the arena's end that is a copy."""
    if fits(pages.words, first, words):
        return pages.words, first
    copy_words(pages.words, first, words, room.words)
    return room.words, 0


@inlined
def _score(
    pages, side, tables, room, start, fields, counts, h, heads, group, dim, escapes, mids, one
):
    """Write the scores (G, 64) of one KV head of a block; ``room.rows`` are its queries."""
    plan, words = side.plan, num_words(side.plan, h)
    first = (start + pages.offsets[fields + WORDS]) // 8 + plan.offsets[h * MAX_WIDTH]
    stored, first = _whole(pages, room, first, words)
    part_words(stored, first, words, room.halves)
    columns, row = room.queries.size // group, room.factors.size // group
    kept = max(plan.sizes[h * MAX_WIDTH], plan.counts[h])
    multiply_few(
        room.rows, 0, dim, group, side.matrix, h * columns * dim, dim, kept, room.queries, 0,
        columns,
    )  # fmt: skip
    for j in range(group):
        constant = dot(room.rows, j * dim, side.mean, h * dim, dim)
        room.state[3 * group + j] += constant * _ZERO
        for quarter in range(0, TOKENS, LANES):
            store(room.scores, j * TOKENS + quarter, splat(constant))
        store(room.factors, j * row + words, splat(_ZERO))
        fill_factors(room.queries, j * columns, plan, h, dim, room.factors, j * row)
    num_bytes = (words + 7) // 8
    fill_tables(room.factors, 8 * num_bytes, group, tables.signs, room.tables)
    for i in range(num_bytes):
        turn_eight(stored, first + 8 * i, room.bits, i * TOKENS)
    add_keys(group, room.bits, num_bytes, room.tables, one, room.scores)
    count, offset = plan.counts[h], pages.offsets[fields + MID]
    if mids != 0 and count > 0 and offset != ABSENT:
        at = start + offset + mid_bytes_before(pages, plan, counts + heads, h)
        num = _list_tokens(mids, room.tokens)
        refine(
            room.halves, plan, tables.deltas, pages.bytes, at, count, h, room.tokens, num, dim,
            room.refined,
        )  # fmt: skip
        for k in range(num):
            t = room.tokens[k]
            for j in range(group):
                extra = dot(room.queries, j * columns, room.refined, k * dim, count)
                room.scores[j * TOKENS + t] += extra
    if escapes != 0:
        place = escapes_before(pages, counts, h)
        scale = (start + pages.offsets[fields + SCALES]) // 2 + place
        at = start + pages.offsets[fields + CODES] + place * dim
        while escapes != 0:
            t = lowest_bit(escapes)
            escapes &= escapes - np.uint64(1)
            escape_row(pages.codes, at, pages.halves, scale, dim, room.row)
            for j in range(group):
                room.scores[j * TOKENS + t] = dot(room.rows, j * dim, room.row, 0, dim)
            scale, at = scale + 1, at + dim


@inlined
def _rescale(room, j, group, dim, factor):
    """Multiply what a run has summed up for one query head."""
    row = room.sums.size // group
    scale_row(room.sums, j * row, row, factor)
    scale_row(room.components, j * dim, dim, factor)
    scale_row(room.biases, j * dim, dim, factor)
    scale_row(room.escaped, j * dim, dim, factor)
    room.state[group + j] *= factor
    room.state[2 * group + j] *= factor


@inlined
def _weigh(room, group, dim, valid):
    """Turn scores into weights, relative to the largest so far; tell whether any counts.

    As in FlashAttention (arXiv:2205.14135, algorithm 1).
    """
    counts, none = False, splat(_NONE)
    for j in range(group):
        at = j * TOKENS
        top = none
        for quarter in range(0, TOKENS, LANES):
            score = choose(lanes_of(valid, quarter), load(room.scores, at + quarter), none)
            store(room.scores, at + quarter, score)
            top = larger(score, top)
        highest, largest = largest_lane(top), room.state[j]
        counts |= not highest < largest - _NEGLIGIBLE
        if highest > largest:
            if largest > _NONE:
                _rescale(room, j, group, dim, np.exp(largest - highest))
            room.state[j] = highest
    if counts:
        for j in range(group):
            at, less = j * TOKENS, splat(room.state[j])
            total = splat(_ZERO)
            for quarter in range(0, TOKENS, LANES):
                weight = exponential(subtract(load(room.scores, at + quarter), less))
                store(room.scores, at + quarter, weight)
                total = add(total, weight)
            room.state[group + j] += sum_lanes(total)
    return counts


@inlined
def _mass(weights, at, mask):
    """Return the sum of the weights of the tokens in a mask."""
    total, zero = splat(_ZERO), splat(_ZERO)
    for quarter in range(0, TOKENS, LANES):
        total = add(total, choose(lanes_of(mask, quarter), load(weights, at + quarter), zero))
    return sum_lanes(total)


@inlined
def _sum_values(
    pages, side, tables, room, start, fields, counts, h, heads, group, dim, escapes, mids, one
):
    """Add the weighted values of one KV head of a block to a run's sums."""
    plan, fields = side.plan, fields + SIDE_FIELDS
    step = tables.steps[pages.bytes[start + pages.offsets[fields - SIDE_FIELDS + BIAS_STEPS] + h]]
    if step > 0:
        at = start + pages.offsets[fields - SIDE_FIELDS + BIAS_CODES] + h * (dim // 2)
        bias_row(pages.bytes, at, step, dim, room.row)
        for j in range(group):
            mass = _mass(room.scores, j * TOKENS, ~(escapes | mids))
            add_row(room.biases, j * dim, room.row, 0, dim, mass)
    if escapes != 0:
        place, left = escapes_before(pages, counts, h), escapes
        scale = (start + pages.offsets[fields + SCALES]) // 2 + place
        at = start + pages.offsets[fields + CODES] + place * dim
        while left != 0:
            t = lowest_bit(left)
            left &= left - np.uint64(1)
            escape_row(pages.codes, at, pages.halves, scale, dim, room.row)
            for j in range(group):
                add_row(room.escaped, j * dim, room.row, 0, dim, room.scores[j * TOKENS + t])
                room.scores[j * TOKENS + t] = _ZERO
            scale, at = scale + 1, at + dim
    for j in range(group):
        room.state[2 * group + j] += _mass(room.scores, j * TOKENS, _ALL)
    words = num_words(plan, h)
    first = (start + pages.offsets[fields + WORDS]) // 8 + plan.offsets[h * MAX_WIDTH]
    stored, first = _whole(pages, room, first, words)
    part_words(stored, first, words, room.halves)
    fill_tables(room.scores, TOKENS, group, tables.signs, room.tables)
    add_values(group, room.halves, words, room.tables, one, room.sums)
    count, offset = plan.counts[h], pages.offsets[fields + MID]
    if mids != 0 and count > 0 and offset != ABSENT:
        at = start + offset + mid_bytes_before(pages, plan, counts + heads, h)
        num = _list_tokens(mids, room.tokens)
        refine(
            room.halves, plan, tables.deltas, pages.bytes, at, count, h, room.tokens, num, dim,
            room.refined,
        )  # fmt: skip
        for j in range(group):
            add_rows(
                room.components, j * dim, room.refined, dim, count, room.scores, j * TOKENS,
                room.tokens, num,
            )  # fmt: skip


@inlined
def _clear(row):
    for i in range(row.size):
        row[i] = _ZERO


@inlined
def _begin_run(room, group):
    _clear(room.sums)
    _clear(room.components)
    _clear(room.biases)
    _clear(room.escaped)
    _clear(room.state)
    for j in range(group):
        room.state[j] = _NONE


@inlined
def _end_run(side, room, h, group, dim, out, to, lse, lse_to):
    """Turn a run's sums back into values, and write them and the logarithm of the softmax sum."""
    plan, row = side.plan, room.sums.size // group
    place = h * MAX_WIDTH
    for j in range(group):
        total, poison = room.state[group + j], room.state[3 * group + j]
        if not total > 0:
            for i in range(dim):
                out[to + j * dim + i] = poison
            lse[lse_to + j] = _NONE + poison
            continue
        norm = _ONE / total
        _rescale(room, j, group, dim, norm)
        for plane in range(plan.widths[h * dim]):
            at = j * row + plan.offsets[place + plane] - plan.offsets[place]
            for c in range(0, plan.sizes[place + plane], LANES):
                step = load(plan.steps, (place + plane) * dim + c)
                sums = load(room.components, j * dim + c)
                store(
                    room.components, j * dim + c, multiply_add(load(room.sums, at + c), step, sums)
                )
        for c in range(0, dim, LANES):
            at = j * dim + c
            scaled = multiply(load(room.components, at), load(side.scale, h * dim + c))
            store(room.rows, at, add(scaled, load(room.biases, at)))
        lse[lse_to + j] = room.state[j] + np.log(total) + poison
    multiply_few(
        room.rows, 0, dim, group, side.matrix, h * dim * dim, dim, dim, room.components, 0, dim
    )
    for j in range(group):
        if room.state[group + j] > 0:
            mass, poison = splat(room.state[2 * group + j]), splat(room.state[3 * group + j])
            for c in range(0, dim, LANES):
                value = add(load(room.components, j * dim + c), load(room.escaped, j * dim + c))
                value = multiply_add(mass, load(side.mean, h * dim + c), add(value, poison))
                store(out, to + j * dim + c, value)


@kernel(**VECTORS)
def attend_items(
    queries, scaling, pages, rows, places, ends, cos, sin, keys, values, tables, room, heads, dim,
    half_turn, first, stop, out, lse, part_out, part_lse,
):  # fmt: skip
    """Attend to items ``first`` to ``stop``: sequence by sequence, head by head, block by block.

    A run is what one head of one sequence has of them. Its attention is written to ``out`` and
    ``lse``; but that of a first run which does not begin with the head's first block, to
    ``part_out`` and ``part_lse``. Returns that run's number, sequence * H + head, or -1.
    """
    group = room.state.size // 4
    size = group * dim
    sequence, item, before, part = 0, first, 0, -1
    while item < stop:
        count = ends[sequence + 1] - ends[sequence]
        if item >= before + count * heads:
            before += count * heads
            sequence += 1
            continue
        h, b = (item - before) // count, (item - before) % count
        last = min(count, b + stop - item)
        item += last - b
        run = sequence * heads + h
        _begin_run(room, group)
        starts_late = b > 0
        while b < last:
            entry = ends[sequence] + b
            b += 1
            page = rows[entry]
            following = rows[entry + 1] if b < last else page
            start, fields = pages.starts[page], page * NUM_FIELDS
            masks = (start + pages.offsets[fields + MASKS]) // 8 + h
            tokens = pages.num_tokens[page]
            if tokens == 0:
                continue
            k_escape, k_mid = np.uint64(pages.words[masks]), np.uint64(pages.words[masks + heads])
            masks = (start + pages.offsets[fields + SIDE_FIELDS + MASKS]) // 8 + h
            v_escape, v_mid = np.uint64(pages.words[masks]), np.uint64(pages.words[masks + heads])
            valid = ~((k_escape & k_mid) | (v_escape & v_mid))
            valid &= _ALL >> np.uint64(TOKENS - tokens)
            if valid == 0:
                continue
            turn_back(
                queries, run * size, scaling, cos, sin, places[entry] * 2 * half_turn, half_turn,
                group, dim, room.rows,
            )  # fmt: skip
            counts = page * 4 * heads
            fetch_side(pages, keys.plan, following, 0, h, heads, dim)
            _score(
                pages, keys, tables, room, start, fields, counts, h, heads, group, dim,
                k_escape & ~k_mid, k_mid & ~k_escape, tables.signs[0],
            )  # fmt: skip
            fetch_side(pages, values.plan, following, SIDE_FIELDS, h, heads, dim)
            if _weigh(room, group, dim, valid):
                _sum_values(
                    pages, values, tables, room, start, fields, counts + 2 * heads, h, heads, group,
                    dim, v_escape & ~v_mid, v_mid & ~v_escape, tables.signs[0],
                )  # fmt: skip
        part = run if starts_late else part
        target, to = (part_out, 0) if starts_late else (out, run * size)
        logs, log_to = (part_lse, 0) if starts_late else (lse, run * group)
        _end_run(values, room, h, group, dim, target, to, logs, log_to)
    return part


@kernel(**VECTORS)
def merge_parts(out, lse, runs, group, dim, part_out, part_lse):
    """Merge what each thread has of a run that began in another, if it has any, into the run's."""
    for part in range(runs.size):
        for j in range(group if runs[part] >= 0 else 0):
            query = runs[part] * group + j
            mine, other = lse[query], part_lse[part * group + j]
            if mine == _NONE and other == _NONE:
                continue
            top = max(mine, other)
            total = np.exp(mine - top) + np.exp(other - top)
            share, rest = np.exp(mine - top) / total, np.exp(other - top) / total
            for i in range(dim):
                value = part_out[(part * group + j) * dim + i]
                out[query * dim + i] = out[query * dim + i] * share + value * rest
            lse[query] = top + np.log(total)
