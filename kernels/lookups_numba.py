"""Looks numbers up in tables, 16 at a time: in one or two registers, or in memory.

As in ``vectors_numba`` nothing is checked.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from kvstrata.kernels.vectors_numba import (
    LANES,
    call,
    constant,
    floats,
    ints,
    load_as,
    many,
    splat_value,
)

intrinsic: Any = _intrinsic  # its stub describes the function before it is decorated

_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_F32 = ir.FloatType()
_HAS_PERMUTE = get_host_cpu_features().get("avx512f", False)


@intrinsic
def gather(typingctx, table, indices):
    """Return ``table[indices]`` of a float32 array as ``Floats``."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return _gather(builder, data, args[1], _F32, "f32", 4)

    return floats(table, ints), generate


@intrinsic
def pick(typingctx, table, start, indices):
    """Return ``table[start + indices % 16]`` of a float32 array: a gather from one register."""

    def generate(context, builder, signature, args):
        if _HAS_PERMUTE:
            near = load_as(context, builder, signature, args, _F32)
            return call(builder, "llvm.x86.avx512.permvar.sf.512", many(_F32), [near, args[2]])
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        low = builder.and_(args[2], constant(_I32, LANES - 1))
        return _gather(builder, builder.gep(data, [args[1]]), low, _F32, "f32", 4)

    return floats(table, types.intp, ints), generate


@intrinsic
def pick_of_32(typingctx, table, start, indices):
    """Return ``table[start + indices % 32]`` of a float32 array: a gather from two registers."""

    def generate(context, builder, signature, args):
        array, start, indices = args
        if _HAS_PERMUTE:
            low, high = (
                load_as(context, builder, signature, [array, at], _F32)
                for at in (start, builder.add(start, _I64(LANES)))
            )
            name = "llvm.x86.avx512.vpermi2var.ps.512"
            return call(builder, name, many(_F32), [low, indices, high])
        low = builder.and_(indices, constant(_I32, 2 * LANES - 1))
        data = context.make_array(signature.args[0])(context, builder, array).data
        return _gather(builder, builder.gep(data, [start]), low, _F32, "f32", 4)

    return floats(table, types.intp, ints), generate


@intrinsic
def gather_bytes(typingctx, table, indices):
    """Return ``table[indices]`` of a uint8 array, which needs three bytes more at its end."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        found = _gather(builder, data, args[1], _I32, "i32", 1)
        return builder.and_(found, constant(_I32, 0xFF))

    return ints(table, ints), generate


def _gather(builder, data, indices, element, suffix, size):
    if _HAS_PERMUTE:  # with 32-bit offsets one instruction, else two
        name = {"f32": "dps", "i32": "dpi"}[suffix]
        data = builder.bitcast(data, _I8.as_pointer())
        arguments = [constant(element, 0), data, indices, constant(_I1, 1), _I32(size)]
        return call(builder, f"llvm.x86.avx512.mask.gather.{name}.512", many(element), arguments)
    wide = many(_I64)
    offsets = builder.mul(builder.zext(indices, wide), constant(_I64, size))
    start = splat_value(builder, builder.ptrtoint(data, _I64))
    pointers = builder.inttoptr(builder.add(start, offsets), many(element.as_pointer()))
    everywhere = constant(_I1, 1)
    default = ir.Constant(many(element), ir.Undefined)
    kind = ir.FunctionType(many(element), [pointers.type, _I32, everywhere.type, default.type])
    name = f"llvm.masked.gather.v16{suffix}.v16p0"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [pointers, _I32(size), everywhere, default])
