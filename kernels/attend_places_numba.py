"""Where the parts of an item lie, one KV head of one block, for ``attend_items_numba``.

Blocks lie anywhere in memory, so no processor guesses where the next one's parts are:
``fetch_side`` asks for them while the item before is worked on.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from kvstrata.kernels.block_pages import (
    ABSENT,
    BIAS_CODES,
    BIAS_STEPS,
    CODES,
    MASKS,
    MID,
    NUM_FIELDS,
    SCALES,
    WORDS,
)
from kvstrata.kernels.compiled import inlined
from kvstrata.kernels.sign_codes import MAX_WIDTH
from kvstrata.kernels.vectors_numba import LANES
from kvstrata.kernels.word_vectors_numba import prefetch

_LINE_WORDS = 8  # of a cache line
_AHEAD = 128  # bytes of mid tokens and of escapes that are fetched ahead: what most items have


@inlined
def num_words(plan, h):
    """Return how many words a head has."""
    total = 0
    for plane in range(MAX_WIDTH):
        total += plan.sizes[h * MAX_WIDTH + plane]
    return total


@inlined
def escapes_before(pages, counts, h):
    """Return how many escapes of a side lie before a head's."""
    total = 0
    for g in range(h):
        total += pages.counts[counts + g]
    return total


@inlined
def mid_bytes_before(pages, plan, counts, h):
    """Return how many bytes of a side's mid tokens lie before a head's."""
    total = 0
    for g in range(h):
        total += pages.counts[counts + g] * (plan.counts[g] // 4)
    return total


@inlined
def fits(words, first, count):
    """Tell whether ``count`` words and what vectors read behind them lie in an array."""
    return first + (count + LANES - 1) // LANES * LANES <= words.size


@inlined
def fetch_side(pages, plan, page, side, h, heads, dim):
    """Ask for one side of an item of a page: its words, masks, and the first of its rows.

    Args:
        pages: All pages.
        plan: Of the side's layout.
        page: Which one.
        side: The side's first field.
        h: Head.
        heads: KV heads.
        dim: Components.
    """
    start, fields = pages.starts[page], page * NUM_FIELDS + side
    counts = page * 4 * heads + (2 * heads if side > 0 else 0)
    first = (start + pages.offsets[fields + WORDS]) // 8 + plan.offsets[h * MAX_WIDTH]
    for i in range(0, num_words(plan, h) + _LINE_WORDS, _LINE_WORDS):
        prefetch(pages.words, first + i)
    prefetch(pages.words, (start + pages.offsets[fields + MASKS]) // 8 + h)
    if side > 0:
        fields -= side
        prefetch(pages.bytes, start + pages.offsets[fields + BIAS_STEPS] + h)
        prefetch(pages.bytes, start + pages.offsets[fields + BIAS_CODES] + h * (dim // 2))
        fields += side
    if pages.offsets[fields + MID] != ABSENT:
        at = start + pages.offsets[fields + MID]
        at += mid_bytes_before(pages, plan, counts + heads, h)
        for i in range(0, _AHEAD, 8 * _LINE_WORDS):
            prefetch(pages.bytes, at + i)
    place = escapes_before(pages, counts, h)
    if pages.counts[counts + h] > 0:
        prefetch(pages.halves, (start + pages.offsets[fields + SCALES]) // 2 + place)
        at = start + pages.offsets[fields + CODES] + place * dim
        for i in range(0, _AHEAD, 8 * _LINE_WORDS):
            prefetch(pages.codes, at + i)
