"""Tokens to planes and back on a CPU, one block of one head at a time, so that it stays in L1.

Encoding a block multiplies its tokens, 16 components at a time, and quantises these; expanding
writes components, multiplies them, adds mean and bias, puts escapes in and rotates. Only the words
and the tokens themselves travel through memory. Blocks do not see each other, so their bytes do
not depend on how many are handled at once. Components that are zero are not multiplied.

Roofline per element, D = 64, bf16: both directions move 2 bytes and half a byte at most of words.
By instruction counts products take 0.05 ns on an AMX core at 2.5 GHz (see ``products_numba``),
quantising and finishing some 0.2 ns. Seen on a busy two-core machine: 1.1 to 2 GB/s of bf16.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="misc"

from typing import Any, NamedTuple

import numpy as np
import torch

from kvstrata.kernels.block_planes import NOT_FINITE, MidRows
from kvstrata.kernels.block_planes_numba import (
    BORDERS,
    SIZES,
    decode_block,
    encode_columns,
)
from kvstrata.kernels.compiled import VECTORS, inlined, kernel
from kvstrata.kernels.component_basis import ComponentBasis, product_dtype
from kvstrata.kernels.escape_rows import EscapeRows, row_starts, unpack_escape_rows
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.huge_memory import empty_huge
from kvstrata.kernels.page_runs import PageRun
from kvstrata.kernels.plane_plans_numba import FINE, mid_tables, plan_of
from kvstrata.kernels.products_numba import (
    Multiplier,
    aligned,
    begin_products,
    counted_depth,
    depth_step,
    end_products,
    multiplier_of,
    multiply_rows,
    pack,
    padded,
    padded_depth,
    rows_dtype,
    tile_config,
)
from kvstrata.kernels.row_pages import PAGE_TOKENS
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.token_masks import TOKENS, TokenClasses
from kvstrata.kernels.vectors_numba import (
    LANES,
    add,
    load,
    multiply,
    multiply_add,
    splat,
    store,
    subtract,
)
from kvstrata.kernels.written_rows_numba import page_scratch, put_keys, put_values

_GRAIN = 8


def _packed(basis: ComponentBasis, name: str, by: Multiplier) -> "np.ndarray[Any, Any]":
    """Return a matrix in the order in which products read it."""
    packed: np.ndarray[Any, Any] = basis.once((name, by), lambda: pack(getattr(basis, name), by))
    return packed


def _shift(basis: ComponentBasis) -> "np.ndarray[Any, Any]":
    """Return what the mean is turned into by the matrix that multiplies bf16 tokens.

    Taken off after the product, it rounds once where centred tokens would round twice.
    """

    def turned() -> "np.ndarray[Any, Any]":
        matrix = basis.forward.bfloat16().double()
        return (basis.mean.double()[..., None] * matrix).sum(1).float().numpy().reshape(-1)

    shift: np.ndarray[Any, Any] = basis.once("shift", turned)
    return shift


def encode_tokens_numba(
    x: torch.Tensor, basis: ComponentBasis, weights: torch.Tensor, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what ``encode_tokens`` returns."""
    plan, (heads, blocks, _, dim) = plan_of(basis.layout), x.shape
    dtype = product_dtype(x.dtype)
    by = multiplier_of(dtype)
    as_is = by != "floats" and x.dtype == torch.bfloat16 and dim % depth_step(by) == 0
    y = empty_huge(tuple(x.shape), dtype) if out is None else out
    words = empty_huge((blocks, basis.layout.num_words), torch.int64)
    error = torch.empty(x.shape[:3], dtype=torch.float32)
    tokens, costs = _flat(x), _flat(weights)
    tables = _flat(basis.mean), _packed(basis, "forward", by)
    shift = _shift(basis) if as_is else np.zeros(heads * dim, np.float32)
    outputs = as_numpy(y).reshape(-1), words.numpy(), error.numpy().reshape(-1)

    def work(first: int, last: int) -> None:
        row = padded(dim, by)
        rows = aligned(0 if as_is else TOKENS * row, rows_dtype(by))
        _encode_tokens(
            tokens, tokens if as_is else rows, as_is, row, *tables, shift, costs, plan.widths,
            plan.offsets, BORDERS, SIZES, aligned(3 * LANES * TOKENS, np.float32), tile_config(),
            *outputs, dim, blocks, first, last,
        )  # fmt: skip

    for_ranges(work, heads * blocks, _GRAIN)
    if not torch.isfinite(error).all():
        raise ValueError(NOT_FINITE)
    return y, words, error


@kernel(**VECTORS)
def _encode_tokens(
    x, rows, as_is, row, mean, packed, shift, weights, widths, offsets, borders, sizes, scratch,
    config, y, words, error, dim, num_blocks, first, last,
):  # fmt: skip
    """Encode the (head, block) pairs ``first`` to ``last``, heads ascending.

    ``rows`` is what is multiplied: the tokens as they are, or room for them less their mean.
    """
    begin_products(packed, config)
    wide = LANES
    sums, tile = scratch[: 2 * LANES * TOKENS], scratch[2 * LANES * TOKENS :]
    for item in range(first, last):
        h, start = item // num_blocks, item * TOKENS * dim
        at = start
        if not as_is:
            at = 0
            _centre(x, start, mean, h * dim, rows, row, dim)
        for c in range(0, dim, LANES):
            place = c % (2 * LANES)
            if place == 0:  # 32 columns at a time, so that what is spread over lanes serves both
                wide = min(2 * LANES, dim - c)
                multiply_rows(rows, at, row, packed, (h * dim + c) * row, row, row, sums, 0, wide)
            less = load(shift, h * dim + c)
            for t in range(TOKENS):
                store(y, start + t * dim + c, subtract(load(sums, t * wide + place), less))
            encode_columns(
                y, start, h, c, dim, weights, widths, offsets, borders, sizes, tile,
                words[item % num_blocks], error, item * TOKENS,
            )  # fmt: skip
    end_products(packed, config)


@inlined
def _centre(x, start, mean, row_of_mean, rows, row, dim):
    """Write 64 tokens less their mean, and zeros to the end of each row."""
    for c in range(0, row, LANES):
        for t in range(TOKENS):
            value = splat(np.float32(0))
            if c < dim:
                value = subtract(load(x, start + t * dim + c), load(mean, row_of_mean + c))
            store(rows, t * row + c, value)


class _Pages(NamedTuple):
    """Where expanded rows go instead of an array of their own; ``tables`` is empty if nowhere."""

    tables: "np.ndarray[Any, Any]"
    width: int  # of a head's row of ``tables``
    first: int  # page of each head
    is_keys: bool
    cos: "np.ndarray[Any, Any]"
    sin: "np.ndarray[Any, Any]"


_NO_FLOATS = np.zeros(0, np.float32)
_NO_PAGES = _Pages(np.zeros(0, np.int32), 0, 0, False, _NO_FLOATS, _NO_FLOATS)


def expand_numba(
    words: torch.Tensor,
    basis: ComponentBasis,
    classes: TokenClasses,
    mid: MidRows | None,
    shift: torch.Tensor | None,
    escapes: EscapeRows | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
) -> None:
    """Write what ``expand_reference`` returns to ``out``."""
    _expand_blocks(words, basis, classes, mid, shift, escapes, rotation, out, _NO_PAGES)


def _expand_blocks(
    words: torch.Tensor,
    basis: ComponentBasis,
    classes: TokenClasses,
    mid: MidRows | None,
    shift: torch.Tensor | None,
    escapes: EscapeRows | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    pages: _Pages,
) -> None:
    layout, none = basis.layout, _NO_FLOATS
    plan, dim = plan_of(layout), layout.dim
    by = multiplier_of(product_dtype(out.dtype))
    rows, firsts = none, np.zeros(0, np.int64)
    if escapes is not None:
        rows, firsts = _flat(unpack_escape_rows(escapes)), row_starts(escapes.masks).numpy()
    arguments = (
        words.contiguous().numpy(),
        plan,
        mid_tables(mid, layout),
        FINE,
        _packed(basis, "inverse", by),
        _flat(basis.mean),
        none if shift is None else _flat(shift),
        *(masks.contiguous().numpy() for masks in (classes.base, classes.mid, classes.escape)),
        rows,
        firsts,
        *((none, none) if rotation is None else map(_flat, rotation)),
        pages,
    )
    target = _flat(out)

    def work(first: int, last: int) -> None:
        tokens = np.empty(TOKENS * dim * bool(pages.tables.size), target.dtype)
        _expand(
            *arguments, np.zeros(2 * MAX_WIDTH * dim, np.int32),
            aligned(TOKENS * padded(dim, by), rows_dtype(by)),
            aligned(TOKENS * dim, np.float32), np.zeros(dim, np.float32), tile_config(),
            tokens, page_scratch(dim), target, dim, first, last,
        )  # fmt: skip

    for_ranges(work, layout.num_heads * words.shape[0], _GRAIN)


def expand_to_pages_numba(
    words: torch.Tensor,
    basis: ComponentBasis,
    classes: TokenClasses,
    mid: MidRows | None,
    shift: torch.Tensor | None,
    escapes: EscapeRows | None,
    pages: PageRun,
    *,
    is_keys: bool,
) -> None:
    """Write one side of ``expand_to_pages``, block by block, while a block is in the cache."""
    cos, sin = (_NO_FLOATS, _NO_FLOATS) if pages.rotation is None else map(_flat, pages.rotation)
    tables, first = pages.tables.contiguous(), pages.first // PAGE_TOKENS
    numbers = tables.view(-1).numpy()
    own = _Pages(numbers, tables.shape[1], first, is_keys, cos, sin)
    _expand_blocks(words, basis, classes, mid, shift, escapes, None, pages.memory, own)


def _flat(table: torch.Tensor) -> "np.ndarray[Any, Any]":
    return as_numpy(table.contiguous()).reshape(-1)


@kernel(**VECTORS)
def _expand(
    words, plan, refined, fine, packed, mean, shifts, base, mid, escape, rows, firsts, cos, sin,
    pages, halves, y, x, zeros, config, tokens, scratch, out, dim, first, last,
):  # fmt: skip
    """Expand the (block, head) pairs ``first`` to ``last``: blocks outside, for cos and sin.

    Components that no token of a block has are zero, and not multiplied.
    """
    begin_products(packed, config)
    num_heads, num_blocks = base.shape
    target = tokens if tokens.size > 0 else out
    for item in range(first, last):
        h, n = item % num_heads, item // num_heads
        depth = plan.sizes[h * MAX_WIDTH]
        if refined.masks.size > 0 and refined.masks[h, n] != 0:
            depth = max(depth, plan.counts[h])
        kept, whole = padded_depth(packed, max(depth, 1)), padded_depth(packed, dim)
        decode_block(words[n], plan, refined, fine, halves, y, 0, dim, kept, h, n)
        counted = counted_depth(packed, depth)
        multiply_rows(y, 0, kept, packed, h * dim * whole, whole, counted, x, 0, dim)
        row = firsts[n * num_heads + h] if firsts.size > 0 else 0
        place = h * num_blocks + n
        _finish(
            x, mean, shifts, base[h, n], mid[h, n], escape[h, n], rows, row, cos, sin, zeros,
            target, 0 if tokens.size > 0 else place * TOKENS * dim, dim, h, place, n,
        )  # fmt: skip
        if tokens.size > 0:
            _put(tokens, pages, h * pages.width + pages.first, n, scratch, out, dim)
    end_products(packed, config)


@inlined
def _put(tokens, pages, column, n, scratch, memory, dim):
    """Write the tokens of block ``n`` to its pages, of a head whose first is at ``column``."""
    run = PAGE_TOKENS * dim
    for i in range(TOKENS // PAGE_TOKENS):
        page = n * (TOKENS // PAGE_TOKENS) + i
        start = np.int64(pages.tables[column + page]) * 2 * run
        if pages.is_keys:
            put_keys(
                tokens, i * run, dim, pages.cos, pages.sin, page * run, scratch, memory, start, dim
            )
        else:
            put_values(tokens, i * run, dim, memory, start, dim)


@inlined
def _turn(x, at, cos, sin, angle, out, to, added, plus, dim):
    """Write a token plus ``added`` from ``plus`` on, rotated; the last vectors may overlap."""
    half = dim // 2
    c = 0
    while c < half:
        c = min(c, half - LANES)
        low = add(load(x, at + c), load(added, plus + c))
        high = add(load(x, at + half + c), load(added, plus + half + c))
        turn_cos, turn_sin = load(cos, angle + c), load(sin, angle + c)
        store(out, to + c, subtract(multiply(low, turn_cos), multiply(high, turn_sin)))
        store(out, to + half + c, multiply_add(high, turn_cos, multiply(low, turn_sin)))
        c += LANES


@inlined
def _copy(x, at, out, to, added, plus, dim):
    for c in range(0, dim, LANES):
        store(out, to + c, add(load(x, at + c), load(added, plus + c)))


@inlined
def _finish(
    x, mean, shifts, base, mid, escape, rows, row, cos, sin, zeros, out, start, dim, h, place, n
):  # fmt: skip
    """Finish the 64 tokens of head ``h`` and block ``n``, whose shift is at ``place``."""
    for t in range(TOKENS):
        to, angle = start + t * dim, (n * TOKENS + t) * dim
        if shifts.size > 0 and (base >> t) & 1:
            if cos.size > 0:
                _turn(x, t * dim, cos, sin, angle, out, to, shifts, place * dim, dim)
            else:
                _copy(x, t * dim, out, to, shifts, place * dim, dim)
        elif ((base | mid) >> t) & 1:
            if cos.size > 0:
                _turn(x, t * dim, cos, sin, angle, out, to, mean, h * dim, dim)
            else:
                _copy(x, t * dim, out, to, mean, h * dim, dim)
        else:
            stored = rows.size > 0 and (escape >> t) & 1
            source, source_at = (rows, row * dim) if stored else (mean, h * dim)
            row += stored
            if cos.size > 0:
                _turn(source, source_at, cos, sin, angle, out, to, zeros, 0, dim)
            else:
                _copy(source, source_at, out, to, zeros, 0, dim)
