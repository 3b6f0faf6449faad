# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What ``attend_blocks_numba`` does with the 64 tokens of a block, or with one, as LLVM code.

Arguments are addresses unless they are called mask, factor or the like, as in
``attend_lanes_numba``. Nothing is checked.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvstrata.kernels.lane_code_numba import (
    CODES,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    Code,
    same,
)

_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453
_EIGHT, _EIGHT_FLOATS = ir.VectorType(I8, 8), ir.VectorType(F32, 8)
_nothing, _integer, _word, _single = types.void, types.int64, types.uint64, types.float32


def _reader(result, kind):
    """Return an intrinsic that reads one value; integers below 64 bits have no sign."""

    @intrinsic
    def read(typingctx, address):
        def generate(*call):
            code = Code(*call)
            value = code.load(kind, code.args[0])
            is_narrow = isinstance(kind, ir.IntType) and kind.width < 64
            return code.b.zext(value, I64) if is_narrow else value

        return result(_integer), generate

    return read


integer_at, word_at, byte_at = _reader(_integer, I64), _reader(_word, I64), _reader(_integer, I8)
single_at = _reader(_single, F32)


@intrinsic
def brain_float_at(typingctx, address):
    """Return a bf16."""

    def generate(*call):
        code = Code(*call)
        bits = code.b.zext(code.load(I16, code.args[0]), I32)
        return code.b.bitcast(code.b.shl(bits, I32(16)), F32)

    return _single(_integer), generate


def _writer(kind):
    @intrinsic
    def write(typingctx, address, value):
        def generate(*call):
            code = Code(*call)
            return code.store(code.args[1], code.args[0])

        return _nothing(_integer, kind), generate

    return write


put_integer, put_single = _writer(_integer), _writer(_single)


@intrinsic
def lowest_bit(typingctx, mask):
    """Return the number of zeros below the lowest bit that is set."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], I1(1))

    return _integer(_word), generate


@intrinsic
def copy_words(typingctx, source, target, count):
    """Copy ``count`` words of 64 bits."""

    def generate(*call):
        code = Code(*call)
        source, target, count = code.args

        def copy(i, _):
            at = code.times(i, 8)
            code.store(code.load(I64, source, at), target, at)
            return []

        code.loop(count, [], copy)
        return code.context.get_dummy_value()

    return _nothing(_integer, _integer, _integer), generate


@intrinsic
def spread(typingctx, row, value):
    """Write one number 64 times."""

    def generate(*call):
        code = Code(*call)
        value = code.splat(code.args[1])
        for quarter in range(4):
            code.store(value, code.args[0], 64 * quarter)
        return code.context.get_dummy_value()

    return _nothing(_integer, _single), generate


@intrinsic
def largest_of(typingctx, scores, mask):
    """Replace those of 64 scores whose bit is not set by -inf, and return the largest."""

    def generate(*call):
        code = Code(*call)

        def larger(x, y):
            return code.b.select(code.b.fcmp_ordered(">", x, y), x, y)

        quarters = []
        for quarter in range(4):
            lanes = code.quarter(code.args[1], quarter)
            old = code.load(LANES, code.args[0], 64 * quarter)
            quarters.append(code.b.select(lanes, old, same(float("-inf"))))
            code.store(quarters[-1], code.args[0], 64 * quarter)
        return code.fold(larger(larger(*quarters[:2]), larger(*quarters[2:])), larger)

    return _single(_integer, _word), generate


@intrinsic
def exponentials(typingctx, scores, largest):
    """Replace 64 scores by exp(score - largest) and return their sum; 3 in 10 million off.

    2^n 2^f with |f| <= 1/2 and the Taylor polynomial of degree 6. What is below e^-60 becomes 0:
    it does not count beside 1, and its products would be slow denormal numbers.
    """

    def generate(*call):
        code = Code(*call)
        b, scores, sums = code.b, code.args[0], []
        for quarter in range(4):
            x = b.fsub(code.load(LANES, scores, 64 * quarter), code.splat(code.args[1]))
            counts = b.fcmp_ordered(">", x, same(-60.0))
            x = b.select(counts, x, same(0.0))
            n = code.add_product(same(0.5), x, same(_LOG2E))
            n = code.call("llvm.floor.v16f32", LANES, n)
            f = b.fsub(b.fmul(x, same(_LOG2E)), n)
            f = b.fmul(f, same(_LN2))
            p = same(1 / 720)
            for term in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
                p = code.add_product(same(term), p, f)
            power = b.add(b.fptosi(n, INTS), ir.Constant(INTS, [127] * 16))
            power = b.bitcast(b.shl(power, ir.Constant(INTS, [23] * 16)), LANES)
            weight = b.select(counts, b.fmul(p, power), same(0.0))
            code.store(weight, scores, 64 * quarter)
            sums.append(weight)
        return code.fold(b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3])), b.fadd)

    return _single(_integer, _single), generate


@intrinsic
def keep(typingctx, row, mask):
    """Replace those of 64 numbers whose bit is not set by zero."""

    def generate(*call):
        code = Code(*call)
        for quarter in range(4):
            lanes = code.quarter(code.args[1], quarter)
            old = code.load(LANES, code.args[0], 64 * quarter)
            code.store(code.b.select(lanes, old, same(0.0)), code.args[0], 64 * quarter)
        return code.context.get_dummy_value()

    return _nothing(_integer, _word), generate


@intrinsic
def sum_of(typingctx, row, mask):
    """Return the sum of those of 64 numbers whose bit is set."""

    def generate(*call):
        code, total = Code(*call), same(0.0)
        for quarter in range(4):
            lanes = code.quarter(code.args[1], quarter)
            row = code.load(LANES, code.args[0], 64 * quarter)
            total = code.b.select(lanes, code.b.fadd(total, row), total)
        return code.fold(total, code.b.fadd)

    return _single(_integer, _word), generate


@intrinsic
def read_nibbles(typingctx, place, step, count, target):
    """Write (code - 8) * step of 8 * ``count`` bytes: their low halves, then their high halves."""

    def generate(*call):
        code = Code(*call)
        b, (place, step, count, target) = code.b, code.args
        factor = ir.Constant(_EIGHT_FLOATS, ir.Undefined)
        for lane in range(8):
            factor = b.insert_element(factor, step, I32(lane))
        least = ir.Constant(_EIGHT, [8] * 8)

        def read(i, _):
            packed = code.load(_EIGHT, place, code.times(i, 8))
            low = b.and_(packed, ir.Constant(_EIGHT, [15] * 8))
            high = b.lshr(packed, ir.Constant(_EIGHT, [4] * 8))
            for part, at in ((low, _zero(count)), (high, code.times(count, 32))):
                number = b.sitofp(b.sub(part, least), _EIGHT_FLOATS)
                code.store(b.fmul(number, factor), target, code.times(i, 32), at)
            return []

        code.loop(count, [], read)
        return code.context.get_dummy_value()

    return _nothing(_integer, _single, _integer, _integer), generate


def _zero(like):
    return like.type(0)


@intrinsic
def read_escape(typingctx, place, factor, count, target):
    """Write 16 * ``count`` int8 codes times a factor, after four steps of a Hadamard transform."""

    def generate(*call):
        code = Code(*call)
        place, factor, count, target = code.args
        factor = code.splat(factor)

        def turn(i, _):
            codes = code.load(CODES, place, code.times(i, 16))
            code.store(
                _turn_sixteen(code, code.b.fmul(code.b.sitofp(codes, LANES), factor)),
                target,
                code.times(i, 64),
            )
            return []

        code.loop(count, [], turn)
        return code.context.get_dummy_value()

    return _nothing(_integer, _single, _integer, _integer), generate


def _turn_sixteen(code, x):
    for step in (1, 2, 4, 8):
        order = ir.Constant(INTS, [lane ^ step for lane in range(16)])
        signs = ir.Constant(LANES, [-1.0 if lane & step else 1.0 for lane in range(16)])
        x = code.add_product(code.b.shuffle_vector(x, x, order), x, signs)
    return x


@intrinsic
def turn_sixteens(typingctx, row, factor, count):
    """Multiply 16 * ``count`` numbers and take four steps of a Hadamard transform."""

    def generate(*call):
        code = Code(*call)
        row, factor, count = code.args
        factor = code.splat(factor)

        def turn(i, _):
            x = code.b.fmul(code.load(LANES, row, code.times(i, 64)), factor)
            code.store(_turn_sixteen(code, x), row, code.times(i, 64))
            return []

        code.loop(count, [], turn)
        return code.context.get_dummy_value()

    return _nothing(_integer, _single, _integer), generate


@intrinsic
def turn_pair(typingctx, low, high):
    """Replace 16 numbers and 16 others by their sum and difference."""

    def generate(*call):
        code = Code(*call)
        x, y = (code.load(LANES, address) for address in code.args)
        code.store(code.b.fadd(x, y), code.args[0])
        return code.store(code.b.fsub(x, y), code.args[1])

    return _nothing(_integer, _integer), generate


@intrinsic
def turn_back_pairs(typingctx, low, high, cos, sin, half, count, target):
    """Turn 16 * ``count`` rotary pairs back; ``half`` is the length of half a row of angles."""

    def generate(*call):
        code = Code(*call)
        low, high, cos, sin, half, count, target = code.args

        def turn(i, _):
            at = code.times(i, 64)
            x, y = code.load(LANES, low, at), code.load(LANES, high, at)
            first = code.b.fmul(y, code.load(LANES, sin, at))
            first = code.add_product(first, x, code.load(LANES, cos, at))
            second = code.b.fmul(y, code.load(LANES, cos, at, half))
            product = code.b.fmul(x, code.load(LANES, sin, at, half))
            code.store(first, target, at)
            code.store(code.b.fsub(second, product), target, at, half)
            return []

        code.loop(count, [], turn)
        return code.context.get_dummy_value()

    i = _integer
    return _nothing(i, i, i, i, i, i, i), generate
