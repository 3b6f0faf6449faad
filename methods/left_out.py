"""Segments of calibrated blocks without the plane bits of tokens that are left out, and back.

A block of which a head keeps k of 64 tokens needs k bits of each word of that head's planes. The
bits go one after the other, words in order, tokens ascending, K and V apart; the last byte of each
is filled with zeros. The masks at the head of the segment tell who is left out.

Legend: H KV heads, W words of 64 bits.
"""

from collections.abc import Sequence

import numpy as np

from kvstrata.protos.frame import Buffer

WORD_BYTES = 8
TOKENS = 64


def compact_segment(segment: bytes, words_per_head: Sequence[np.ndarray]) -> bytes:
    """Return a segment of dense planes with those of kept tokens alone.

    Args:
        segment: Masks, planes of K, planes of V, and the rest.
        words_per_head: Of K and of V, int (H,).
    """
    kept, at = _kept(segment, words_per_head)
    if kept is None:
        return segment
    parts = [segment[:at]]
    for flags in kept:
        end = at + WORD_BYTES * len(flags)
        bits = np.unpackbits(np.frombuffer(segment[at:end], np.uint8), bitorder="little")
        parts.append(np.packbits(bits.reshape(-1, TOKENS)[flags], bitorder="little").tobytes())
        at = end
    return b"".join([*parts, segment[at:]])


def spread_segment(segment: Buffer, words_per_head: Sequence[np.ndarray]) -> Buffer:
    """Return the segment that ``compact_segment`` was given, but for bits of left-out tokens: 0.

    One that is too short for its masks comes back as it is: whoever reads it sees that by its size.
    """
    kept, at = _kept(segment, words_per_head)
    if kept is None:
        return segment
    parts = [bytes(segment[:at])]
    for flags in kept:
        count = int(flags.sum())
        end = at + (count + 7) // 8
        if len(segment) < end:
            return segment
        packed = np.frombuffer(segment[at:end], np.uint8)
        bits = np.zeros(flags.shape, np.uint8)
        bits[flags] = np.unpackbits(packed, count=count, bitorder="little")
        parts.append(np.packbits(bits.reshape(-1), bitorder="little").tobytes())
        at = end
    return b"".join([*parts, bytes(segment[at:])])


def saved_bytes(segment: Buffer, words_per_head: Sequence[np.ndarray]) -> int:
    """Return by how many bytes the planes of a compact segment are shorter than dense ones."""
    kept, _ = _kept(segment, words_per_head)
    if kept is None:
        return 0
    return sum(WORD_BYTES * len(flags) - (int(flags.sum()) + 7) // 8 for flags in kept)


def _kept(
    segment: Buffer, words_per_head: Sequence[np.ndarray]
) -> tuple[list[np.ndarray] | None, int]:
    """Return what each word's head keeps, bool (W, 64), of K and of V, and where planes begin.

    None where nothing is left out.
    """
    size = 4 * WORD_BYTES * len(words_per_head[0])
    if len(segment) < size:
        return None, 0
    escape, mid = segment[: size // 2], segment[size // 2 : size]
    if not int.from_bytes(escape, "little") & int.from_bytes(mid, "little"):
        return None, size  # by far the most, so this comes first and without arrays
    masks = np.frombuffer(segment[:size], "<u8").reshape(2, 2, -1)  # escape, mid; side; head
    left_out = masks[0] & masks[1]
    bits = np.unpackbits(left_out.view(np.uint8), axis=-1, bitorder="little")
    kept = bits.reshape(2, -1, TOKENS) == 0
    return [np.repeat(k, w, axis=0) for k, w in zip(kept, words_per_head, strict=True)], size
