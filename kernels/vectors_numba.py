"""Vectors of 16 lanes for Numba kernels, as LLVM vectors: no loop depends on the auto-vectoriser.

``Floats`` is 16 x float32, ``Ints`` 16 x int32, ``Lanes`` 16 x bool. An AVX-512 machine keeps each
in one register; LLVM splits them elsewhere. Arrays must be one-dimensional and contiguous. Nothing
is bounds-checked, so callers check sizes first. Every operation is the one that IEEE 754 names, in
the order written: no fast-math, and ``multiply_add`` rounds once everywhere.

Arrays of bf16 are uint16, of fp16 int16 (see ``floats_numba``).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, llvm_version_info
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic as _intrinsic
from numba.extending import register_model

intrinsic: Any = _intrinsic  # its stub describes the function before it is decorated

LANES = 16


class VectorType(types.Type):
    """The Numba type of 16 values of one LLVM type."""

    def __init__(self, name, element):
        self.vector = ir.VectorType(element, LANES)
        super().__init__(name=name)


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """Keeps a vector in a register."""

    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, fe_type.vector)


_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32, _F16 = ir.FloatType(), ir.HalfType()
floats = VectorType("Floats", _F32)
ints = VectorType("Ints", _I32)
lanes = VectorType("Lanes", _I1)


def many(element):
    """Return the LLVM type of 16 elements."""
    return ir.VectorType(element, LANES)


def constant(element, value):
    """Return 16 times one constant."""
    return ir.Constant(many(element), [value] * LANES)


def splat_value(builder, value):
    """Return 16 times one value."""
    vector = ir.Constant(many(value.type), ir.Undefined)
    first = builder.insert_element(vector, value, _I32(0))
    return builder.shuffle_vector(first, vector, ir.Constant(many(_I32), [0] * LANES))


def pointer_to(context, builder, array_type, array, index, kind):
    """Return where an element of an array lies, as a pointer to a kind of LLVM value."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _pointer(context, builder, array_type, array, index, element):
    return pointer_to(context, builder, array_type, array, index, many(element))


def load_as(context, builder, signature, args, element):
    """Return 16 elements of a kind, from ``args[0][args[1]]`` on."""
    pointer = _pointer(context, builder, signature.args[0], args[0], args[1], element)
    loaded = builder.load(pointer)
    loaded.align = 1
    return loaded


def _store(context, builder, signature, args, value):
    pointer = _pointer(context, builder, signature.args[0], args[0], args[1], value.type.element)
    builder.store(value, pointer, align=1)
    return context.get_dummy_value()


def call(builder, name, result, arguments):
    """Return what an LLVM function returns."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def vector_function(result, operands, build):
    """Return an intrinsic of values of fixed types."""

    def generate(context, builder, signature, args):
        return build(builder, *args)

    if len(operands) == 1:

        @intrinsic
        def function(typingctx, a):
            return result(*operands), generate
    elif len(operands) == 2:

        @intrinsic
        def function(typingctx, a, b):
            return result(*operands), generate
    else:

        @intrinsic
        def function(typingctx, a, b, c):
            return result(*operands), generate

    return function


def _steps_from_zero(builder, x):
    """Return what reaches k where x >= k, and where -x > k: below zero the next smaller number."""
    bits = builder.bitcast(x, many(_I32))
    size = builder.and_(bits, constant(_I32, 0x7FFFFFFF))
    less = builder.ashr(bits, constant(_I32, 31))
    return builder.bitcast(builder.add(size, less), many(_F32))


def _signed(builder, x, signs):
    """Return x with its sign changed where the other is below zero, or -0."""
    kind = many(_I32)
    minus = builder.and_(builder.bitcast(signs, kind), constant(_I32, 1 << 31))
    return builder.bitcast(builder.xor(builder.bitcast(x, kind), minus), many(_F32))


def _folded(builder, x, combine):
    """Return the first lane after folding the vector in half four times."""
    for size in (8, 4, 2, 1):
        order = ir.Constant(many(_I32), [(lane + size) % LANES for lane in range(LANES)])
        x = combine(x, builder.shuffle_vector(x, x, order))
    return builder.extract_element(x, _I32(0))


def _largest(builder, x):
    return _folded(builder, x, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


_F, _I, _L = floats, ints, lanes
add = vector_function(_F, (_F, _F), lambda b, x, y: b.fadd(x, y))
subtract = vector_function(_F, (_F, _F), lambda b, x, y: b.fsub(x, y))
multiply = vector_function(_F, (_F, _F), lambda b, x, y: b.fmul(x, y))
divide = vector_function(_F, (_F, _F), lambda b, x, y: b.fdiv(x, y))
multiply_add = vector_function(
    _F, (_F, _F, _F), lambda b, x, y, z: call(b, "llvm.fma.v16f32", many(_F32), [x, y, z])
)
floor = vector_function(_F, (_F,), lambda b, x: call(b, "llvm.floor.v16f32", many(_F32), [x]))
absolute = vector_function(_F, (_F,), lambda b, x: call(b, "llvm.fabs.v16f32", many(_F32), [x]))
larger = vector_function(_F, (_F, _F), lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
smaller = vector_function(_F, (_F, _F), lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
signed = vector_function(_F, (_F, _F), _signed)
reaches = vector_function(_L, (_F, _F), lambda b, x, y: b.fcmp_ordered(">=", x, y))
choose = vector_function(_F, (_L, _F, _F), lambda b, m, x, y: b.select(m, x, y))
choose_ints = vector_function(_I, (_L, _I, _I), lambda b, m, x, y: b.select(m, x, y))
count_up = vector_function(
    _I, (_I, _L), lambda b, x, m: b.select(m, b.add(x, constant(_I32, 1)), x)
)
steps_from_zero = vector_function(_F, (_F,), lambda b, x: _steps_from_zero(b, x))
add_ints = vector_function(_I, (_I, _I), lambda b, x, y: b.add(x, y))
both = vector_function(_I, (_I, _I), lambda b, x, y: b.and_(x, y))
flip = vector_function(_I, (_I, _I), lambda b, x, y: b.xor(x, y))
shift_left = vector_function(_I, (_I, types.int32), lambda b, x, n: b.shl(x, splat_value(b, n)))
as_floats = vector_function(_F, (_I,), lambda b, x: b.bitcast(x, many(_F32)))
to_floats = vector_function(_F, (_I,), lambda b, x: b.sitofp(x, many(_F32)))
to_ints = vector_function(_I, (_F,), lambda b, x: b.fptosi(x, many(_I32)))
largest_lane = vector_function(types.float32, (_F,), _largest)
sum_lanes = vector_function(types.float32, (_F,), lambda b, x: _folded(b, x, b.fadd))
splat = vector_function(_F, (types.float32,), lambda b, x: splat_value(b, x))
splat_int = vector_function(_I, (types.int32,), lambda b, x: splat_value(b, x))
has_bits = vector_function(
    _L, (_I, _I), lambda b, x, y: b.icmp_signed("!=", b.and_(x, y), constant(_I32, 0))
)
word_of = vector_function(types.uint64, (_L,), lambda b, m: b.zext(b.bitcast(m, _I16), _I64))
ones_of = vector_function(
    _I, (types.uint16,), lambda b, bits: b.zext(b.bitcast(bits, many(_I1)), many(_I32))
)


@intrinsic
def load(typingctx, array, index):
    """Return 16 numbers from ``array[index]`` on as ``Floats``: float32, uint16 or int16."""
    kind = array.dtype

    def generate(context, builder, signature, args):
        if kind == types.float32:
            return load_as(context, builder, signature, args, _F32)
        if kind == types.uint16:
            wide = builder.zext(load_as(context, builder, signature, args, _I16), many(_I32))
            return builder.bitcast(builder.shl(wide, constant(_I32, 16)), many(_F32))
        return builder.fpext(load_as(context, builder, signature, args, _F16), many(_F32))

    return floats(array, types.intp), generate


@intrinsic
def splat_at(typingctx, array, index):
    """Return one float32 of an array 16 times."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return splat_value(builder, builder.load(builder.gep(data, [args[1]])))

    return floats(array, types.intp), generate


@intrinsic
def load_ints(typingctx, array, index):
    """Return 16 integers of an int32 or uint8 array as ``Ints``."""
    kind = array.dtype

    def generate(context, builder, signature, args):
        if kind == types.uint8:
            return builder.zext(load_as(context, builder, signature, args, _I8), many(_I32))
        return load_as(context, builder, signature, args, _I32)

    return ints(array, types.intp), generate


@intrinsic
def load_halves(typingctx, array, index, high):
    """Return the low or (``high`` != 0) high 32 bits of 16 words of an int64 array."""

    def generate(context, builder, signature, args):
        pair = ir.VectorType(_I32, 2 * LANES)
        words = builder.bitcast(load_as(context, builder, signature, args, _I64), pair)
        low, high = (
            builder.shuffle_vector(
                words, words, ir.Constant(many(_I32), [2 * lane + half for lane in range(LANES)])
            )
            for half in range(2)
        )
        return builder.select(builder.icmp_signed("!=", args[2], _I32(0)), high, low)

    return ints(array, types.intp, types.int32), generate


@intrinsic
def store_ints(typingctx, array, index, vector):
    """Write 16 int32 from ``array[index]`` on."""

    def generate(context, builder, signature, args):
        return _store(context, builder, signature, args, args[2])

    return types.void(array, types.intp, ints), generate


@intrinsic
def store(typingctx, array, index, vector):
    """Write 16 numbers from ``array[index]`` on, rounded to its format, half to even."""
    kind = array.dtype

    def generate(context, builder, signature, args):
        return _store(context, builder, signature, args, narrowed(builder, args[2], kind))

    return types.void(array, types.intp, floats), generate


def narrowed(builder, value, kind):
    """Return 16 float32 as what an array of ``kind`` holds, rounded half to even."""
    if kind == types.uint16:
        return _narrow_bfloat(builder, value)
    if kind == types.int16:
        return builder.bitcast(builder.fptrunc(value, many(_F16)), many(_I16))
    return value


class _BFloat(ir.Type):
    """The LLVM type that llvmlite does not name."""

    def _to_string(self):
        return "bfloat"


_BF16 = _BFloat()  # one object: it equals itself alone

_CPU_FEATURES = get_host_cpu_features()
HAS_PAIRS = bool(_CPU_FEATURES.get("avx512bf16", False) and _CPU_FEATURES.get("avx512vl", False))


def _narrow_bfloat(builder, value):
    if HAS_PAIRS:  # one instruction; elsewhere LLVM would call a function that is not there
        return builder.bitcast(builder.fptrunc(value, many(_BF16)), many(_I16))
    bits = builder.bitcast(value, many(_I32))
    high = builder.lshr(bits, constant(_I32, 16))
    odd = builder.and_(high, constant(_I32, 1))
    rounded = builder.add(bits, builder.add(odd, constant(_I32, 0x7FFF)))
    quiet = builder.or_(high, constant(_I32, 0x40))
    chosen = builder.select(
        builder.fcmp_unordered("uno", value, value),
        quiet,
        builder.lshr(rounded, constant(_I32, 16)),
    )
    return builder.trunc(chosen, many(_I16))


@intrinsic
def splat_pair_at(typingctx, array, index):
    """Return two neighbours of an array of bf16, the first in the low half, 16 times."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), _I32.as_pointer())
        pair = builder.load(pointer)
        pair.align = 2
        return splat_value(builder, pair)

    return ints(array, types.intp), generate


@intrinsic
def add_pairs(typingctx, total, x, y):
    """Return total + x * y of 16 pairs of bf16, where ``HAS_PAIRS``; tiny numbers count as 0."""

    def generate(context, builder, signature, args):
        pairs = ir.VectorType(_BF16, 2 * LANES)
        kind = pairs if llvm_version_info[0] >= 16 else many(_I32)
        x, y = (builder.bitcast(pair, kind) for pair in args[1:])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return call(builder, name, many(_F32), [args[0], x, y])

    return floats(floats, ints, ints), generate


@intrinsic
def transpose_tile(typingctx, source, start, row, target, at, step):
    """Write 16 x 16 numbers transposed, as float32: rows ``row`` apart to rows ``step`` apart."""
    load_signature, load_one = load._defn(typingctx, source, start)

    def generate(context, builder, signature, args):
        starts = [builder.add(args[1], builder.mul(args[2], _I64(r))) for r in range(LANES)]
        rows = [load_one(context, builder, load_signature, [args[0], i]) for i in starts]
        for c, column in enumerate(transposed(builder, rows)):
            index = builder.add(args[4], builder.mul(args[5], _I64(c)))
            pointer = _pointer(context, builder, signature.args[3], args[3], index, _F32)
            builder.store(column, pointer, align=1)
        return context.get_dummy_value()

    index = types.intp
    return types.void(source, index, index, target, index, index), generate


def transposed(builder, rows):
    """Return the columns of 16 vectors, by four rounds of swapping blocks between pairs."""
    for size in (8, 4, 2, 1):
        first = [i if not i & size else LANES + i - size for i in range(LANES)]
        second = [i + size if not i & size else LANES + i for i in range(LANES)]
        swapped = list(rows)
        for r in range(LANES):
            if not r & size:
                a, b = rows[r], rows[r + size]
                swapped[r] = builder.shuffle_vector(a, b, ir.Constant(many(_I32), first))
                swapped[r + size] = builder.shuffle_vector(a, b, ir.Constant(many(_I32), second))
        rows = swapped
    return rows


def sums_and_differences(rows, add, subtract):
    """Return the Hadamard transform over rows, a power of two of them: neighbours first."""
    rows, step = list(rows), 1
    while step < len(rows):
        for i in range(len(rows)):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = add(a, b), subtract(a, b)
        step *= 2
    return rows
