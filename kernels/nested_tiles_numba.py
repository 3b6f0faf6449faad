"""The fallback codec's inner steps on whole registers: unpack, turn, transpose, scale, store.

A chunk is 64 packed bytes, which hold the codes of four units (``nested_layout``). Levels fit int8
and any sum of 256 of them int16, so the Hadamard transform of 16 tokens takes one addition of
integers per step and vector, exact in whatever order; they become floats last, in rows of channels.
Nothing is checked, see ``vectors_numba``.

Results that no cache holds are written past all caches (``streamed``): a store then costs memory
one write instead of a read and a write, if lines are written whole and one after the other. Such
places must be multiples of 64 bytes, of float32 128.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types

from kvstrata.kernels.vectors_numba import (
    LANES,
    call,
    floats,
    intrinsic,
    many,
    narrowed,
    pointer_to,
    splat_value,
    sums_and_differences,
)

CHUNK = 64
MAX_TILE = 32  # channels that a tile turns in registers
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_BYTES, _WORDS = ir.VectorType(_I8, CHUNK), ir.VectorType(_I16, CHUNK // 2)
_FEATURES = get_host_cpu_features()
_UNITS = 4


def _order(indices):
    return ir.Constant(ir.VectorType(_I32, len(indices)), list(indices))


def _pick(builder, x, first, count):
    """Return elements ``first`` to ``first + count`` of a vector; beyond its end any."""
    order = [i % x.type.count for i in range(first, first + count)]
    return builder.shuffle_vector(x, x, _order(order))


def _joined(builder, parts):
    """Return the elements of 2 ** n vectors as one."""
    while len(parts) > 1:
        order = _order(range(2 * parts[0].type.count))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(*pair, order) for pair in pairs]
    return parts[0]


def _load(context, builder, kind, array, at, vector):
    return builder.load(pointer_to(context, builder, kind, array, at, vector), align=1)


def _write(context, builder, kind, array, at, value, streamed):
    place = pointer_to(context, builder, kind, array, at, value.type)
    size = value.type.count * value.type.element.get_abi_size(context.target_data)
    written = builder.store(value, place, align=size if streamed else 1)
    if streamed:
        mark = builder.module.add_metadata([ir.Constant(_I32, 1)])
        written.set_metadata("nontemporal", mark)


def _look_up(builder, table, codes):
    """Return the entries of a table of 16 bytes, which each 16 bytes of ``table`` repeat."""
    for feature, name, size in (
        ("avx512bw", "llvm.x86.avx512.pshuf.b.512", 64),
        ("avx2", "llvm.x86.avx2.pshuf.b", 32),
        ("ssse3", "llvm.x86.ssse3.pshuf.b.128", 16),
    ):
        if _FEATURES.get(feature, False):
            parts = [
                call(
                    builder,
                    name,
                    ir.VectorType(_I8, size),
                    [_pick(builder, table, at, size), _pick(builder, codes, at, size)],
                )
                for at in range(0, CHUNK, size)
            ]
            return _joined(builder, parts)
    found = ir.Constant(_BYTES, [0] * CHUNK)
    for code in range(16):
        same = builder.icmp_unsigned("==", codes, ir.Constant(_BYTES, [code] * CHUNK))
        entry = builder.shuffle_vector(table, table, _order([code] * CHUNK))
        found = builder.select(same, entry, found)
    return found


def _nibbles(builder, high, low):
    """Return pairs of bits of two chunks joined: units 0 and 2, then units 1 and 3."""

    def bits(x, mask):
        return builder.and_(x, ir.Constant(_WORDS, [mask] * (CHUNK // 2)))

    two = ir.Constant(_WORDS, [2] * (CHUNK // 2))
    even = builder.or_(builder.shl(bits(high, 0x3333), two), bits(low, 0x3333))
    odd = builder.or_(bits(high, 0xCCCC), builder.lshr(bits(low, 0xCCCC), two))
    return even, odd


def _codes(builder, nibbles, unit):
    """Return one unit's 64 codes below 16, two in each word."""
    pairs = nibbles[unit % 2]
    if unit >= 2:
        pairs = builder.lshr(pairs, ir.Constant(_WORDS, [4] * (CHUNK // 2)))
    return builder.and_(pairs, ir.Constant(_WORDS, [0x0F0F] * (CHUNK // 2)))


def _turned(builder, rows):
    return sums_and_differences(rows, builder.add, builder.sub)


def _unpacker(radix):
    @intrinsic
    def unpack(typingctx, base, b, mid, m, apart, table, units, to, unit_size):
        """Write the levels of ``radix`` chunks ``apart``, turned by as many, int16 by unit.

        ``table`` holds 16 levels as int8, ``mid`` may be of zeros.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            levels = _load(context, builder, kinds[5], args[5], _I64(0), many(_I8))
            levels = builder.shuffle_vector(levels, levels, _order([*range(LANES)] * 4))
            chunks = []
            for row in range(radix):
                far = builder.mul(args[4], _I64(row))
                pairs = [
                    _load(
                        context, builder, kinds[i], args[i], builder.add(args[i + 1], far), _WORDS
                    )
                    for i in (0, 2)
                ]
                chunks.append(_nibbles(builder, *pairs))
            for unit in range(_UNITS):
                rows = []
                for nibbles in chunks:
                    codes = builder.bitcast(_codes(builder, nibbles, unit), _BYTES)
                    found = _look_up(builder, levels, codes)
                    rows.append(
                        [
                            builder.sext(_pick(builder, found, at, CHUNK // 2), _WORDS)
                            for at in (0, CHUNK // 2)
                        ]
                    )
                start = builder.add(args[7], builder.mul(args[8], _I64(unit)))
                for half in range(2):
                    for row, done in enumerate(_turned(builder, [both[half] for both in rows])):
                        far = builder.add(start, builder.mul(args[4], _I64(row)))
                        at = builder.add(far, _I64(half * CHUNK // 2))
                        _write(context, builder, kinds[6], args[6], at, done, False)
            return context.get_dummy_value()

        i = types.intp
        return types.void(base, i, mid, i, i, table, units, i, i), generate

    return unpack


unpack_1, unpack_2, unpack_4, unpack_8 = map(_unpacker, (1, 2, 4, 8))


def _transposed(builder, rows):
    """Return 16 rows of ``len(rows)`` int16 of 8, 16 or 32 rows of 16.

    Three rounds interleave rows i and i + 4 of eight within 128 bits, so each of them moves the
    highest bit of a row's number to the lowest place of a column's.
    """
    low = [i % 8 // 2 + (i // 8) * 8 + (i % 2) * LANES for i in range(LANES)]
    high = [i + 4 for i in low]
    eighths = []
    for first in range(0, len(rows), 8):
        part = rows[first : first + 8]
        for _ in range(3):
            part = [
                builder.shuffle_vector(part[i], part[i + 4], _order(order))
                for i in range(4)
                for order in (low, high)
            ]
        eighths.append(part)
    columns = []
    for half in (0, 8):
        for column in range(8):
            parts = [_pick(builder, part[column], half, 8) for part in eighths]
            columns.append(_joined(builder, parts))
    return columns


def _turner(size):
    @intrinsic
    def turn(typingctx, units, at, row, factors, f, out, to, apart):
        """Turn ``size`` rows of 16 int16; write columns times their factors, ``apart``."""

        def generate(context, builder, signature, args):
            kinds = signature.args
            rows = [
                _load(
                    context,
                    builder,
                    kinds[0],
                    args[0],
                    builder.add(args[1], builder.mul(args[2], _I64(i))),
                    many(_I16),
                )
                for i in range(size)
            ]
            for lane, column in enumerate(_transposed(builder, _turned(builder, rows))):
                f = builder.add(args[4], _I64(lane))
                place = pointer_to(context, builder, kinds[3], args[3], f, _F32)
                factor = builder.load(place)
                place = builder.add(args[6], builder.mul(args[7], _I64(lane)))
                scale = splat_value(builder, factor)
                for part in range(0, size, LANES):
                    some = builder.sext(_pick(builder, column, part, LANES), many(_I32))
                    scaled = builder.fmul(builder.sitofp(some, many(_F32)), scale)
                    value = narrowed(builder, scaled, kinds[5].dtype)
                    if size < LANES:
                        value = _pick(builder, value, 0, size)
                    spot = builder.add(place, _I64(part))
                    _write(context, builder, kinds[5], args[5], spot, value, False)
            return context.get_dummy_value()

        i = types.intp
        return types.void(units, i, i, factors, i, out, i, i), generate

    return turn


turn_8, turn_16, turn_32 = map(_turner, (8, 16, 32))


def _mover(streamed):
    @intrinsic
    def move(typingctx, source, at, target, to):
        """Copy 32 elements from ``source[at]`` to ``target[to]``."""

        def generate(context, builder, signature, args):
            kind = signature.args[0]
            element = context.get_value_type(kind.dtype)
            vector = ir.VectorType(element, CHUNK // 2)
            value = _load(context, builder, kind, args[0], args[1], vector)
            _write(context, builder, signature.args[2], args[2], args[3], value, streamed)
            return context.get_dummy_value()

        return types.void(source, types.intp, target, types.intp), generate

    return move


move, move_streamed = map(_mover, (False, True))


def _stepper(streamed):
    @intrinsic
    def step(typingctx, base, b, mid, m, bits, c, w, minimum, steps, p, out, to, unit_size):
        """Write minimum + step x code of the 5-bit codes of a chunk, unit by unit."""

        def generate(context, builder, signature, args):
            kinds = signature.args
            pairs = [
                _load(context, builder, kinds[i], args[i], args[i + 1], _WORDS) for i in (0, 2)
            ]
            nibbles = _nibbles(builder, *pairs)
            last = _load(context, builder, kinds[4], args[4], args[5], _WORDS)
            shift = builder.trunc(args[6], _I16)
            first = ir.Constant(_WORDS, ir.Undefined)
            by = builder.insert_element(first, shift, _I32(0))
            last = builder.lshr(last, builder.shuffle_vector(by, first, _order([0] * 32)))
            starts = [builder.add(args[9], _I64(part)) for part in range(0, CHUNK, LANES)]
            minima, sizes = (
                [_load(context, builder, kinds[i], args[i], at, many(_F32)) for at in starts]
                for i in (7, 8)
            )
            for unit in range(_UNITS):
                codes = _codes(builder, nibbles, unit)
                codes = builder.shl(codes, ir.Constant(_WORDS, [1] * 32))
                rest = builder.lshr(last, ir.Constant(_WORDS, [2 * unit] * 32))
                rest = builder.and_(rest, ir.Constant(_WORDS, [0x0101] * 32))
                codes = builder.bitcast(builder.or_(codes, rest), _BYTES)
                start = builder.add(args[11], builder.mul(args[12], _I64(unit)))
                for part in range(_UNITS):
                    some = _pick(builder, codes, part * LANES, LANES)
                    numbers = builder.sitofp(builder.zext(some, many(_I32)), many(_F32))
                    # Five bits times the eleven of fp16 are exact, so only the sum is rounded.
                    terms = [numbers, sizes[part], minima[part]]
                    value = call(builder, "llvm.fma.v16f32", many(_F32), terms)
                    value = narrowed(builder, value, kinds[10].dtype)
                    at = builder.add(start, _I64(part * LANES))
                    _write(context, builder, kinds[10], args[10], at, value, streamed)
            return context.get_dummy_value()

        i = types.intp
        return types.void(base, i, mid, i, bits, i, i, minimum, steps, i, out, i, i), generate

    return step


step_codes, step_codes_streamed = _stepper(False), _stepper(True)


@intrinsic
def load_fp16(typingctx, record, at):
    """Return 16 fp16 numbers from a byte on, which may be odd, of a uint8 array, as ``Floats``."""

    def generate(context, builder, signature, args):
        bits = _load(context, builder, signature.args[0], args[0], args[1], many(ir.HalfType()))
        return builder.fpext(bits, many(_F32))

    return floats(record, types.intp), generate


@intrinsic
def splat_fp16(typingctx, record, at):
    """Return one fp16 number, from a byte on that may be odd, 16 times."""

    def generate(context, builder, signature, args):
        place = pointer_to(context, builder, signature.args[0], args[0], args[1], ir.HalfType())
        return splat_value(builder, builder.fpext(builder.load(place, align=1), _F32))

    return floats(record, types.intp), generate


@intrinsic
def bytes_at(typingctx, address, count):
    """Return a uint8 array of ``count`` bytes at an address; its owner must live on."""
    kind = types.Array(types.uint8, 1, "C")

    def generate(context, builder, signature, args):
        array = context.make_array(kind)(context, builder)
        data = builder.inttoptr(args[0], array.data.type)
        context.populate_array(
            array, data=data, shape=[args[1]], strides=[_I64(1)], itemsize=_I64(1), meminfo=None
        )
        return array._getvalue()

    return kind(types.int64, types.intp), generate


@intrinsic
def wait_for_stores(typingctx):
    """Return when what was streamed is in memory for other threads to see."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
