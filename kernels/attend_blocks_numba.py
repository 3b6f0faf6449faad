"""Decode attention over compressed blocks on CPU: tables, memory and threads of its kernels.

The kernels, and how they work, are in ``attend_items_numba``.
"""

import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features

from kvstrata.kernels.attend_blocks import (
    Attention,
    bias_steps,
)
from kvstrata.kernels.attend_items_numba import HEAD, PLAN, attend, finish, turn_queries
from kvstrata.kernels.block_pages import (
    BLOCK_TOKENS,
    BlockPages,
    SideTables,
    Turns,
)
from kvstrata.kernels.lane_code_numba import CHUNK, FAR, GROUP, NEAR, WIDE
from kvstrata.kernels.sign_codes import COEFFICIENTS, FINE_LEVELS
from kvstrata.kernels.threads import for_ranges

_GRAIN = 32  # heads of blocks that are worth a thread
_LANES = 16
# Products in bf16 are worth their conversions from this many multiplications on.
_LEAST_PRODUCTS = 1 << 22
_HAS_BRAIN_PRODUCTS = get_host_cpu_features().get("amx-bf16", False)
_ZERO_CELL = 28  # after the cells of widths 0 to 2, so that these fit 32

Array = np.ndarray[Any, Any]


def _refinements() -> tuple[Array, list[int]]:
    """Return what each fine code adds to its base value, and where each width starts."""
    steps, starts = [], []
    for width, (coefficients, levels) in enumerate(zip(COEFFICIENTS, FINE_LEVELS, strict=True)):
        base = np.zeros(1)
        for coefficient in coefficients:
            base = (base[:, None] + np.array([-coefficient, coefficient])).ravel()
        if width == 3:
            steps.append(np.zeros(4))
        starts.append(sum(map(len, steps)))
        steps.append(np.array(levels) - base.repeat(4))
    return np.concatenate(steps).astype(np.float32), starts


_REFINEMENTS, _CELL_STARTS = _refinements()
_STEPS = bias_steps().contiguous().numpy()


class _Side:
    """The tables of one side in the form that the kernels read, made once.

    A group is 16 words of a plane that lie together; four groups are turned at once.
    """

    def __init__(self, tables: SideTables) -> None:
        widths, mids = tables.layout.widths.numpy().astype(int), tables.layout.mid_counts.tolist()
        sizes, firsts = tables.layout.plane_sizes.numpy(), tables.word_starts.numpy()
        groups_in = -(-sizes // _LANES)
        self.turns = max(1, int(-(-groups_in.sum(1).max() // 4)))
        self.most_words = int(np.diff(firsts).max())
        self.heads = np.zeros(len(mids), HEAD)
        self.groups = np.zeros((len(mids), 4 * self.turns), GROUP)
        self.chunks = np.zeros((len(mids), max(1, -(-max(mids) // _LANES))), CHUNK)
        for head, mid in enumerate(mids):
            row = self.heads[head]
            row["word"], row["words"] = 8 * firsts[head], firsts[head + 1] - firsts[head]
            row["groups"], row["turns"] = groups_in[head].sum(), -(-groups_in[head].sum() // 4)
            row["mid"], row["chunks"] = mid, -(-mid // _LANES)
            self._fill_groups(head, widths[head], sizes[head])
            for i in range(row["chunks"]):
                self._fill_chunk(head, i, mid, widths[head], groups_in[head])
        # Addresses stay valid: this object holds the arrays, and the tables theirs.
        self.mean, self.scale, self.inverse = (
            getattr(tables, name).contiguous() for name in ("mean", "scale", "inverse")
        )
        self.projection = tables.projection
        self.brain_projection = self.projection.bfloat16()

    def _fill_groups(self, head: int, widths: Array, sizes: Array) -> None:
        group, word = 0, 0
        for plane, size in enumerate(sizes.tolist()):
            for c in range(0, size, _LANES):
                row = self.groups[head, group]
                row["source"], row["factor"], row["word"] = 4 * c, 4 * (word + c), 8 * (word + c)
                for lane, width in enumerate(widths[c : min(c + _LANES, size)].tolist()):
                    row["twice"][lane] = 2 * COEFFICIENTS[width][plane]
                group += 1
            word += size

    def _fill_chunk(self, head: int, i: int, mid: int, widths: Array, groups_in: Array) -> None:
        row = self.chunks[head, i]
        inside = widths[_LANES * i : min(_LANES * (i + 1), mid)]
        is_half = len(inside) < _LANES  # its low bits are read from one byte before
        row["high"], row["low"] = 2 * i, mid // 8 + 2 * i - is_half
        row["shift"], row["planes"] = 8 * is_half, inside[0]
        row["kind"] = NEAR if inside[0] < 3 else WIDE if inside[0] == 3 else FAR
        row["starts"], row["ones"][: len(inside)] = _ZERO_CELL, 1
        row["starts"][: len(inside)] = np.array(_CELL_STARTS)[inside]
        for plane in range(inside[0]):
            group = int(groups_in[:plane].sum()) + i
            row["bits"][plane] = 512 * (group // 4) + 2 * (group % 4)
            weights = 4 << np.maximum(inside - 1 - plane, 0)
            row["weights"][plane, : len(inside)] = np.where(inside > plane, weights, 0)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Return what a plan says of a side."""
        heads, groups, chunks = self.heads, self.groups, self.chunks
        return (
            heads.ctypes.data, groups.ctypes.data, groups.strides[0], chunks.ctypes.data,
            chunks.strides[0],
        )  # fmt: skip


class _Plan:
    """What calls for the same blocks and number of query heads share."""

    def __init__(self, pages: BlockPages, num_queries: int) -> None:
        heads, dim = pages.keys.mean.shape
        self.keys, self.values = _side_of(pages.keys), _side_of(pages.values)
        self.group, self.blocks = num_queries // heads, pages.offsets.shape[0]
        self.items = heads * self.blocks
        self.held = [t.contiguous() for t in (pages.offsets, pages.num_tokens, pages.starts)]
        plan = self.row = np.zeros((), PLAN)
        plan["arena"], plan["end"] = pages.arena.data_ptr(), pages.arena.data_ptr()
        plan["end"] += pages.arena.numel()
        plan["offsets"], plan["tokens"], plan["starts"] = (t.data_ptr() for t in self.held)
        plan["blocks"], plan["heads"], plan["queries"] = self.blocks, heads, self.group
        plan["dim"], plan["columns"] = dim, 4 * self.keys.projection.shape[-1]
        plan["mean"], plan["value_mean"] = self.keys.mean.data_ptr(), self.values.mean.data_ptr()
        plan["value_scale"] = self.values.scale.data_ptr()
        plan["inverse"] = self.values.inverse.data_ptr()
        plan["refinements"], plan["steps"] = _REFINEMENTS.ctypes.data, _STEPS.ctypes.data
        plan["keys"], plan["values"] = self.keys.addresses, self.values.addresses
        words = max(self.keys.most_words, self.values.most_words) + _LANES
        turns, size = max(self.keys.turns, self.values.turns), 4 * heads * self.group * dim
        plan["factor_row"] = -(-4 * (self.keys.most_words + _LANES) // 64) * 64
        starts = np.cumsum(
            [self.group * plan["factor_row"], -(-words // 8) * 64, 512 * turns, 256 * self.group]
        )
        plan["padded"], plan["turned"], plan["scores"], plan["chosen"] = starts.tolist()
        self.room_bytes = int(starts[-1]) + 8 * BLOCK_TOKENS + 4 * dim + 64
        plan["word_turns"] = self.values.turns
        starts = 256 * heads * self.values.turns * self.group + size * np.arange(4)
        plan["components"], plan["biases"], plan["escaped"], plan["state"] = starts.tolist()
        plan["part_bytes"] = -(-(int(starts[-1]) + 12 * heads * self.group) // 64) * 64


_sides: "WeakKeyDictionary[SideTables, _Side]" = WeakKeyDictionary()
_plans: "WeakKeyDictionary[BlockPages, dict[int, _Plan]]" = WeakKeyDictionary()
_memory = threading.local()


def _side_of(tables: SideTables) -> _Side:
    found = _sides.get(tables)
    if found is None:
        found = _sides[tables] = _Side(tables)
    return found


def _plan_of(pages: BlockPages, num_queries: int) -> _Plan:
    plans = _plans.setdefault(pages, {})
    if num_queries not in plans:
        plans[num_queries] = _Plan(pages, num_queries)
    return plans[num_queries]


def _kept(name: str, num_bytes: int) -> torch.Tensor:
    """Return uint8 memory of this thread, which a later call under this name uses again.

    Fresh memory of this size is mapped page by page at every call.
    """
    found: torch.Tensor | None = getattr(_memory, name, None)
    if found is None or found.numel() < num_bytes:
        found = torch.empty(num_bytes * 5 // 4 + 64, dtype=torch.uint8)
        setattr(_memory, name, found)
    return found[:num_bytes]


def attend_blocks_numba(
    queries: torch.Tensor, pages: BlockPages, turns: Turns, scaling: float
) -> Attention:
    """Return what ``attend_blocks_reference`` returns, up to rounding.

    Queries in bf16 are multiplied by the keys' transform in bf16 where a machine does that fast.
    """
    shared = _plan_of(pages, queries.shape[0])
    scaled = queries.float() * scaling
    scaled = scaled.contiguous()
    cos, sin = (table.float().contiguous() for table in turns)
    plan, heads, items = shared.row.copy(), pages.keys.mean.shape[0], shared.items
    dim, num_rows = queries.shape[1], items * shared.group
    rows = _kept("rows", 4 * num_rows * dim).view(torch.float32).view(heads, -1, dim)
    constants = _kept("constants", 4 * num_rows)
    plan["scaled"], plan["cos"], plan["sin"] = (t.data_ptr() for t in (scaled, cos, sin))
    plan["half_turn"] = cos.shape[1] // 2
    plan["rows"], plan["constants"] = rows.data_ptr(), constants.data_ptr()
    at = plan.ctypes.data
    for_ranges(lambda first, stop: turn_queries(at, first, stop), items, 8 * _GRAIN)
    # The kernel would leave out scores that are not numbers, and answer as if there were none.
    of_mean = constants.view(torch.float32).view(heads, shared.blocks, shared.group)
    is_number = of_mean.isfinite().all(1).flatten()
    projected = _project(rows, shared.keys, queries.dtype)
    parts = max(1, min(torch.get_num_threads(), items // _GRAIN))
    part_bytes, room_bytes = int(plan["part_bytes"]), shared.room_bytes
    sums = np.zeros((parts, part_bytes // 4), np.float32)
    state = sums[:, int(plan["state"]) // 4 :][:, : 3 * queries.shape[0] : 3]
    state[:] = -np.inf
    room = _kept("room", parts * room_bytes)
    out, lse = torch.empty(queries.shape), torch.empty(queries.shape[:1])
    plan["projected"], plan["sums"], plan["parts"] = projected.data_ptr(), sums.ctypes.data, parts
    plan["out"], plan["lse"] = out.data_ptr(), lse.data_ptr()
    rooms_at, sums_at = room.data_ptr(), sums.ctypes.data

    def work(first: int, stop: int) -> None:
        for part in range(first, stop):
            begin, end = items * part // parts, items * (part + 1) // parts
            attend(at, begin, end, rooms_at + room_bytes * part, sums_at + part_bytes * part)

    for_ranges(work, parts)
    finish(at)
    if not is_number.all():
        out[~is_number], lse[~is_number] = torch.nan, torch.nan
    return out, lse


def _project(rows: torch.Tensor, keys: _Side, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 rows (H, n, D) in components (H, n, R)."""
    shape = (*rows.shape[:2], keys.projection.shape[-1])
    count = shape[0] * shape[1] * shape[2]
    out = _kept("projected", 4 * count).view(torch.float32).view(shape)
    is_worth_it = count * rows.shape[2] >= _LEAST_PRODUCTS and _HAS_BRAIN_PRODUCTS
    if dtype != torch.bfloat16 or not is_worth_it:
        return torch.bmm(rows, keys.projection, out=out)
    brain = _kept("brain", 2 * (rows.numel() + count)).view(torch.bfloat16)
    narrow, product = brain[: rows.numel()].view(rows.shape), brain[rows.numel() :].view(shape)
    torch.bmm(narrow.copy_(rows), keys.brain_projection, out=product)
    return out.copy_(product)
