"""Decode attention over compressed blocks on CPU: tables, memory and threads of its kernels.

The kernels, and how they work, are in ``attend_items_numba``. Everything that depends on pages or
tables alone is made once: a call is some 20 microseconds of Python.
"""

import threading
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from kvstrata.kernels.attend_blocks import Attention, bias_steps
from kvstrata.kernels.attend_items_numba import attend_items, merge_parts
from kvstrata.kernels.attend_memory_numba import Pages, Room, Side, Tables
from kvstrata.kernels.attend_tables_numba import SIGNS
from kvstrata.kernels.block_pages import BLOCK_TOKENS, BlockPages, PageTable, SideTables, Turns
from kvstrata.kernels.plane_plans_numba import FINE, plan_of
from kvstrata.kernels.products_numba import pack
from kvstrata.kernels.sign_codes import COEFFICIENTS
from kvstrata.kernels.threads import for_ranges

_GRAIN = 16  # heads of blocks that are worth a thread
_LANES = 16

Array = np.ndarray[Any, Any]


def _deltas() -> Array:
    """Return what each fine code adds to its base value, one width after the other."""
    base = [np.zeros(1)]
    for coefficients in COEFFICIENTS[1:]:
        levels = np.zeros(1)
        for coefficient in coefficients:
            levels = (levels[:, None] + np.array([-coefficient, coefficient])).ravel()
        base.append(levels)
    return (FINE - np.concatenate(base).repeat(4)).astype(np.float32)


_TABLES = Tables(SIGNS, _deltas(), bias_steps().contiguous().numpy())


class _Sides:
    """The tables of keys and of values, and how much memory a thread needs for a group."""

    def __init__(self, keys: SideTables, values: SideTables) -> None:
        self.heads, self.dim = keys.mean.shape
        self.columns = keys.projection.shape[-1]
        self.keys = _side(keys, keys.projection)
        self.values = _side(values, values.inverse)
        words = [int(tables.layout.words_per_head.max()) for tables in (keys, values)]
        self.key_words, self.value_words = (-(-count // 8) * 8 + 2 * _LANES for count in words)

    def room(self, group: int) -> Room:
        """Return memory of a thread."""
        words = max(self.key_words, self.value_words)
        nibbles = max(self.key_words, BLOCK_TOKENS) // 4

        def floats(*shape: int) -> Array:
            return np.zeros(int(np.prod(shape)), np.float32)

        return Room(
            rows=floats(group, self.dim),
            queries=floats(group, self.columns),
            factors=floats(group, self.key_words),
            tables=floats(nibbles, group, _LANES),
            scores=floats(group, BLOCK_TOKENS),
            row=floats(self.dim + _LANES),
            sums=floats(group, -(-self.value_words // _LANES) * _LANES),
            components=floats(group, self.dim),
            biases=floats(group, self.dim),
            escaped=floats(group, self.dim),
            refined=floats(BLOCK_TOKENS, self.dim),
            state=floats(4, group),
            words=np.zeros(words, np.int64),
            halves=np.zeros(2 * (words + self.dim), np.int32),
            bits=np.zeros(words // 8 * BLOCK_TOKENS, np.uint8),
            tokens=np.zeros(BLOCK_TOKENS, np.int64),
        )


def _side(tables: SideTables, matrix: torch.Tensor) -> Side:
    mean, scale = (table.contiguous().numpy().ravel() for table in (tables.mean, tables.scale))
    return Side(plan_of(tables.layout), mean, scale, pack(matrix, "floats"))


class _Held:
    """Pages as the kernels read them; they see what ``BlockPages.put`` changes."""

    def __init__(self, pages: BlockPages) -> None:
        arena = pages.arena.numpy()
        self.pages = Pages(
            arena,
            arena.view(np.int8),
            arena[: arena.size // 2 * 2].view(np.uint16),
            arena[: arena.size // 8 * 8].view(np.int64),
            pages.blocks.starts.numpy(),
            pages.blocks.num_tokens.numpy(),
            *(t.numpy().reshape(-1) for t in (pages.offsets, pages.counts)),
        )
        self.sides = _sides_of(pages.keys, pages.values)
        self._num_rows = len(pages.offsets)

    @cached_property
    def whole(self) -> PageTable:
        """A table of one sequence that reads every row."""
        return PageTable.of([range(self._num_rows)])


class _Step:
    """A table as the kernels read it."""

    def __init__(self, table: PageTable) -> None:
        self.arrays = tuple(t.numpy() for t in (table.pages, table.places, table.ends))


_held: "WeakKeyDictionary[BlockPages, _Held]" = WeakKeyDictionary()
_steps: "WeakKeyDictionary[PageTable, _Step]" = WeakKeyDictionary()
_memory = threading.local()


@lru_cache(256)
def _sides_of(keys: SideTables, values: SideTables) -> _Sides:
    return _Sides(keys, values)


def _held_of(pages: BlockPages) -> _Held:
    found = _held.get(pages)
    if found is None:
        found = _held[pages] = _Held(pages)
    return found


def _step_of(table: PageTable) -> _Step:
    found = _steps.get(table)
    if found is None:
        found = _steps[table] = _Step(table)
    return found


def _rooms(sides: _Sides, group: int, count: int) -> list[Room]:
    """Return memory for ``count`` threads, which this thread's next call uses again."""
    kept = _memory.__dict__.setdefault("rooms", WeakKeyDictionary())
    rooms: list[Room] = kept.setdefault(sides, {}).setdefault(group, [])
    rooms.extend(sides.room(group) for _ in range(count - len(rooms)))
    return rooms


def _flat(table: torch.Tensor) -> Array:
    flat: Array = table.float().contiguous().numpy().ravel()
    return flat


def attend_blocks_numba(
    queries: torch.Tensor, pages: BlockPages, turns: Turns, scaling: float
) -> Attention:
    """Return what ``attend_blocks_reference`` returns, up to rounding."""
    out, lse = _attend(queries, 1, pages, _held_of(pages).whole, turns, scaling)
    return torch.from_numpy(out.reshape(queries.shape)), torch.from_numpy(lse)


def attend_batch_numba(
    queries: torch.Tensor, pages: BlockPages, table: PageTable, turns: Turns, scaling: float
) -> Attention:
    """Return what ``attend_batch_reference`` returns, up to rounding."""
    shape = queries.shape
    out, lse = _attend(queries, shape[0], pages, table, turns, scaling)
    return torch.from_numpy(out.reshape(shape)), torch.from_numpy(lse.reshape(shape[:2]))


def _attend(
    queries: torch.Tensor,
    batch: int,
    pages: BlockPages,
    table: PageTable,
    turns: Turns,
    scaling: float,
) -> tuple[Array, Array]:
    """Return outputs and logarithms of sums, flat. Queries are float (B, H * G, D), or flatter."""
    held, (rows, places, ends) = _held_of(pages), _step_of(table).arrays
    sides, flat = held.sides, _flat(queries)
    heads, dim = sides.heads, sides.dim
    rows_of_queries = flat.size // dim
    out, lse = np.zeros(flat.size, np.float32), np.full(rows_of_queries, -np.inf, np.float32)
    items = heads * len(rows)
    if not items or not flat.size:
        return out, lse
    group = rows_of_queries // (batch * heads)
    cos, sin, half_turn = _flat(turns.cos), _flat(turns.sin), turns.cos.shape[1] // 2
    parts = max(1, min(torch.get_num_threads(), items // _GRAIN))
    rooms = _rooms(sides, group, parts)
    part_out = np.empty((parts, group * dim), np.float32)
    part_lse = np.empty((parts, group), np.float32)
    late_runs = np.empty(parts, np.int64)

    def work(first: int, stop: int) -> None:
        for part in range(first, stop):
            late_runs[part] = attend_items(
                flat, np.float32(scaling), held.pages, rows, places, ends, cos, sin, sides.keys,
                sides.values, _TABLES, rooms[part], heads, dim, half_turn, items * part // parts,
                items * (part + 1) // parts, out, lse, part_out[part], part_lse[part],
            )  # fmt: skip

    for_ranges(work, parts)
    merge_parts(out, lse, late_runs, group, dim, part_out.ravel(), part_lse.ravel())
    return out, lse
