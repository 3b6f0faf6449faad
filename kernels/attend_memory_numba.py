"""What ``attend_items_numba`` works on: pages, tables, and a thread's memory, as flat arrays.

Legend: G query heads per KV head, D head_dim, R components.
"""

from typing import Any, NamedTuple

import numpy as np


class Pages(NamedTuple):
    """``BlockPages`` as the kernels read them, flat; the arena in four types."""

    bytes: "np.ndarray[Any, Any]"
    codes: "np.ndarray[Any, Any]"
    halves: "np.ndarray[Any, Any]"
    words: "np.ndarray[Any, Any]"
    starts: "np.ndarray[Any, Any]"
    num_tokens: "np.ndarray[Any, Any]"
    offsets: "np.ndarray[Any, Any]"
    counts: "np.ndarray[Any, Any]"


class Side(NamedTuple):
    """The tables of keys or of values, flat.

    ``matrix`` is packed for ``multiply_few``: for keys what turns queries into components, for
    values what turns components times their scale into values.
    """

    plan: Any
    mean: "np.ndarray[Any, Any]"
    scale: "np.ndarray[Any, Any]"
    matrix: "np.ndarray[Any, Any]"


class Tables(NamedTuple):
    """Constants: signs of four bits, (4, 16); what refinements add; steps of biases."""

    signs: "np.ndarray[Any, Any]"
    deltas: "np.ndarray[Any, Any]"
    steps: "np.ndarray[Any, Any]"


class Room(NamedTuple):
    """A thread's memory, float32 unless said otherwise."""

    rows: "np.ndarray[Any, Any]"  # (G, D), queries turned back
    queries: "np.ndarray[Any, Any]"  # (G, R), in components
    factors: "np.ndarray[Any, Any]"  # (G, words), of one side
    tables: "np.ndarray[Any, Any]"  # (nibbles, G, 16)
    scores: "np.ndarray[Any, Any]"  # (G, 64), then weights
    row: "np.ndarray[Any, Any]"  # (D,)
    sums: "np.ndarray[Any, Any]"  # (G, words): of a run, one per word of values
    components: "np.ndarray[Any, Any]"  # (G, D), of a run
    biases: "np.ndarray[Any, Any]"  # (G, D), of a run
    escaped: "np.ndarray[Any, Any]"  # (G, D), of a run
    refined: "np.ndarray[Any, Any]"  # (64, D)
    state: "np.ndarray[Any, Any]"  # (4, G), of a run: largest score, sum, mass of planes, poison
    words: "np.ndarray[Any, Any]"  # int64
    halves: "np.ndarray[Any, Any]"  # int32 (2, words)
    bits: "np.ndarray[Any, Any]"  # uint8 (words / 8, 64)
    tokens: "np.ndarray[Any, Any]"  # int64 (64,)
