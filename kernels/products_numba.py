"""Products of 64 tokens by 16 columns: in the matrix unit (AMX), by dot products of pairs, by FMA.

Every block is multiplied alone and in one order of additions, so that its numbers do not depend on
how many blocks are handled together, which BLAS does not promise. Weights lie packed in the order
in which they are read (``pack``), and their type tells compiled code who multiplies: uint16 is the
matrix unit, int32 pairs of bf16 (AVX512-BF16), float32 FMA. Tokens are bf16 for the first two.

Roofline: one tile instruction multiplies 16 x 32 by 32 x 16 numbers of bf16 in 16 cycles, so 64 x
64 by 64 x 64 takes 512 cycles, 0.05 ns per number at 2.5 GHz; by pairs of 16 lanes it takes 8192,
by FMA 16384. Seen on a shared machine: 0.21 ns in tiles, of which 0.13 are the instructions of the
matrix unit alone; 0.7 ns by pairs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

import ctypes
import platform
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic
from numba.extending import overload

from kvstrata.kernels.compiled import inlined
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.vectors_numba import (
    HAS_PAIRS,
    LANES,
    add_pairs,
    load,
    load_ints,
    multiply_add,
    splat,
    splat_at,
    splat_pair_at,
    store,
)

intrinsic: Any = _intrinsic  # its stub describes the function before it is decorated
Multiplier = Literal["tiles", "pairs", "floats"]

_TILE_DEPTH = 32
_TOKENS = 64
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18


@cache
def has_tiles() -> bool:
    """Return whether this process may use the matrix unit; asks the kernel once."""
    features = get_host_cpu_features()
    known = features.get("amx-bf16", False) and features.get("amx-tile", False)
    if not known or platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    call = ctypes.CDLL(None).syscall
    return bool(call(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0)


def multiplier_of(dtype: torch.dtype) -> Multiplier:
    """Return who multiplies float32 or bf16 numbers fastest here."""
    if dtype != torch.bfloat16:
        return "floats"
    return "tiles" if has_tiles() else "pairs" if HAS_PAIRS else "floats"


def depth_step(multiplier: Multiplier) -> int:
    """Return what depths are padded to a multiple of."""
    return _TILE_DEPTH if multiplier == "tiles" else LANES


def padded(depth: int, multiplier: Multiplier) -> int:
    """Return a depth rounded up."""
    step = depth_step(multiplier)
    return -(-depth // step) * step


def pack(matrix: torch.Tensor, multiplier: Multiplier) -> "np.ndarray[Any, Any]":
    """Return float32 (H, K, D), K padded, as the products read it, flat.

    Per head and 16 columns: bf16 pairs of rows side by side, or float32 row by row.
    """
    heads, depth, dim = matrix.shape
    rows = torch.zeros(heads, padded(depth, multiplier), dim)
    rows[:, :depth] = matrix
    if multiplier == "floats":
        columns = rows.view(heads, -1, dim // LANES, LANES).transpose(1, 2)
        return as_numpy(columns.contiguous()).reshape(-1)
    pairs = rows.bfloat16().view(heads, -1, 2, dim // LANES, LANES)
    packed = as_numpy(pairs.permute(0, 3, 1, 4, 2).contiguous()).reshape(-1)
    return packed if multiplier == "tiles" else packed.view(np.int32)


def rows_dtype(multiplier: Multiplier) -> type:
    """Return the numpy type of the tokens that are multiplied."""
    return np.float32 if multiplier == "floats" else np.uint16


def aligned(size: int, dtype: Any) -> "np.ndarray[Any, Any]":
    """Return fresh memory that starts a cache line: a tile's rows are read one line each."""
    spare = 64 // np.dtype(dtype).itemsize
    memory = np.empty(size + spare, dtype)
    start = -memory.ctypes.data % 64 // memory.itemsize
    return memory[start : start + size]


_I8, _I64 = ir.IntType(8), ir.IntType(64)
_POINTER = _I8.as_pointer()


def _call(builder, name, arguments):
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _address(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _POINTER)


def _config_function(name):
    @intrinsic
    def function(typingctx, config):
        def generate(context, builder, signature, args):
            _call(builder, name, [_address(context, builder, config, args[0], _I64(0))])
            return context.get_dummy_value()

        return types.void(config), generate

    return function


def _moving_function(name, tile):
    @intrinsic
    def function(typingctx, array, index, row_bytes):
        def generate(context, builder, signature, args):
            place = _address(context, builder, array, args[0], args[1])
            _call(builder, name, [_I8(tile), place, args[2]])
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp), generate

    return function


def _register_function(name, *tiles):
    @intrinsic
    def function(typingctx):
        def generate(context, builder, signature, args):
            _call(builder, name, [_I8(tile) for tile in tiles])
            return context.get_dummy_value()

        return types.void(), generate

    return function


_load_config = _config_function("llvm.x86.ldtilecfg")
_save_config = _config_function("llvm.x86.sttilecfg")
_zero0, _zero1, _zero2, _zero3 = (_register_function("llvm.x86.tilezero", i) for i in range(4))
_load4, _load5, _load6, _load7 = (_moving_function("llvm.x86.tileloadd64", i) for i in range(4, 8))
_save0, _save1, _save2, _save3 = (_moving_function("llvm.x86.tilestored64", i) for i in range(4))
_dot0, _dot1, _dot2, _dot3 = (
    _register_function("llvm.x86.tdpbf16ps", i, a, 4) for i, a in enumerate((5, 6, 7, 5))
)


# Palette 1: all tiles 16 rows of 64 bytes. The second half is for what the thread had.
_CONFIG = np.zeros(64, np.uint8)
_CONFIG[0] = 1
_CONFIG[16:32:2] = 64
_CONFIG[48:56] = 16


def tile_config() -> "np.ndarray[Any, Any]":
    """Return what ``begin_products`` sets, and room for what was set: a thread's own copy."""
    return np.concatenate([_CONFIG, np.zeros(64, np.uint8)])


@inlined
def _begin_tiles(config):
    _save_config(config[64:])
    _load_config(config)


@inlined
def _end_tiles(config):
    _load_config(config[64:])


@inlined
def _multiply_tiles(a, at, row, packed, start, depth, out, to, step):
    """Write the tokens' 16 columns by four tiles of sums, one of weights and three of tokens."""
    _zero0()
    _zero1()
    _zero2()
    _zero3()
    down = LANES * row
    for k in range(0, depth, _TILE_DEPTH):
        here = at + k
        _load4(packed, start + k * LANES, 64)
        _load5(a, here, 2 * row)
        _dot0()
        _load6(a, here + down, 2 * row)
        _dot1()
        _load7(a, here + 2 * down, 2 * row)
        _dot2()
        _load5(a, here + 3 * down, 2 * row)
        _dot3()
    _save0(out, to, 4 * step)
    _save1(out, to + LANES * step, 4 * step)
    _save2(out, to + 2 * LANES * step, 4 * step)
    _save3(out, to + 3 * LANES * step, 4 * step)


@inlined
def _store_eight(out, place, step, s0, s1, s2, s3, s4, s5, s6, s7):
    store(out, place, s0)
    store(out, place + step, s1)
    store(out, place + 2 * step, s2)
    store(out, place + 3 * step, s3)
    store(out, place + 4 * step, s4)
    store(out, place + 5 * step, s5)
    store(out, place + 6 * step, s6)
    store(out, place + 7 * step, s7)


@inlined
def _load_pairs(packed, place):
    return load_ints(packed, place // 2)


@inlined
def _add_product(total, x, weights):
    return multiply_add(x, weights, total)


def _by_lanes(load_weights, spread, accumulate, stride):
    """Return functions that multiply by 16 columns and by 32, ``stride`` numbers at a time.

    Both take eight tokens at a time. By 32, what is spread over lanes serves both halves.
    """

    @inlined
    def multiply(a, at, row, packed, start, depth, out, to, step):
        for t in range(0, _TOKENS, 8):
            s0, s1 = splat(np.float32(0)), splat(np.float32(0))
            s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0
            first = at + t * row
            for k in range(0, depth, stride):
                weights, here = load_weights(packed, start + k * LANES), first + k
                s0 = accumulate(s0, spread(a, here), weights)
                s1 = accumulate(s1, spread(a, here + row), weights)
                s2 = accumulate(s2, spread(a, here + 2 * row), weights)
                s3 = accumulate(s3, spread(a, here + 3 * row), weights)
                s4 = accumulate(s4, spread(a, here + 4 * row), weights)
                s5 = accumulate(s5, spread(a, here + 5 * row), weights)
                s6 = accumulate(s6, spread(a, here + 6 * row), weights)
                s7 = accumulate(s7, spread(a, here + 7 * row), weights)
            place = to + t * step
            _store_eight(out, place, step, s0, s1, s2, s3, s4, s5, s6, s7)

    @inlined
    def multiply_wide(a, at, row, packed, start, next_start, depth, out, to, step):
        for t in range(0, _TOKENS, 8):
            s0, s1 = splat(np.float32(0)), splat(np.float32(0))
            s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0
            r0, r1, r2, r3, r4, r5, r6, r7 = s0, s0, s0, s0, s0, s0, s0, s0
            first = at + t * row
            for k in range(0, depth, stride):
                left = load_weights(packed, start + k * LANES)
                right, here = load_weights(packed, next_start + k * LANES), first + k
                x = spread(a, here)
                s0, r0 = accumulate(s0, x, left), accumulate(r0, x, right)
                x = spread(a, here + row)
                s1, r1 = accumulate(s1, x, left), accumulate(r1, x, right)
                x = spread(a, here + 2 * row)
                s2, r2 = accumulate(s2, x, left), accumulate(r2, x, right)
                x = spread(a, here + 3 * row)
                s3, r3 = accumulate(s3, x, left), accumulate(r3, x, right)
                x = spread(a, here + 4 * row)
                s4, r4 = accumulate(s4, x, left), accumulate(r4, x, right)
                x = spread(a, here + 5 * row)
                s5, r5 = accumulate(s5, x, left), accumulate(r5, x, right)
                x = spread(a, here + 6 * row)
                s6, r6 = accumulate(s6, x, left), accumulate(r6, x, right)
                x = spread(a, here + 7 * row)
                s7, r7 = accumulate(s7, x, left), accumulate(r7, x, right)
            place = to + t * step
            _store_eight(out, place, step, s0, s1, s2, s3, s4, s5, s6, s7)
            _store_eight(out, place + LANES, step, r0, r1, r2, r3, r4, r5, r6, r7)

    return multiply, multiply_wide


_multiply_floats, _multiply_wide_floats = _by_lanes(load, splat_at, _add_product, 1)
_multiply_pairs, _multiply_wide_pairs = _by_lanes(_load_pairs, splat_pair_at, add_pairs, 2)


def begin_products(packed, config):
    """Let the matrix unit be used until ``end_products``, if ``packed`` is for it."""
    raise NotImplementedError("for compiled code only")


@overload(begin_products, inline="always")
def _begin_products(packed, config):
    if packed.dtype == types.uint16:
        return lambda packed, config: _begin_tiles(config)
    return lambda packed, config: None


def end_products(packed, config):
    """Restore what was set before ``begin_products``: other libraries use the unit, too."""
    raise NotImplementedError("for compiled code only")


@overload(end_products, inline="always")
def _end_products(packed, config):
    if packed.dtype == types.uint16:
        return lambda packed, config: _end_tiles(config)
    return lambda packed, config: None


def padded_depth(packed, depth):
    """Return ``padded``."""
    raise NotImplementedError("for compiled code only")


@overload(padded_depth, inline="always")
def _padded_depth(packed, depth):
    step = _TILE_DEPTH if packed.dtype == types.uint16 else LANES
    return lambda packed, depth: (depth + step - 1) // step * step


def counted_depth(packed, depth):
    """Return how much of a padded depth is multiplied where what lies behind ``depth`` is zero."""
    raise NotImplementedError("for compiled code only")


@overload(counted_depth, inline="always")
def _counted_depth(packed, depth):
    step = {types.uint16: _TILE_DEPTH, types.int32: 2}.get(packed.dtype, 1)
    return lambda packed, depth: (depth + step - 1) // step * step


def multiply_columns(a, at, row, packed, start, depth, out, to, step):
    """Write 64 rows of ``a``, ``row`` apart, times 16 columns of ``packed`` to float32 ``out``."""
    raise NotImplementedError("for compiled code only")


@overload(multiply_columns, inline="always")
def _multiply_columns(a, at, row, packed, start, depth, out, to, step):
    chosen = {types.uint16: _multiply_tiles, types.int32: _multiply_pairs}.get(
        packed.dtype, _multiply_floats
    )

    def run(a, at, row, packed, start, depth, out, to, step):
        chosen(a, at, row, packed, start, depth, out, to, step)

    return run


def multiply_rows(a, at, row, packed, start, whole, depth, out, to, dim):
    """Write 64 rows of ``a``, ``row`` apart, times all ``dim`` columns of a matrix of ``packed``.

    ``whole`` is the padded depth of the matrix at ``start``, ``depth`` how much of it counts.
    """
    raise NotImplementedError("for compiled code only")


@overload(multiply_rows, inline="always")
def _multiply_rows(a, at, row, packed, start, whole, depth, out, to, dim):
    if packed.dtype in (types.int32, types.float32):
        is_pairs = packed.dtype == types.int32
        multiply = _multiply_pairs if is_pairs else _multiply_floats
        multiply_wide = _multiply_wide_pairs if is_pairs else _multiply_wide_floats

        def run(a, at, row, packed, start, whole, depth, out, to, dim):
            c = 0
            while c + 2 * LANES <= dim:
                place = start + c * whole
                multiply_wide(
                    a, at, row, packed, place, place + LANES * whole, depth, out, to + c, dim
                )
                c += 2 * LANES
            if c < dim:
                multiply(a, at, row, packed, start + c * whole, depth, out, to + c, dim)

        return run

    def run_columns(a, at, row, packed, start, whole, depth, out, to, dim):
        for c in range(0, dim, LANES):
            multiply_columns(a, at, row, packed, start + c * whole, depth, out, to + c, dim)

    return run_columns
