"""Bit planes on a CPU: 16 components or 64 tokens at a time in vector registers.

Encoding transposes 16 x 16 tiles of tokens by components, so that 64 tokens of one component fill
four vectors; a comparison then is 64 bits of a word. Cells are symmetric about zero, so a binary
search finds the distance from zero, a plane at each step, and its bits are flipped below zero.
Decoding goes token by token: a word shifted left by 31 - t has token t's bit in the place of a
float's sign, so one bit operation turns -coefficient into the term.

Roofline per element, D = 64, 1.8 bits on average: encoding reads 2 bytes and takes about 1.2 vector
instructions of 16 lanes, of which a third transposes; decoding writes 2 bytes and takes 0.5. Both
are bound by instructions: an estimate of 4 and 10 GB/s of bf16 on one 2.5 GHz core.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import torch

from kvstrata.kernels.block_planes import MidRows, PlaneLayout
from kvstrata.kernels.compiled import VECTORS, inlined, kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.huge_memory import empty_huge
from kvstrata.kernels.lookups_numba import gather, pick, pick_of_32
from kvstrata.kernels.plane_plans_numba import FINE, STEPS, mid_tables, plan_of
from kvstrata.kernels.sign_codes import GRID_SIZE, MAX_WIDTH, code_table
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.token_masks import TOKENS
from kvstrata.kernels.vectors_numba import (
    LANES,
    absolute,
    add,
    add_ints,
    as_floats,
    both,
    choose,
    choose_ints,
    count_up,
    flip,
    has_bits,
    load,
    load_halves,
    load_ints,
    multiply,
    multiply_add,
    ones_of,
    reaches,
    shift_left,
    splat,
    splat_at,
    splat_int,
    steps_from_zero,
    store,
    store_ints,
    subtract,
    transpose_tile,
    word_of,
)

_ENCODE_GRAIN, _DECODE_GRAIN = 8, 16
_HALF_GRID = GRID_SIZE // 2
_SIGN = np.int32(-(2**31))
_ALL = np.uint64(2**64 - 1)
_MIDDLE, _SCALE = np.float32(_HALF_GRID), np.float32(128)


def _border_heaps():
    """Return the borders between codes above zero, in cells from zero, by width.

    As a heap: below the border at i lie those at 2 i, for what is less, and at 2 i + 1.
    """
    heaps = np.full((MAX_WIDTH + 1, _CELLS), GRID_SIZE, np.float32)
    for width in range(2, MAX_WIDTH + 1):
        codes = code_table(width).numpy()[_HALF_GRID:].astype(np.int32) >> 2
        borders = np.flatnonzero(np.diff(codes)) + 1
        for node in range(1, 1 << (width - 1)):
            depth = node.bit_length() - 1
            last = (2 * (node - (1 << depth)) + 1) << (width - 2 - depth)
            heaps[width, node] = borders[last - 1]
    return heaps.ravel()


_CELLS = 1 << (MAX_WIDTH - 1)  # codes above zero of the widest component
BORDERS, SIZES = _border_heaps(), STEPS.ravel()


def encode_block_planes_numba(
    y: torch.Tensor, layout: PlaneLayout, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``encode_block_planes_reference`` returns."""
    plan, (heads, blocks, _, dim) = plan_of(layout), y.shape
    words = torch.empty((blocks, layout.num_words), dtype=torch.int64)
    error = torch.empty(y.shape[:3], dtype=torch.float32)
    flat, costs = as_numpy(y.contiguous()).reshape(-1), weights.contiguous().numpy().reshape(-1)
    outputs = words.numpy(), error.numpy().reshape(-1)
    for_ranges(
        lambda a, b: _encode(
            flat, costs, plan.widths, plan.offsets, BORDERS, SIZES,
            np.empty(LANES * TOKENS, np.float32), *outputs, dim, blocks, a, b,
        ),
        heads * blocks,
        _ENCODE_GRAIN,
    )  # fmt: skip
    return words, error


@kernel(**VECTORS)
def _encode(
    y, weights, widths, offsets, borders, sizes, tile, words, error, dim, num_blocks, first, last
):
    """Encode the (head, block) pairs ``first`` to ``last``, heads ascending."""
    for item in range(first, last):
        for c in range(0, dim, LANES):
            encode_columns(
                y, item * TOKENS * dim, item // num_blocks, c, dim, weights, widths, offsets,
                borders, sizes, tile, words[item % num_blocks], error, item * TOKENS,
            )  # fmt: skip


@inlined
def _word(m0, m1, m2, m3):
    low = word_of(m0) | (word_of(m1) << np.uint64(16))
    high = word_of(m2) | (word_of(m3) << np.uint64(16))
    return low | (high << np.uint64(32))


@inlined
def _place(value):
    """Return the place of a value on the grid, in cells from zero."""
    return subtract(multiply_add(value, splat(_SCALE), splat(_MIDDLE)), splat(_MIDDLE))


@inlined
def _descend(node, below):
    return count_up(add_ints(node, node), below)


@inlined
def _nearer(rest, below, step):
    return choose(below, subtract(rest, step), add(rest, step))


@inlined
def encode_columns(
    y, start, h, c, dim, weights, widths, offsets, borders, sizes, tile, row, error, loss
):
    """Encode components ``c`` to ``c + 15`` of 64 tokens; add what they lose to ``error``.

    A value's code is found from the most significant bit on, by the distance from zero.
    """
    for q in range(0, TOKENS, LANES):
        transpose_tile(y, start + q * dim + c, dim, tile, q, TOKENS)
    zero = splat(np.float32(0))
    e0, e1, e2, e3 = zero, zero, zero, zero
    if c > 0:
        e0, e1 = load(error, loss), load(error, loss + 16)
        e2, e3 = load(error, loss + 32), load(error, loss + 48)
    for i in range(LANES):
        at = i * TOKENS
        width = np.int64(widths[h * dim + c + i])
        weight = splat_at(weights, h * dim + c + i)
        y0, y1 = load(tile, at), load(tile, at + 16)
        y2, y3 = load(tile, at + 32), load(tile, at + 48)
        if width > 0:
            place = h * MAX_WIDTH
            p0, p1, p2, p3 = _place(y0), _place(y1), _place(y2), _place(y3)
            above = _word(
                reaches(p0, zero), reaches(p1, zero), reaches(p2, zero), reaches(p3, zero)
            )
            row[offsets[place] + c + i] = np.int64(above)
            step = splat_at(sizes, width * MAX_WIDTH)
            y0, y1 = subtract(absolute(y0), step), subtract(absolute(y1), step)
            y2, y3 = subtract(absolute(y2), step), subtract(absolute(y3), step)
            if width > 1:
                p0, p1 = steps_from_zero(p0), steps_from_zero(p1)
                p2, p3 = steps_from_zero(p2), steps_from_zero(p3)
                n0 = splat_int(np.int32(1))
                n1, n2, n3 = n0, n0, n0
                for plane in range(1, width):
                    heap = width * _CELLS + (plane == MAX_WIDTH - 1) * LANES
                    step = splat_at(sizes, width * MAX_WIDTH + plane)
                    b0 = reaches(p0, pick(borders, heap, n0))
                    b1 = reaches(p1, pick(borders, heap, n1))
                    b2 = reaches(p2, pick(borders, heap, n2))
                    b3 = reaches(p3, pick(borders, heap, n3))
                    bits = _word(b0, b1, b2, b3)
                    row[offsets[place + plane] + c + i] = np.int64(bits ^ above ^ _ALL)
                    y0, y1 = _nearer(y0, b0, step), _nearer(y1, b1, step)
                    y2, y3 = _nearer(y2, b2, step), _nearer(y3, b3, step)
                    n0, n1 = _descend(n0, b0), _descend(n1, b1)
                    n2, n3 = _descend(n2, b2), _descend(n3, b3)
        e0 = multiply_add(multiply(weight, y0), y0, e0)
        e1 = multiply_add(multiply(weight, y1), y1, e1)
        e2 = multiply_add(multiply(weight, y2), y2, e2)
        e3 = multiply_add(multiply(weight, y3), y3, e3)
    store(error, loss, e0)
    store(error, loss + 16, e1)
    store(error, loss + 32, e2)
    store(error, loss + 48, e3)


def decode_block_planes_numba(
    words: torch.Tensor, layout: PlaneLayout, mid: MidRows | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return what ``decode_block_planes_reference`` returns."""
    plan, tables = plan_of(layout), mid_tables(mid, layout)
    blocks, kept = words.shape[0], layout.num_kept(refined=mid is not None)
    y = empty_huge((layout.num_heads, blocks * TOKENS, kept), dtype)
    flat, planes = as_numpy(y).reshape(-1), words.contiguous().numpy()
    for_ranges(
        lambda a, b: _decode(
            planes, plan, tables, FINE, np.zeros(2 * MAX_WIDTH * layout.dim, np.int32), flat,
            layout.dim, kept, a, b,
        ),
        layout.num_heads * blocks,
        _DECODE_GRAIN,
    )  # fmt: skip
    return y


@kernel(**VECTORS)
def _decode(words, plan, mid, fine, halves, y, dim, kept, first, last):
    """Decode the (head, block) pairs ``first`` to ``last``, heads ascending."""
    num_blocks = words.shape[0]
    for item in range(first, last):
        h, n = item // num_blocks, item % num_blocks
        decode_block(words[n], plan, mid, fine, halves, y, item * TOKENS * kept, dim, kept, h, n)


@inlined
def decode_block(row, plan, mid, fine, halves, y, start, dim, kept, h, n):
    """Write 64 tokens of one head, ``kept`` components each, from ``start`` on."""
    stage_words(row, plan, halves, dim, h)
    for c in range(0, kept, LANES):
        planes = np.int64(plan.widths[h * dim + c]) if c < dim else 0
        write_columns(halves, plan.steps, planes, h, c, dim, y, start + c, kept)
    if mid.masks.size > 0 and mid.masks[h, n] != 0:
        at, count = mid.starts[n * plan.counts.size + h], plan.counts[h]
        for t in range(TOKENS):
            if (mid.masks[h, n] >> t) & 1:
                _refine(halves, plan, fine, mid.rows, at, count, h, t, dim, y, start + t * kept)
                at += count // 4


@inlined
def stage_words(row, plan, halves, dim, h):
    """Copy the words of one head, low and high halves apart, a plane at a time."""
    for plane in range(plan.widths[h * dim]):
        place = h * MAX_WIDTH + plane
        _stage(row, plan.offsets[place], plan.sizes[place], halves, plane * dim)


@inlined
def _stage(row, start, size, target, at):
    """Split words into low and high halves; the vector's rest is of no meaning."""
    for c in range(0, size, LANES):
        if start + c + LANES <= row.size:
            store_ints(target, at + c, load_halves(row, start + c, np.int32(0)))
            store_ints(target, at + c + target.size // 2, load_halves(row, start + c, np.int32(1)))
        else:
            for i in range(c, size):
                target[at + i] = np.int32(row[start + i] & 0xFFFFFFFF)
                target[at + i + target.size // 2] = np.int32(row[start + i] >> 32)


def _column_writer(planes):
    """Return a function for components of up to so many planes: words and steps in registers."""

    @inlined
    def write(halves, steps, h, c, dim, y, start, row):
        at = h * MAX_WIDTH * dim + c
        s0 = load_ints(steps, at)
        s1 = load_ints(steps, at + dim) if planes > 1 else s0
        s2 = load_ints(steps, at + 2 * dim) if planes > 2 else s0
        s3 = load_ints(steps, at + 3 * dim) if planes > 3 else s0
        s4 = load_ints(steps, at + 4 * dim) if planes > 4 else s0
        s5 = load_ints(steps, at + 5 * dim) if planes > 5 else s0
        for half in range(2):
            place = c + half * MAX_WIDTH * dim
            w0 = load_ints(halves, place)
            w1 = load_ints(halves, place + dim) if planes > 1 else w0
            w2 = load_ints(halves, place + 2 * dim) if planes > 2 else w0
            w3 = load_ints(halves, place + 3 * dim) if planes > 3 else w0
            w4 = load_ints(halves, place + 4 * dim) if planes > 4 else w0
            w5 = load_ints(halves, place + 5 * dim) if planes > 5 else w0
            to = start + half * 32 * row
            for t in range(32):
                shift = np.int32(31 - t)
                value = _term(w0, shift, s0)
                if planes > 1:
                    value = add(value, _term(w1, shift, s1))
                if planes > 2:
                    value = add(value, _term(w2, shift, s2))
                if planes > 3:
                    value = add(value, _term(w3, shift, s3))
                if planes > 4:
                    value = add(value, _term(w4, shift, s4))
                if planes > 5:
                    value = add(value, _term(w5, shift, s5))
                store(y, to + t * row, value)

    return write


@inlined
def _term(word, shift, step):
    """Return minus ``step`` where the word's bit 31 - ``shift`` is set, else ``step``."""
    return as_floats(flip(both(shift_left(word, shift), splat_int(_SIGN)), step))


_write1, _write2, _write3, _write4, _write5, _write6 = map(_column_writer, range(1, 7))


@inlined
def write_columns(halves, steps, planes, h, c, dim, y, start, row):
    """Write the base values of components ``c`` to ``c + 15`` of 64 tokens, ``row`` apart."""
    if planes == 0:
        for t in range(TOKENS):
            store(y, start + t * row, splat(np.float32(0)))
    elif planes == 1:
        _write1(halves, steps, h, c, dim, y, start, row)
    elif planes == 2:
        _write2(halves, steps, h, c, dim, y, start, row)
    elif planes == 3:
        _write3(halves, steps, h, c, dim, y, start, row)
    elif planes == 4:
        _write4(halves, steps, h, c, dim, y, start, row)
    elif planes == 5:
        _write5(halves, steps, h, c, dim, y, start, row)
    else:
        _write6(halves, steps, h, c, dim, y, start, row)


@inlined
def _refine(halves, plan, fine, rows, row, count, h, t, dim, y, start):
    """Write the fine values of one token's first ``count`` components."""
    token, zero = splat_int(np.int32(np.uint32(1) << np.uint32(t & 31))), splat_int(np.int32(0))
    for c in range(0, count, LANES):
        code, planes = load_ints(plan.starts, h * dim + c), plan.widths[h * dim + c]
        for plane in range(planes):
            bits = load_ints(halves, c + plane * dim + (t >> 5) * MAX_WIDTH * dim)
            place = load_ints(plan.places, (h * MAX_WIDTH + plane) * dim + c)
            code = add_ints(code, choose_ints(has_bits(bits, token), place, zero))
        at = row + c // 8
        high, low = np.uint16(rows[at]), np.uint16(rows[at + count // 8])
        if c + 8 < count:
            high = np.uint16(high | (np.uint16(rows[at + 1]) << 8))
            low = np.uint16(low | (np.uint16(rows[at + 1 + count // 8]) << 8))
        code = add_ints(code, shift_left(ones_of(high), np.int32(1)))
        code = add_ints(code, ones_of(low))
        if planes < 3:  # their levels fit two registers, those of three bits another two
            value = pick_of_32(fine, 0, code)
        elif planes == 3:
            above = has_bits(code, splat_int(np.int32(32)))
            value = choose(above, pick_of_32(fine, 32, code), pick_of_32(fine, 0, code))
        else:
            value = gather(fine, code)
        if c + 8 >= count:
            inside = has_bits(ones_of(np.uint16(0xFF)), splat_int(np.int32(1)))
            value = choose(inside, value, load(y, start + c))
        store(y, start + c, value)
