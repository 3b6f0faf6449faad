"""``few_rows`` on CPU: what lies between the attention of two layers, in one call of all threads.

Products are cut into the blocks of their weight, which threads take one by one; a counter tells
when the last one is done. So a thread that comes late delays nobody. Sums of rows, norms and all
that is short is done by each thread for itself.

Roofline: bound by reading the weights, once for all rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np

from kvstrata.kernels.atoms_numba import add_at, array_at, call_at, wait_for
from kvstrata.kernels.compiled import c_function, called, inlined
from kvstrata.kernels.decoder_ops_numba import gated, norm_row, turn_head
from kvstrata.kernels.few_rows import FIELDS, LINE, WEIGHTS
from kvstrata.kernels.vectors_numba import LANES, add, load, store
from kvstrata.kernels.weight_products_numba import multiply_block

(
    _WEIGHTS, _EPS, _ROWS, _WIDTH, _ATTENDED_WIDTH, _INNER, _OUTPUTS, _TURNED, _QUERIES,
    _DIM, _ATTENDED, _START, _KEPT, _NUM_KEPT, _HIDDEN, _NORMED, _SUMS, _ROUNDED, _STRIDE,
    _ADDED, _GATED, _MORE, _TARGET, _COS, _SIN, _POSITIONS, _COUNTERS, _THREAD,
    _GIVE_WAY,
) = range(len(FIELDS))  # fmt: skip
(
    _OUT, _OUT_WIDTH, _OUT_BIAS, _NORM, _GATE_UP, _GATE_UP_WIDTH, _GATE_UP_BIAS,
    _DOWN, _DOWN_WIDTH, _DOWN_BIAS, _NEXT_NORM, _INTO, _INTO_WIDTH, _INTO_BIAS,
    _QUERY_NORM, _KEY_NORM,
) = range(len(WEIGHTS))  # fmt: skip


@c_function
def run_pairs(call):
    """Run a call for bf16."""
    _run(array_at(call, np.int64), np.uint16, np.int32, 2)


@c_function
def run_floats(call):
    """Run a call for float32."""
    _run(array_at(call, np.int64), np.float32, np.float32, 1)


@called
def _run(call, number, factor, per_factor):
    weights, eps = array_at(call[_WEIGHTS], np.int64), array_at(call[_EPS], np.float32)
    counters, give_way = array_at(call[_COUNTERS], np.int64), call[_GIVE_WAY]
    thread = call_at(call[_THREAD]) if call[_THREAD] != 0 else 0
    rows, width, inner = call[_ROWS], call[_WIDTH], call[_INNER]
    own = thread * call[_STRIDE]
    hidden, normed = array_at(call[_HIDDEN] + own, number), array_at(call[_NORMED] + own, number)
    x = array_at(call[_NORMED] + own, factor)
    sums, rounded = array_at(call[_SUMS] + own, np.float32), array_at(call[_ROUNDED] + own, number)
    kept, count = array_at(call[_KEPT], np.int64), call[_NUM_KEPT]
    depth = width // per_factor
    if weights[_OUT] != 0:
        added, more = array_at(call[_ADDED], number), array_at(call[_MORE], number)
        attended, within = array_at(call[_ATTENDED], factor), array_at(call[_GATED], factor)
        _multiply(
            counters, 0, give_way, attended, call[_ATTENDED_WIDTH] // per_factor, rows, weights,
            _OUT, sums, added, width, number, factor,
        )  # fmt: skip
        _add(hidden, added, rows * width)
        _norm(hidden, kept, 0, rows, width, array_at(weights[_NORM], number), eps[0], normed)
        _gate(
            counters, 1, give_way, x, depth, rows, weights, _GATE_UP, sums, rounded,
            array_at(call[_GATED], number), inner, number, factor,
        )  # fmt: skip
        _multiply(
            counters, 2, give_way, within, inner // per_factor, rows, weights, _DOWN, sums, more,
            width, number, factor,
        )  # fmt: skip
        _add(hidden, more, rows * width)
    else:
        start = array_at(call[_START], number)
        for i in range(0, rows * width, LANES):
            store(hidden, i, load(start, i))
    wanted = count if count > 0 else rows
    _norm(hidden, kept, count, wanted, width, array_at(weights[_NEXT_NORM], number), eps[1], normed)
    target = array_at(call[_TARGET], number)
    _multiply(
        counters, 3, give_way, x, depth, wanted, weights, _INTO, sums, target, call[_OUTPUTS],
        number, factor,
    )  # fmt: skip
    if call[_TURNED] > 0:
        _turn(call, counters, weights, eps, target, rounded, number)


@inlined
def _take(counters, phase):
    return add_at(counters, 2 * LINE * phase, 1)


@inlined
def _tell(counters, phase):
    add_at(counters, 2 * LINE * phase + LINE, 1)


@inlined
def _wait(counters, phase, count, give_way):
    wait_for(counters, 2 * LINE * phase + LINE, count, give_way)


@called
def _multiply(
    counters, phase, give_way, x, depth, count, weights, at, sums, out, outputs, number, factor
):  # fmt: skip
    """Write rows times a weight, ``outputs`` a multiple of 16; return when all is written."""
    packed, width = array_at(weights[at], factor), weights[at + 1]
    bias, has_bias = array_at(weights[at + 2], number), weights[at + 2] != 0
    blocks = (outputs + width - 1) // width
    block = _take(counters, phase)
    while block < blocks:
        multiply_block(x, depth, count, packed, block, width, depth, sums, 0, width)
        first = block * width
        for r in range(count):
            for c in range(0, min(width, outputs - first), LANES):
                value = load(sums, r * width + c)
                if has_bias:
                    value = add(value, load(bias, first + c))
                store(out, r * outputs + first + c, value)
        _tell(counters, phase)
        block = _take(counters, phase)
    _wait(counters, phase, blocks, give_way)


@called
def _gate(
    counters, phase, give_way, x, depth, count, weights, at, sums, rounded, out, inner, number,
    factor,
):  # fmt: skip
    """Write silu(gate) * up, ``inner`` a multiple of the block's width; see ``silu_gate``."""
    packed, width = array_at(weights[at], factor), weights[at + 1]
    bias, has_bias = array_at(weights[at + 2], number), weights[at + 2] != 0
    blocks, step = inner // width, 2 * width
    block = _take(counters, phase)
    while block < blocks:
        multiply_block(x, depth, count, packed, block, width, depth, sums, 0, step)
        multiply_block(x, depth, count, packed, block + blocks, width, depth, sums, width, step)
        first = block * width
        for r in range(count):
            for c in range(0, width, LANES):
                low, high = r * step + c, r * step + width + c
                gate, up = load(sums, low), load(sums, high)
                if has_bias:
                    gate = add(gate, load(bias, first + c))
                    up = add(up, load(bias, inner + first + c))
                store(rounded, low, gate)
                store(rounded, high, up)
                store(out, r * inner + first + c, gated(load(rounded, low), load(rounded, high)))
        _tell(counters, phase)
        block = _take(counters, phase)
    _wait(counters, phase, blocks, give_way)


@called
def _add(hidden, added, size):
    for i in range(0, size, LANES):
        store(hidden, i, add(load(added, i), load(hidden, i)))


@called
def _norm(hidden, kept, num_kept, count, width, weight, eps, out):
    """Write normalised rows: of ``hidden``, or of those that are kept."""
    for r in range(count):
        row = kept[r] if num_kept > 0 else r
        norm_row(hidden, row * width, width, weight, eps, out, r * width)


@called
def _turn(call, counters, weights, eps, heads, rounded, number):
    """Normalise heads, where a model does, and rotate them to the positions of their rows."""
    cos, sin = array_at(call[_COS], np.float32), array_at(call[_SIN], np.float32)
    positions, dim, turned = array_at(call[_POSITIONS], np.int64), call[_DIM], call[_TURNED]
    query_norm = array_at(weights[_QUERY_NORM], number)
    key_norm = array_at(weights[_KEY_NORM], number)
    item, items = _take(counters, 4), call[_ROWS]
    while item < items:
        angle = positions[item] * dim
        for head in range(turned):
            at = item * call[_OUTPUTS] + head * dim
            source, start = heads, at
            if weights[_KEY_NORM] != 0:
                if head < call[_QUERIES]:
                    norm_row(heads, at, dim, query_norm, eps[2], rounded, 0)
                else:
                    norm_row(heads, at, dim, key_norm, eps[3], rounded, 0)
                source, start = rounded, 0
            turn_head(source, start, cos, sin, angle, dim, heads, at)
        item = _take(counters, 4)
