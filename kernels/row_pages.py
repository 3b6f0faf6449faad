"""Uncompressed rows of K and V in small pages, ragged over sequences, layers and heads.

A page holds 16 tokens of one KV head of one layer. Keys lie in it channel by channel, so that one
vector holds a channel of all its tokens: scores of 16 tokens need no sum across lanes. Values lie
token by token. A head's pages may be anywhere, and heads may hold different numbers of tokens;
their order does not matter to attention, because keys are rotated already.

``attend_rows`` attends for a token whose row is there already, ``step_rows`` for one whose row is
new. Not covered: several tokens of one sequence at once (``read_rows``, then any dense attention).

Legend: S sequences held, R sequences of a step, L layers, H KV heads, G query heads per KV head,
D head_dim, P pages, W pages that a head can have.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from kvstrata.kernels.attend_blocks import Attention, attend_window
from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.rope import rotate

PAGE_TOKENS = 16


@dataclass(frozen=True, eq=False)
class RowPages:
    """The pages of all sequences, and where each head's rows are.

    Attributes:
        memory: (P, 2, 16 * D), bf16, fp16 or fp32: keys (D, 16), then values (16, D).
        tables: int32 (S, L, H, W), the pages of each head, on the CPU. Row t of a head is in its
            page t // 16. What lies beyond a head's length is not looked at.
        lengths: int32 (S, L, H), rows of each head, on the CPU.
        head_dim: D.
    """

    memory: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor

    head_dim: int = field(init=False)

    def __post_init__(self) -> None:
        """Raise ValueError for tensors that do not belong together."""
        memory, tables, lengths = self.memory, self.tables, self.lengths
        if memory.dtype not in FLOATS or memory.ndim != 3 or memory.shape[1] != 2:
            raise ValueError(f"memory must be floats (P, 2, 16 D), not {tuple(memory.shape)}")
        if memory.shape[2] % PAGE_TOKENS or not memory.is_contiguous():
            raise ValueError(f"a page must hold {PAGE_TOKENS} tokens, and memory be contiguous")
        if {tables.dtype, lengths.dtype} != {torch.int32}:
            raise ValueError("tables and lengths must be int32")
        if tables.ndim != 4 or tables.shape[:3] != lengths.shape:
            raise ValueError(
                f"tables must be (S, L, H, W) and lengths (S, L, H), "
                f"not {tuple(tables.shape)} and {tuple(lengths.shape)}"
            )
        if {tables.device.type, lengths.device.type} != {"cpu"} or not (
            tables.is_contiguous() and lengths.is_contiguous()
        ):
            raise ValueError("tables and lengths must be contiguous and on the CPU")
        object.__setattr__(self, "head_dim", memory.shape[2] // PAGE_TOKENS)


@dataclass(frozen=True, eq=False)
class RowStep:
    """One new row for each of some sequences: what the calls for all layers of a step share.

    Attributes:
        pages: Their tables must have room for the row.
        slots: int64 (R,), which sequences of the tables, on the CPU, each at most once.
    """

    pages: RowPages
    slots: torch.Tensor
    _made: dict[object, Any] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError for sequences that are not there, or have no room."""
        slots, (num_slots, _, _, width) = self.slots, self.pages.tables.shape
        if slots.dtype != torch.int64 or slots.ndim != 1 or slots.device.type != "cpu":
            raise ValueError("slots must be int64 with one dimension, on the CPU")
        if not slots.numel():
            raise ValueError("a step needs at least one sequence")
        if int(slots.min()) < 0 or int(slots.max()) >= num_slots:
            raise ValueError(f"slots must be in 0..{num_slots - 1}")
        if int(self.lengths.max()) >= width * PAGE_TOKENS:
            raise ValueError("a head has no room for another row")

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Return int32 (R, L, H): rows before this step."""
        return self.pages.lengths[self.slots]

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def step_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: RowStep,
    layer: int,
    scaling: float,
) -> Attention:
    """Append one row to each sequence's heads in a layer, and attend over all their rows.

    ``lengths`` of the pages stay as they are: the row counts as held when the caller says so. A
    sequence's result does not depend on the others. One call at a time for a step.

    Args:
        queries: (R, H * G, D), post-RoPE. Query head i reads KV head i // G.
        keys: (R, H, D), post-RoPE.
        values: As ``keys``.
        step: Which sequences.
        layer: Which layer of the tables.
        scaling: Factor on the dot products before the softmax.

    Returns:
        Output float32 (R, H * G, D), and lse float32 (R, H * G), the natural logarithm of the sum
        of exp(score).

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together.
    """
    _check(queries, keys, values, step, layer)
    backend = backend_of(queries, keys, values, step.pages.memory)
    if backend == "triton":
        from kvstrata.kernels.row_pages_triton import step_rows_triton

        return step_rows_triton(queries, keys, values, step, layer, scaling)
    if backend == "numba" and step.pages.head_dim % 16 == 0:
        from kvstrata.kernels.row_pages_numba import step_rows_numba

        return step_rows_numba(queries, keys, values, step, layer, scaling)
    return step_rows_reference(queries, keys, values, step, layer, scaling)


def step_rows_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: RowStep,
    layer: int,
    scaling: float,
) -> Attention:
    """Return ``step_rows``, one head after another."""
    for i, slot in enumerate(step.slots.tolist()):
        for head, table in enumerate(step.pages.tables[slot, layer]):
            key, value = keys[i, head, None, None], values[i, head, None, None]
            first = int(step.lengths[i, layer, head])
            write_rows_reference(step.pages.memory, table[None], first, key, value)
    return attend_rows_reference(queries, step, layer, scaling, num_new=1)


def attend_rows(queries: torch.Tensor, step: RowStep, layer: int, scaling: float) -> Attention:
    """Attend over the rows that each sequence's heads have in a layer; write nothing.

    Args:
        queries: (R, H * G, D), post-RoPE, of the dtype of the pages.
        step: Which sequences; each has a row at least.
        layer: Which layer of the tables.
        scaling: Factor on the dot products before the softmax.

    Returns:
        As ``step_rows``.

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together, or no row.
    """
    dim = step.pages.head_dim
    no_rows = queries.new_empty((len(step.slots), step.pages.tables.shape[2], dim))
    _check(queries, no_rows, no_rows, step, layer)
    if not int(step.lengths[:, layer].min()):
        raise ValueError("a head has no row to attend to")
    backend = backend_of(queries, step.pages.memory)
    if backend == "triton":
        from kvstrata.kernels.row_pages_triton import attend_rows_triton

        return attend_rows_triton(queries, step, layer, scaling)
    if backend == "numba" and dim % PAGE_TOKENS == 0:
        from kvstrata.kernels.row_pages_numba import attend_rows_numba

        return attend_rows_numba(queries, step, layer, scaling)
    return attend_rows_reference(queries, step, layer, scaling)


def attend_rows_reference(
    queries: torch.Tensor, step: RowStep, layer: int, scaling: float, num_new: int = 0
) -> Attention:
    """Return ``attend_rows``, one head after another; of ``num_new`` rows more than were held."""
    out = torch.empty(queries.shape, device=queries.device)
    lse = torch.empty(queries.shape[:2], device=queries.device)
    heads = step.pages.tables.shape[2]
    group = queries.shape[1] // heads
    for i, slot in enumerate(step.slots.tolist()):
        for head in range(heads):
            count = int(step.lengths[i, layer, head]) + num_new
            table = step.pages.tables[slot, layer, head][None]
            every = read_rows(step.pages.memory, table, 0, count)
            own = slice(head * group, (head + 1) * group)
            out[i, own], lse[i, own] = attend_window(queries[i, own], *every, scaling)
    return out, lse


def write_rows(
    memory: torch.Tensor,
    tables: torch.Tensor,
    first: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write rows ``first`` and on of some heads into their pages.

    Args:
        memory: Of ``RowPages``.
        tables: int32 (heads, W), their pages.
        first: Which row of each head the first of the new ones is.
        keys: (heads, n, D).
        values: As ``keys``.
        rotation: cos and sin, float32 (n, D), both halves of a row equal: keys are turned by them
            first, as by ``rope.rotate``.
    """
    dim, dtypes = keys.shape[2], {keys.dtype, values.dtype, memory.dtype}
    is_quick = len(dtypes) == 1 and dim % (PAGE_TOKENS * (2 if rotation else 1)) == 0
    is_quick = is_quick and keys.stride(2) == values.stride(2) == tables.stride(1) == 1
    if is_quick and backend_of(memory, keys, values) == "numba":
        from kvstrata.kernels.row_pages_numba import write_rows_numba

        write_rows_numba(memory, tables, first, keys, values, rotation)
    else:
        write_rows_reference(memory, tables, first, keys, values, rotation)


def write_rows_reference(
    memory: torch.Tensor,
    tables: torch.Tensor,
    first: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Do what ``write_rows`` does; the definition."""
    if rotation is not None:
        keys = rotate(keys, *rotation)
    at, slot = _places(tables, first, first + keys.shape[1])
    at, slot = at.to(memory.device), slot.to(memory.device)
    dim = keys.shape[2]
    memory[:, 0].view(-1, dim, PAGE_TOKENS)[at, :, slot] = keys.to(memory.dtype)
    memory[:, 1].view(-1, PAGE_TOKENS, dim)[at, slot] = values.to(memory.dtype)


def read_rows(
    memory: torch.Tensor, tables: torch.Tensor, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows ``first`` to ``last`` - 1 of some heads: keys and values (heads, n, D).

    Args:
        memory: Of ``RowPages``.
        tables: int32 (heads, W), their pages.
        first: First row of each head.
        last: Behind the last row.
    """
    dim = memory.shape[2] // PAGE_TOKENS
    skipped = first // PAGE_TOKENS
    chosen = tables[:, skipped : -(-last // PAGE_TOKENS)].long().to(memory.device)
    rows = slice(first - skipped * PAGE_TOKENS, last - skipped * PAGE_TOKENS)
    found = memory[chosen]
    keys = found[:, :, 0].unflatten(2, (dim, PAGE_TOKENS)).transpose(2, 3).flatten(1, 2)
    values = found[:, :, 1].unflatten(2, (PAGE_TOKENS, dim)).flatten(1, 2)
    return keys[:, rows], values[:, rows]


def _places(tables: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the page and the place in it of rows: int64 (heads, n) each."""
    rows = torch.arange(first, last)
    at = tables[:, rows // PAGE_TOKENS].long()
    return at, (rows % PAGE_TOKENS).expand(at.shape)


def _check(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: RowStep, layer: int
) -> None:
    pages, count = step.pages, step.slots.shape[0]
    num_layers, heads = pages.tables.shape[1:3]
    dim = pages.head_dim
    if keys.shape != (count, heads, dim) or values.shape != keys.shape:
        raise ValueError(
            f"keys and values must both be {(count, heads, dim)}, not {tuple(keys.shape)} and "
            f"{tuple(values.shape)}"
        )
    shape = queries.shape
    if len(shape) != 3 or shape[0] != count or shape[2] != dim or shape[1] % heads:
        raise ValueError(
            f"queries must be ({count}, a multiple of {heads}, {dim}), not {tuple(shape)}"
        )
    dtype = pages.memory.dtype
    if queries.dtype != dtype or keys.dtype != dtype or values.dtype != dtype:
        raise ValueError(f"queries, keys and values must be {dtype} as the pages are")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be in 0..{num_layers - 1}, not {layer}")
