"""One small call of every compiled op, so that no request waits for a compiler.

Numba compiles a kernel at its first call with new types, which takes up to seconds, and keeps the
machine code on disk for this kind of CPU; later processes load it in milliseconds. The types depend
on the dtype of the KV, not on shapes, so tiny tensors do. Not covered: Triton, which compiles at
first use for the GPU that is there.
"""

import contextlib
import fcntl
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvstrata.kernels.attend_blocks import (
    attend_blocks,
)
from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.block_pages import (
    NUM_FIELDS,
    BlockPages,
    BlockRows,
    SideTables,
    Turns,
)
from kvstrata.kernels.block_planes import PlaneLayout, decode_block_planes, encode_block_planes
from kvstrata.kernels.byte_planes import merge_bytes, split_bytes
from kvstrata.kernels.byte_ranges import join_ranges
from kvstrata.kernels.colsum import column_sums
from kvstrata.kernels.component_basis import ComponentBasis, encode_tokens, expand, product_dtype
from kvstrata.kernels.decoder_ops import add_rms_norm, rotate_heads, silu_gate
from kvstrata.kernels.escape_rows import pack_escape_rows, scatter_escape_rows
from kvstrata.kernels.few_rows import compile_for
from kvstrata.kernels.gather import gather_by_mask, scatter_by_mask
from kvstrata.kernels.layer_prediction import LayerWeights, Rest, add_predictions, steps
from kvstrata.kernels.mid_rows import pack_mid_rows
from kvstrata.kernels.nested_block import decode_blocks, encode_blocks
from kvstrata.kernels.nested_layout import NestedLayout
from kvstrata.kernels.paper_quantizers import (
    dequantize_channelwise,
    dequantize_groupwise,
    quantize_channelwise,
    quantize_groupwise,
)
from kvstrata.kernels.planes import unpack_planar
from kvstrata.kernels.rope import rotate
from kvstrata.kernels.row_pages import (
    PAGE_TOKENS,
    RowPages,
    RowStep,
    attend_rows,
    step_rows,
    write_rows,
)
from kvstrata.kernels.row_saliency import add_row_saliency
from kvstrata.kernels.row_tails import RowTails, stage_rows
from kvstrata.kernels.saliency import normalise_sums
from kvstrata.kernels.token_masks import TOKENS, to_flags, to_mask, token_classes
from kvstrata.kernels.token_rows import TokenRows, TokenTable, attend_tokens
from kvstrata.kernels.value_bias import encode_value_bias

# Two of each: with one, arrays of another memory order would have the same types.
_HEADS, _BLOCKS = 2, 2


_PATIENCE_S = 120.0  # how long other processes may compile before this one does so itself
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What a warm-up did.

    Attributes:
        seconds: Of each op, all its dtypes together; empty where no op is compiled.
        num_compiled: Kernels that were compiled, and are on disk now.
        num_loaded: Kernels that came from disk.
    """

    seconds: dict[str, float]
    num_compiled: int
    num_loaded: int


def warm_up(
    head_dims: Sequence[int] = (64,),
    dtypes: Sequence[torch.dtype] = FLOATS,
    ops: Sequence[str] | None = None,
) -> WarmUp:
    """Call every op of the CPU once per dtype and head_dim; does nothing without Numba.

    Blocks for seconds where nothing is on disk. Safe to call again; processes that call it at the
    same time share the work.

    Args:
        head_dims: Of the served models; multiples of 16.
        dtypes: Of their KV: bf16, fp16, fp32.
        ops: Names of what to call; None is all.
    """
    if backend_of(torch.empty(0)) != "numba":
        return WarmUp({}, 0, 0)
    loaded, compiled = cache_counts()
    seconds = {}
    waiting = deque(name for name in _OPS if ops is None or name in ops)
    deadline = time.monotonic() + _PATIENCE_S
    while waiting:
        name = waiting.popleft()
        with _claim(name) as claimed:
            if not claimed and time.monotonic() < deadline:  # another process compiles it
                waiting.append(name)
                time.sleep(_POLL_S)
                continue
            start = time.perf_counter()
            for head_dim in head_dims:
                for dtype in dtypes:
                    _OPS[name](head_dim, dtype)
            seconds[name] = time.perf_counter() - start
    now_loaded, now_compiled = cache_counts()
    return WarmUp(seconds, now_compiled - compiled, now_loaded - loaded)


@contextlib.contextmanager
def _claim(name: str) -> Iterator[bool]:
    """Tell whether no other process of this user warms ``name`` up, and keep it so meanwhile.

    Processes that start together then share the compiling instead of repeating it.
    """
    path = os.path.join(tempfile.gettempdir(), f"kvstrata-warmup-{os.getuid()}-{name}.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield True  # no folder to share: everybody compiles
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        try:
            yield True
        finally:  # who waits for this very file gets it, or makes another: both find all compiled
            with contextlib.suppress(OSError):
                os.unlink(path)
    finally:
        os.close(lock)


def cache_counts() -> tuple[int, int]:
    """Return how many kernels this process has loaded from disk, and how many it has compiled."""
    loaded = compiled = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("kvstrata.kernels.") and name.endswith("_numba"):
            for kernel in vars(module).values():
                if getattr(kernel, "__module__", "") == name and hasattr(kernel, "stats"):
                    loaded += sum(kernel.stats.cache_hits.values())
                    compiled += sum(kernel.stats.cache_misses.values())
    return loaded, compiled


def _layout(dim: int) -> PlaneLayout:
    widths = torch.zeros(_HEADS, dim, dtype=torch.uint8)
    widths[:, :8] = 2
    return PlaneLayout(widths, torch.full((_HEADS,), 16))


def _tokens(dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(_HEADS, _BLOCKS, TOKENS, dim, dtype=dtype)


def _calibrated(dim: int, dtype: torch.dtype) -> None:
    x, layout = _tokens(dim, dtype), _layout(dim)
    deviation, eye = torch.ones(_HEADS, dim), torch.eye(dim).repeat(_HEADS, 1, 1)
    basis = ComponentBasis(layout, torch.zeros(_HEADS, dim), eye, eye, deviation)
    masks = torch.ones(_HEADS, _BLOCKS, dtype=torch.int64)
    classes = token_classes(to_mask(to_flags(masks)), 2 * masks)
    y, words, _ = encode_tokens(x, basis, deviation)
    weights = torch.ones(_HEADS, _BLOCKS, TOKENS)
    rest: dict[str, Any] = {
        "mid": pack_mid_rows(y, classes.mid, layout),
        "escapes": pack_escape_rows(x, classes.escape),
    }
    scatter_escape_rows(rest["escapes"], x.clone())
    bias = encode_value_bias(
        y, words, layout, weights=weights, base=classes.base, deviation=deviation
    )
    expand(words, basis, classes, bias=bias, dtype=dtype, **rest)
    table = torch.ones(_BLOCKS * TOKENS, dim)
    expand(words, basis, classes, rotation=(table, table), dtype=dtype, **rest)
    join_ranges(torch.zeros(8, dtype=torch.uint8), *torch.ones(2, 2, dtype=torch.int64))
    words, _ = encode_block_planes(x, layout, deviation)
    decode_block_planes(words, layout, dtype=product_dtype(dtype))


def _predicted(dim: int, dtype: torch.dtype) -> None:
    tables = torch.zeros(2, 1, 2 * dim, 2 * dim, dtype=torch.float16)
    weights = LayerWeights(tables[0], tables[1], dim)
    rest = torch.zeros(1, _BLOCKS, TOKENS, dim)
    for recursion, step in steps(weights, _BLOCKS):
        recursion.put(step.part, recursion.predict(step.part))
    both = Rest(rest, rest, torch.zeros(1, _BLOCKS, dtype=torch.int64))
    add_predictions(both, both, weights, dtype)


def _fallback(dim: int, dtype: torch.dtype) -> None:
    x = _tokens(dim, dtype)[None].repeat(2, 1, 1, 1, 1)
    base, mid = (records.numpy() for records in encode_blocks(x, x))
    layout = NestedLayout.of(_HEADS, dim)
    for fine in (list(mid), None):
        decode_blocks(list(base), fine, layout, dtype)


def _attend(dim: int, dtype: torch.dtype) -> None:
    table, eye = torch.ones(_HEADS, dim), torch.eye(dim).repeat(_HEADS, 1, 1)
    side = SideTables(table, table, eye, _layout(dim))
    arena = torch.zeros(16 * _HEADS * dim, dtype=torch.uint8)
    offsets = torch.zeros(_BLOCKS, NUM_FIELDS, dtype=torch.int32)
    blocks = BlockRows(torch.zeros(_BLOCKS, dtype=torch.int64), torch.full((_BLOCKS,), TOKENS))
    pages = BlockPages(arena, blocks, offsets, side, side)
    turns = Turns(torch.ones(_BLOCKS, dim), torch.zeros(_BLOCKS, dim))
    attend_blocks(torch.ones(_HEADS, dim, dtype=dtype), pages, turns, 1.0)


def _decoder(dim: int, dtype: torch.dtype, table: torch.Tensor) -> None:
    compile_for(dtype)
    x = torch.ones(2, 2 * dim, dtype=dtype)
    for residual in (None, x):
        add_rms_norm(x, residual, torch.ones(2 * dim, dtype=dtype), 1e-6)
    rotate_heads(x.view(2, 2, dim), table, table, torch.zeros(2, dtype=torch.int64))
    silu_gate(x)


def _rows(dim: int, dtype: torch.dtype) -> None:
    memory = torch.zeros(2, 2, PAGE_TOKENS * dim, dtype=dtype)
    tables = torch.arange(2, dtype=torch.int32).view(1, 1, 2, 1)
    pages = RowPages(memory, tables, torch.zeros(1, 1, 2, dtype=torch.int32))
    row = torch.ones(1, 2, dim, dtype=dtype)
    step = RowStep(pages, torch.zeros(1, dtype=torch.int64))
    _, lse = step_rows(row, row, row, step, 0, 1.0)
    attend_rows(row, RowStep(replace(pages, lengths=pages.lengths + 1), step.slots), 0, 1.0)
    stage_rows(RowTails.empty(1, 2), step, 0, (row, row))
    stage_rows(RowTails.empty(1, 2), step, 0)
    write_rows(memory, tables[0, 0], 0, row.transpose(0, 1), row.transpose(0, 1))
    table = torch.ones(2, dim)
    _decoder(dim, dtype, table)
    tokens = TokenRows(torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1]))
    keys = torch.ones(2, 2, dim, dtype=dtype)
    attend_tokens(row, TokenTable(keys, keys, table, table), tokens, 1.0)
    firsts, sums = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 2, PAGE_TOKENS)
    add_row_saliency(row, lse, step, 0, 1.0, firsts, sums)


def _exact(dim: int, dtype: torch.dtype) -> None:
    merge_bytes(split_bytes(_tokens(dim, dtype)), dtype)


def _rope(dim: int, dtype: torch.dtype) -> None:
    table = torch.ones(TOKENS, dim)
    x = _tokens(dim, dtype)
    for positions in (None, torch.arange(TOKENS)):
        for inverse in (False, True):
            rotate(x, table, table, positions=positions, inverse=inverse)


def _column_sums(dim: int, dtype: torch.dtype) -> None:
    x = _tokens(dim, dtype)
    sums = column_sums(x, x, torch.arange(TOKENS), 1.0)
    normalise_sums(sums[:, :, None], torch.ones(TOKENS, dtype=torch.int64))


def _unpack(dim: int, dtype: torch.dtype) -> None:
    packed = torch.zeros(_BLOCKS, dim, dtype=torch.uint8)
    for wanted in (dtype, torch.uint8):
        unpack_planar(packed, 2, wanted)


def _gather(dim: int, dtype: torch.dtype) -> None:
    masks = torch.ones(_HEADS, _BLOCKS, dtype=torch.int64)
    scatter_by_mask(gather_by_mask(_tokens(dim, dtype), masks)[0], masks)


def _paper_quantizers(dim: int, dtype: torch.dtype) -> None:
    x = _tokens(dim, dtype)[0]
    dequantize_channelwise(quantize_channelwise(x, 4), dtype)
    for scale in (None, torch.ones(_BLOCKS, dim)):
        dequantize_groupwise(quantize_groupwise(x, 4, dim, scale), dtype=dtype)


# What a worker calls for a request.
WORKER_OPS = ("attend", "calibrated", "colsum", "exact", "fallback", "predicted", "rows")

_OPS: dict[str, Callable[[int, torch.dtype], None]] = {
    "attend": _attend,
    "calibrated": _calibrated,
    "colsum": _column_sums,
    "exact": _exact,
    "fallback": _fallback,
    "gather": _gather,
    "paper-quantizers": _paper_quantizers,
    "predicted": _predicted,
    "rope": _rope,
    "rows": _rows,
    "unpack": _unpack,
}
