# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Rows of K and V into a whole page on a CPU; ``row_pages`` has how they lie in it.

Keys are turned in rows of float32 and transposed there. Bits stay what they are where nothing is
turned.
"""

import numpy as np

from kvstrata.kernels.compiled import called
from kvstrata.kernels.row_pages import PAGE_TOKENS
from kvstrata.kernels.vectors_numba import (
    add,
    load,
    multiply,
    store,
    subtract,
    transpose_tile,
)

PAGE_SCRATCH = 2 * PAGE_TOKENS  # rows of D float32 that ``put_keys`` works in


@called
def turn_key(keys, source, cos, sin, angle, rows, to, dim):
    """Write a key as float32, turned: low and high halves as in ``rope_numba``."""
    half = dim // 2
    for c in range(0, half, 16):
        low, high = load(keys, source + c), load(keys, source + half + c)
        turned = multiply(high, load(sin, angle + c))
        store(rows, to + c, subtract(multiply(low, load(cos, angle + c)), turned))
        turned = multiply(low, load(sin, angle + half + c))
        store(rows, to + half + c, add(multiply(high, load(cos, angle + half + c)), turned))


@called
def put_keys(keys, source, step, cos, sin, angle, scratch, memory, start, dim):
    """Write 16 keys, ``step`` apart, to the page at ``start``; turned where there is ``cos``."""
    tile = PAGE_TOKENS * dim
    for slot in range(PAGE_TOKENS):
        if cos.size > 0:
            turn_key(
                keys, source + slot * step, cos, sin, angle + slot * dim, scratch, slot * dim, dim
            )
        else:
            for c in range(0, dim, 16):
                store(scratch, slot * dim + c, load(keys, source + slot * step + c))
    for c in range(0, dim, 16):
        transpose_tile(scratch, c, dim, scratch, tile + c * PAGE_TOKENS, PAGE_TOKENS)
    for c in range(0, tile, 16):
        store(memory, start + c, load(scratch, tile + c))


@called
def put_values(values, source, step, memory, start, dim):
    """Write 16 values, ``step`` apart, to the page at ``start``."""
    to = start + PAGE_TOKENS * dim
    for slot in range(PAGE_TOKENS):
        for c in range(0, dim, 16):
            store(memory, to + slot * dim + c, load(values, source + slot * step + c))


def page_scratch(dim):
    """Return what ``put_keys`` works in."""
    return np.empty(PAGE_SCRATCH * dim, np.float32)
