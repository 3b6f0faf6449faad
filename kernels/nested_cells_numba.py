"""The fallback codec's inner steps of encoding on whole registers: transpose, turn, square, code.

Values lie transposed while they are turned, one row per channel and a lane per token, so that every
step of the Hadamard transform, and every sum over channels, adds whole rows in the order of the
reference. Nothing is checked, see ``vectors_numba``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

from llvmlite import ir
from numba import types

from kvstrata.kernels.quantize import THRESHOLDS
from kvstrata.kernels.vectors_numba import (
    LANES,
    call,
    constant,
    floats,
    intrinsic,
    ints,
    lanes,
    many,
    pointer_to,
    sums_and_differences,
    transposed,
    vector_function,
)

CHUNK = 64
_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
_F32 = ir.FloatType()
_BYTES = ir.VectorType(_I8, CHUNK)
# Borders of cells lie on halves, so twice a size exceeds a border where its next integer does.
_BORDERS = [int(2 * border) for border in THRESHOLDS]
_SIGN_CODE = 8


def _clamped(builder, x, least, most):
    for bound, sign in ((least, "<"), (most, ">")):
        beyond = builder.icmp_signed(sign, x, constant(_I32, bound))
        x = builder.select(beyond, constant(_I32, bound), x)
    return x


square_root = vector_function(
    floats, (floats,), lambda b, x: call(b, "llvm.sqrt.v16f32", many(_F32), [x])
)
bits_of_floats = vector_function(ints, (floats,), lambda b, x: b.bitcast(x, many(_I32)))
exceeds = vector_function(lanes, (floats, floats), lambda b, x, y: b.fcmp_ordered(">", x, y))
clamp_bytes = vector_function(ints, (ints,), lambda b, x: _clamped(b, x, 0, 255))


def _place(context, builder, signature, args, which, at, vector):
    return pointer_to(context, builder, signature.args[which], args[which], at, vector)


def _row(context, builder, signature, args, which, at):
    place = _place(context, builder, signature, args, which, at, many(_F32))
    return builder.load(place, align=1)


def _write(context, builder, signature, args, which, at, value):
    place = _place(context, builder, signature, args, which, at, value.type)
    builder.store(value, place, align=1)


def _steps(builder, first, step, count):
    return [builder.add(first, builder.mul(step, _I64(i))) for i in range(count)]


def _turned(builder, rows):
    return sums_and_differences(rows, builder.fadd, builder.fsub)


def _low_turner(size):
    @intrinsic
    def turn(typingctx, source, start, apart, target, at, row):
        """Write ``size`` channels of 16 tokens ``apart`` turned, as rows of tokens."""

        def generate(context, builder, signature, args):
            starts = _steps(builder, args[1], args[2], LANES)
            rows = [_row(context, builder, signature, args, 0, i) for i in starts]
            turned = _turned(builder, transposed(builder, rows)[:size])
            for to, one in zip(_steps(builder, args[4], args[5], size), turned, strict=True):
                _write(context, builder, signature, args, 3, to, one)
            return context.get_dummy_value()

        i = types.intp
        return types.void(source, i, i, target, i, i), generate

    return turn


turn_low_8, turn_low_16 = map(_low_turner, (8, 16))


def _high_turner(radix):
    @intrinsic
    def turn(typingctx, rows, at, apart, unit, squares, to):
        """Turn ``radix`` rows ``apart`` in place, times ``unit``; write the sum of their squares.

        The squares' halves are added until one is left.
        """

        def generate(context, builder, signature, args):
            places = _steps(builder, args[1], args[2], radix)
            found = [_row(context, builder, signature, args, 0, place) for place in places]
            scaled = [builder.fmul(one, args[3]) for one in _turned(builder, found)]
            for place, one in zip(places, scaled, strict=True):
                _write(context, builder, signature, args, 0, place, one)
            sums = [builder.fmul(one, one) for one in scaled]
            while len(sums) > 1:
                half = len(sums) // 2
                halves = zip(sums[:half], sums[half:], strict=True)
                sums = [builder.fadd(low, high) for low, high in halves]
            _write(context, builder, signature, args, 4, args[5], sums[0])
            return context.get_dummy_value()

        i = types.intp
        return types.void(rows, i, i, floats, squares, i), generate

    return turn


turn_high_1, turn_high_2, turn_high_4, turn_high_8, turn_high_16 = map(
    _high_turner, (1, 2, 4, 8, 16)
)


@intrinsic
def store_cells(typingctx, source, at, factors, p, codes, to):
    """Write codes of 64 float32, times 64 factors: the sign, then how many borders they exceed."""

    def generate(context, builder, signature, args):
        sizes, signs = [], []
        for part in range(0, CHUNK, LANES):
            value, factor = (
                _row(context, builder, signature, args, i, builder.add(args[i + 1], _I64(part)))
                for i in (0, 2)
            )
            scaled = builder.fmul(value, factor)
            signs.append(builder.fcmp_ordered("<", scaled, constant(_F32, 0)))
            size = call(builder, "llvm.fabs.v16f32", many(_F32), [scaled])
            size = builder.fadd(size, size)
            less = builder.fcmp_ordered("<", size, constant(_F32, 255))
            size = builder.select(less, size, constant(_F32, 255))
            size = call(builder, "llvm.ceil.v16f32", many(_F32), [size])
            sizes.append(builder.trunc(builder.fptosi(size, many(_I32)), many(_I8)))
        size, sign = (_joined(builder, parts) for parts in (sizes, signs))
        code = builder.select(sign, _bytes(_SIGN_CODE), _bytes(0))
        for border in _BORDERS:
            beyond = builder.icmp_unsigned(">", size, _bytes(border))
            code = builder.select(beyond, builder.add(code, _bytes(1)), code)
        _write(context, builder, signature, args, 4, args[5], code)
        return context.get_dummy_value()

    i = types.intp
    return types.void(source, i, factors, i, codes, i), generate


@intrinsic
def fetch_ahead(typingctx, array, index):
    """Ask for an element to be in second-level cache soon; it may lie beyond the array."""

    def generate(context, builder, signature, args):
        place = _place(context, builder, signature, args, 0, args[1], _I8)
        arguments = [place, _I32(0), _I32(2), _I32(1)]  # to read, for the second level, data
        call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def store_low_bytes(typingctx, codes, at, vector):
    """Write the lowest byte of each of 16 float32."""

    def generate(context, builder, signature, args):
        value = builder.trunc(builder.bitcast(args[2], many(_I32)), many(_I8))
        _write(context, builder, signature, args, 0, args[1], value)
        return context.get_dummy_value()

    return types.void(codes, types.intp, floats), generate


@intrinsic
def store_bytes(typingctx, codes, at, vector):
    """Write the lowest byte of each of 16 integers."""

    def generate(context, builder, signature, args):
        value = builder.trunc(args[2], many(_I8))
        _write(context, builder, signature, args, 0, args[1], value)
        return context.get_dummy_value()

    return types.void(codes, types.intp, ints), generate


def _bytes(value):
    return ir.Constant(_BYTES, [value] * CHUNK)


def _joined(builder, parts):
    """Return the elements of four vectors as one."""
    while len(parts) > 1:
        order = list(range(2 * parts[0].type.count))
        order = ir.Constant(ir.VectorType(_I32, len(order)), order)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(*pair, order) for pair in pairs]
    return parts[0]
