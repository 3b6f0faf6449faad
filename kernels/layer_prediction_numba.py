"""Prediction from layer to layer on a CPU, one block at a time, in float32 by FMA.

A block's layer of 64 tokens stays in L2 while it is multiplied. Decoding takes a few blocks through
all layers before the next few, without a word of Python between: a layer's weights then come from
memory once for all of them. Blocks do not see each other and every sum has one order, so numbers do
not depend on threads or on how many blocks are handled at once.

Roofline per element of K and V: C multiply-adds for the layer before and C / 2 for its own, 576 for
C = 384, which at 16 lanes and one FMA per cycle takes 36 cycles, 12 ns at 3 GHz; reading what is
left (8 bytes) and writing (2 to 4) is less than a tenth of that.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import numpy as np
import torch

from kvstrata.kernels.compiled import VECTORS, inlined, kernel
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.layer_prediction import LayerWeights, Rest
from kvstrata.kernels.products_numba import aligned, multiply_rows, pack
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.token_masks import TOKENS
from kvstrata.kernels.vectors_numba import LANES, add, load, splat, store

_TOGETHER = 8  # blocks; of SmolLM2 they take 1.6 MB


def _packed(weights: LayerWeights, name: str) -> "np.ndarray[Any, Any]":
    """Return a table in the order in which products read it."""
    packed: np.ndarray[Any, Any] = weights.once(
        name, lambda: pack(getattr(weights, name).float(), "floats")
    )
    return packed


class NumbaRecursion:
    """What ``ReferenceRecursion`` is, to the last bits of float32."""

    def __init__(self, weights: LayerWeights, num_blocks: int) -> None:
        """Start before the first layer."""
        self._weights, self._layer, self._num_blocks = weights, -1, num_blocks
        size = (num_blocks, TOKENS, weights.channels)
        self._current, self._ahead = torch.zeros(size), torch.zeros(size)
        self._tables = [_packed(weights, name) for name in ("across", "within")]

    def enter_next_layer(self) -> None:
        """See ``Recursion.enter_next_layer``."""
        self._layer += 1
        if not self._layer:
            return
        width = self._weights.channels
        current, ahead = (t.numpy().reshape(-1) for t in (self._current, self._ahead))
        for_ranges(
            lambda a, b: _predict_across(
                current, self._tables[0], self._layer * width * width, ahead, width, a, b
            ),
            self._num_blocks,
        )

    def predict(self, part: int) -> torch.Tensor:
        """See ``Recursion.predict``."""
        dim, width = self._weights.dim, self._weights.channels
        out = torch.empty(self._num_blocks, TOKENS, dim)
        current, ahead, flat = (t.numpy().reshape(-1) for t in (self._current, self._ahead, out))
        for_ranges(
            lambda a, b: _predict_head(
                current, ahead, self._tables[1], self._layer, part, flat, width, dim, a, b
            ),
            self._num_blocks,
        )
        return out

    def put(self, part: int, vectors: torch.Tensor) -> None:
        """See ``Recursion.put``."""
        begin = part * self._weights.dim
        self._current[..., begin : begin + self._weights.dim] = vectors


@kernel(**VECTORS)
def _predict_across(current, across, start, ahead, width, first, last):
    """Predict the blocks ``first`` to ``last`` from the layer before."""
    for n in range(first, last):
        at = n * TOKENS * width
        multiply_rows(current, at, width, across, start, width, width, ahead, at, width)


@kernel(**VECTORS)
def _predict_head(current, ahead, within, layer, part, out, width, dim, first, last):
    """Predict head ``part`` of the blocks ``first`` to ``last``."""
    for n in range(first, last):
        at, to = n * TOKENS * width, n * TOKENS * dim
        _predict_within(current, at, within, layer, part, out, to, width, dim)
        for t in range(TOKENS):
            for c in range(0, dim, LANES):
                place = to + t * dim + c
                total = add(load(ahead, at + t * width + part * dim + c), load(out, place))
                store(out, place, total)


@inlined
def _predict_within(current, at, within, layer, part, own, to, width, dim):
    """Write what head ``part`` gets from those before it in its layer, 64 rows."""
    start = (layer * width + part * dim) * width
    multiply_rows(current, at, width, within, start, width, part * dim, own, to, dim)


def add_predictions_numba(
    keys: Rest,
    values: Rest,
    weights: LayerWeights,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """Write what ``add_predictions_reference`` does."""
    width, dim = weights.channels, weights.dim
    across, within = (_packed(weights, name) for name in ("across", "within"))
    sides = [
        (_flat(rest.base), _flat(rest.fine), rest.escape.contiguous().numpy(), _flat(out))
        for rest, out in ((keys, out_keys), (values, out_values))
    ]

    def work(first: int, last: int) -> None:
        together = min(_TOGETHER, last - first)
        sizes = (together * width, together * width, dim)
        room = [aligned(TOKENS * size, np.float32) for size in sizes]
        _add_predictions(
            *sides[0], *sides[1], across, within, *room, weights.num_layers, weights.heads, dim,
            first, last,
        )  # fmt: skip

    for_ranges(work, keys.base.shape[1])


def _flat(table: torch.Tensor) -> "np.ndarray[Any, Any]":
    return as_numpy(table.contiguous()).reshape(-1)


@kernel(**VECTORS)
def _add_predictions(
    key_base, key_fine, key_escape, key_out, value_base, value_fine, value_escape, value_out,
    across, within, current, ahead, own, num_layers, heads, dim, first, last,
):  # fmt: skip
    """Decode the blocks ``first`` to ``last``, as many together as there is room for."""
    width, num_blocks = 2 * heads * dim, key_escape.shape[1]
    size, zero = TOKENS * width, splat(np.float32(0))
    for begin in range(first, last, current.size // size):
        end = min(last, begin + current.size // size)
        for c in range(0, (end - begin) * size, LANES):
            store(ahead, c, zero)
        for layer in range(num_layers):
            if layer > 0:
                start = layer * width * width
                for at in range(0, (end - begin) * size, size):
                    multiply_rows(current, at, width, across, start, width, width, ahead, at, width)
            for n in range(begin, end):
                here = (n - begin) * size
                for part in range(2 * heads):
                    _predict_within(current, here, within, layer, part, own, 0, width, dim)
                    head = layer * heads + part % heads
                    at = (head * num_blocks + n) * TOKENS * dim
                    if part < heads:
                        _finish(
                            value_base, value_fine, value_escape[head, n], at, ahead, here, own,
                            part, value_out, current, width, dim,
                        )  # fmt: skip
                    else:
                        _finish(
                            key_base, key_fine, key_escape[head, n], at, ahead, here, own, part,
                            key_out, current, width, dim,
                        )  # fmt: skip


@inlined
def _finish(base, fine, escape, at, ahead, here, own, part, out, current, width, dim):
    """Write 64 tokens of head ``part`` to ``out`` as they are read, to ``current`` at BASE."""
    for t in range(TOKENS):
        row, to = at + t * dim, here + t * width + part * dim
        for c in range(0, dim, LANES):
            predicted = splat(np.float32(0))
            if not (escape >> t) & 1:
                predicted = add(load(ahead, to + c), load(own, t * dim + c))
            store(out, row + c, add(load(fine, row + c), predicted))
            store(current, to + c, add(load(base, row + c), predicted))
