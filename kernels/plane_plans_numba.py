"""Layouts and mid rows as the Numba kernels read them: flat arrays, made once per layout."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from kvstrata.kernels.block_planes import MidRows, PlaneLayout
from kvstrata.kernels.sign_codes import COEFFICIENTS, FINE_LEVELS, GRID_SIZE, MAX_WIDTH

Array = np.ndarray[Any, Any]


def _coefficients() -> Array:
    """Return what each plane of a width adds or takes off, float32 (7, 6)."""
    table = np.zeros((MAX_WIDTH + 1, MAX_WIDTH), np.float32)
    for width in range(1, MAX_WIDTH + 1):
        table[width, :width] = COEFFICIENTS[width]
    return table


STEPS = _coefficients()
FINE = np.array([level for levels in FINE_LEVELS for level in levels], np.float32)
_FINE_STARTS = np.cumsum([0] + [len(levels) for levels in FINE_LEVELS])[:-1].astype(np.int32)


class Plan(NamedTuple):
    """A layout as the kernels read it: flat arrays over (H, 6, D) or (H, D)."""

    widths: Array
    sizes: Array
    offsets: Array
    counts: Array
    steps: Array  # minus the coefficient, or 0
    places: Array  # a plane's bit's place in the fine code, or 0
    grids: Array  # where a component's grid of codes starts
    starts: Array  # where a component's fine levels start


@lru_cache(maxsize=1024)
def _plan(layout_id: "_Identity") -> Plan:
    layout = layout_id.layout
    widths = layout.widths.numpy()
    places = np.zeros((MAX_WIDTH + 1, MAX_WIDTH), np.int32)
    for width in range(1, MAX_WIDTH + 1):
        places[width, :width] = 4 << np.arange(width)[::-1]
    return Plan(
        np.ascontiguousarray(widths).ravel(),
        layout.plane_sizes.numpy().ravel(),
        layout.word_offsets.numpy().ravel(),
        layout.mid_counts.numpy().astype(np.int64),
        np.ascontiguousarray((-STEPS[widths]).transpose(0, 2, 1)).ravel(),
        np.ascontiguousarray(places[widths].transpose(0, 2, 1)).ravel(),
        (widths.astype(np.int32) * GRID_SIZE).ravel(),
        _FINE_STARTS[widths].ravel(),
    )


class _Identity:
    """A layout, equal to itself alone: tensors do not hash by value."""

    def __init__(self, layout: PlaneLayout) -> None:
        self.layout = layout

    def __hash__(self) -> int:
        return id(self.layout)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.layout is other.layout


def plan_of(layout: PlaneLayout) -> Plan:
    """Return the arrays of a layout, made once."""
    return _plan(_Identity(layout))


class MidTables(NamedTuple):
    """Mid rows as the kernels read them; of size 0 if there are none."""

    masks: Array
    rows: Array
    starts: Array


def mid_tables(mid: MidRows | None, layout: PlaneLayout) -> MidTables:
    """Return the arrays of mid rows."""
    if mid is None:
        return MidTables(np.zeros((0, 0), np.int64), np.zeros(0, np.uint8), np.zeros(0, np.int64))
    starts = layout.mid_starts(mid.masks).numpy()
    return MidTables(mid.masks.contiguous().numpy(), mid.rows.contiguous().numpy(), starts)
