"""What vectors do with words of bit planes and with masks, beside ``vectors_numba``.

A word is 64 bits, one per token. A mask is a word as uint64. Nothing is checked.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from kvstrata.kernels.vectors_numba import (
    LANES,
    call,
    floats,
    ints,
    lanes,
    load_as,
    many,
    pointer_to,
    splat_value,
    vector_function,
)

intrinsic: Any = _intrinsic  # its stub describes the function before it is decorated

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_BYTES, _LONGS = ir.VectorType(_I8, 64), ir.VectorType(_I64, 8)

shift_right = vector_function(
    ints, (ints, types.int32), lambda b, x, n: b.lshr(x, splat_value(b, n))
)
lanes_of = vector_function(
    lanes,
    (types.uint64, types.int64),
    lambda b, mask, first: b.bitcast(b.trunc(b.lshr(mask, first), _I16), many(_I1)),
)
add_where = vector_function(
    ints, (lanes, ints, ints), lambda b, where, x, y: b.select(where, b.add(x, y), x)
)
lowest_bit = vector_function(types.int64, (types.uint64,), lambda b, mask: b.cttz(mask, _I1(0)))


def _fold(step):
    """Return one step of a Hadamard transform: of lanes ``step`` apart, sum and difference."""
    order = ir.Constant(many(_I32), [lane ^ step for lane in range(LANES)])
    signs = ir.Constant(many(_F32), [-1.0 if lane & step else 1.0 for lane in range(LANES)])

    def build(builder, x):
        other = builder.shuffle_vector(x, x, order)
        return call(builder, "llvm.fma.v16f32", many(_F32), [x, signs, other])

    return vector_function(floats, (floats,), build)


fold_1, fold_2, fold_4, fold_8 = map(_fold, (1, 2, 4, 8))


@intrinsic
def load_codes(typingctx, array, index):
    """Return 16 integers of an int8 array as ``Floats``."""

    def generate(context, builder, signature, args):
        codes = load_as(context, builder, signature, args, _I8)
        return builder.sitofp(codes, many(_F32))

    return floats(array, types.intp), generate


@intrinsic
def item_of(typingctx, array, index):
    """Return ``array[index]``; an index below zero does not count from the end."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [args[1]]))

    return array.dtype(array, types.intp), generate


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of ``array[index]``, which may lie anywhere, even beyond the array."""

    def generate(context, builder, signature, args):
        place = pointer_to(context, builder, signature.args[0], args[0], args[1], _I8)
        hints = [_I32(0), _I32(3), _I32(1)]  # to read, into all caches, data
        kind = ir.FunctionType(ir.VoidType(), [place.type, *(hint.type for hint in hints)])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, *hints])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def load_bits(typingctx, array, index):
    """Return 16 bits of a uint8 array as ``Lanes``, from byte ``index`` on."""

    def generate(context, builder, signature, args):
        place = pointer_to(context, builder, signature.args[0], args[0], args[1], _I16)
        return builder.bitcast(builder.load(place, align=1), many(_I1))

    return lanes(array, types.intp), generate


@intrinsic
def copy_words(typingctx, source, start, count, target):
    """Copy words of an int64 array to the beginning of another."""

    def generate(context, builder, signature, args):
        places = [
            pointer_to(context, builder, kind, array, at, _I8)
            for kind, array, at in (
                (signature.args[3], args[3], _I64(0)),
                (signature.args[0], args[0], args[1]),
            )
        ]
        cgutils.raw_memcpy(builder, *places, args[2], _I64(8))
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target), generate


@intrinsic
def turn_eight(typingctx, words, start, target, to):
    """Write 64 bytes: bit i of byte t is bit t of word ``start`` + i, of an int64 array.

    The bytes of eight words are transposed, and within each 8 x 8 bits, by three rounds that swap
    halves (Hacker's Delight, 2nd edition, section 7-3).
    """
    order = [8 * w + k for k in range(8) for w in range(8)]

    def generate(context, builder, signature, args):
        place = pointer_to(context, builder, signature.args[0], args[0], args[1], _BYTES)
        raw = builder.load(place, align=8)
        raw = builder.shuffle_vector(raw, raw, ir.Constant(ir.VectorType(_I32, 64), order))
        x = builder.bitcast(raw, _LONGS)
        for shift, kept in (
            (7, 0x00AA00AA00AA00AA),
            (14, 0x0000CCCC0000CCCC),
            (28, 0x00000000F0F0F0F0),
        ):
            by, mask = (ir.Constant(_LONGS, [value] * 8) for value in (shift, kept))
            moved = builder.and_(builder.xor(x, builder.lshr(x, by)), mask)
            x = builder.xor(builder.xor(x, moved), builder.shl(moved, by))
        place = pointer_to(context, builder, signature.args[2], args[2], args[3], _BYTES)
        builder.store(builder.bitcast(x, _BYTES), place, align=1)
        return context.get_dummy_value()

    return types.void(words, types.intp, target, types.intp), generate
