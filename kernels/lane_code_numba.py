# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Writes LLVM code with vectors of 16 lanes, for the kernels of ``attend_blocks_numba``.

Arguments and offsets are addresses and bytes: arrays would carry shapes and reference counts
through every call. Nothing is checked.
"""

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils

_HAS_PERMUTE = get_host_cpu_features().get("avx512f", False)
F32, I1, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(n) for n in (1, 8, 16, 32, 64))
LANES, MASK, CODES, INTS, LONGS = (ir.VectorType(kind, 16) for kind in (F32, I1, I8, I32, I64))

# 16 words of a plane that lie together, in bytes: their components in a row of queries, their
# factors, the first word; and twice their coefficients.
GROUP = np.dtype(
    [("source", "i8"), ("factor", "i8"), ("word", "i8"), ("none", "i8"), ("twice", "f4", 16)]
)
# 16 components of mid tokens: how many planes; how their codes are looked up; where their bits lie
# in a MID row, and in a turned token; the first cell of each in the table of refinements, whether
# it is refined, and what a bit of each plane adds to its cell.
CHUNK = np.dtype(
    [
        *((name, "i8") for name in ("planes", "kind", "high", "low", "shift")),
        *[("bits", "i8", 6), ("none", "i8", 5), ("starts", "i4", 16), ("ones", "i4", 16)],
        ("weights", "i4", (6, 16)),
    ]
)
# Kinds of look-up: all cells within 32 entries of the table; within 64; anywhere.
NEAR, WIDE, FAR = range(3)


def place_of(record: np.dtype, name: str) -> int:
    """Return where a field of a record starts, in bytes."""
    fields = record.fields
    assert fields is not None
    return int(fields[name][1])


_PLANES, _KIND, _HIGH, _LOW, _SHIFT, _BITS, _STARTS, _ONES, _WEIGHTS = (
    place_of(CHUNK, name) for name in CHUNK.names or () if name != "none"
)


class Code:
    """The LLVM code of one intrinsic: its arguments, loops and vectors of 16 float32."""

    def __init__(self, context, builder, signature, args):
        self.context, self.b, self.args = context, builder, args

    def load(self, kind, address, *offsets):
        """Return a value of a kind; the offsets are added to the address."""
        return self.b.load(self.pointer(kind, address, *offsets), align=1)

    def store(self, value, address, *offsets):
        """Write a value, and return what an intrinsic without result returns."""
        self.b.store(value, self.pointer(value.type, address, *offsets), align=1)
        return self.context.get_dummy_value()

    def pointer(self, kind, address, *offsets):
        """Return an address as a pointer."""
        for offset in offsets:
            offset = I64(offset) if isinstance(offset, int) else offset
            address = self.b.add(address, offset)
        return self.b.inttoptr(address, kind.as_pointer())

    def times(self, value, factor):
        """Return an int64 times a constant."""
        return self.b.mul(value, I64(factor))

    def splat(self, value):
        """Return 16 times one value."""
        nothing = ir.Constant(ir.VectorType(value.type, 16), ir.Undefined)
        first = self.b.insert_element(nothing, value, I32(0))
        return self.b.shuffle_vector(first, nothing, ir.Constant(INTS, [0] * 16))

    def loop(self, count, starts, body):
        """Return ``starts`` after ``body(i, values)`` has replaced them ``count`` times."""
        b = self.b
        before, inside = b.block, b.append_basic_block("inside")
        done = b.append_basic_block("done")
        b.cbranch(b.icmp_signed(">", count, I64(0)), inside, done)
        b.position_at_end(inside)
        i, values = b.phi(I64), [b.phi(start.type) for start in starts]
        new = body(i, values)
        after, last = b.add(i, I64(1)), b.block
        b.cbranch(b.icmp_signed("<", after, count), inside, done)
        b.position_at_end(done)
        ends = [b.phi(start.type) for start in starts]
        for phi, start, value in zip([i, *values], [I64(0), *starts], [after, *new], strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, last)
        for phi, start, value in zip(ends, starts, new, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, last)
        return ends

    def fold(self, vector, combine):
        """Return one value of 16, by halves."""
        for size in (8, 4, 2, 1):
            order = ir.Constant(INTS, [lane ^ size for lane in range(16)])
            vector = combine(vector, self.b.shuffle_vector(vector, vector, order))
        return self.b.extract_element(vector, I32(0))

    def mask(self, bits):
        """Return lanes by 16 bits."""
        return self.b.bitcast(bits, MASK)

    def quarter(self, bits, quarter):
        """Return lanes by 16 bits of a 64-bit mask."""
        return self.mask(self.b.trunc(self.b.lshr(bits, I64(16 * quarter)), I16))

    def call(self, name, result, *arguments):
        """Call a function of LLVM."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def add_product(self, total, x, y):
        """Return total + x * y, rounded once."""
        return self.call("llvm.fma.v16f32", LANES, x, y, total)

    def mid_steps(self, chunk, turned, place, table):
        """Return what 16 components of a mid token add to their base values.

        The codes of widths 0 to 2, or to 3, fit two or four registers of AVX-512, which permutes by
        index, so those need no look-up in memory.
        """
        b = self.b
        ones = self.load(INTS, chunk, _ONES)

        def add_plane(plane, cells):
            at = self.load(I64, chunk, _BITS, self.times(plane, 8))
            weights = self.load(INTS, chunk, _WEIGHTS, self.times(plane, 64))
            bits = self.mask(self.load(I16, turned, at))
            return [b.select(bits, b.add(cells[0], weights), cells[0])]

        starts = self.load(INTS, chunk, _STARTS)
        (cells,) = self.loop(self.load(I64, chunk, _PLANES), [starts], add_plane)
        high = self.load(I16, place, self.load(I64, chunk, _HIGH))
        low = self.load(I16, place, self.load(I64, chunk, _LOW))
        low = b.lshr(low, b.trunc(self.load(I64, chunk, _SHIFT), I16))
        cells = b.select(self.mask(high), b.add(cells, b.add(ones, ones)), cells)
        cells = b.select(self.mask(low), b.add(cells, ones), cells)
        if not _HAS_PERMUTE:
            return self.gather(cells, table)
        kind, ends = self.load(I64, chunk, _KIND), []
        near, other, wide, far, done = (b.append_basic_block() for _ in range(5))
        b.cbranch(b.icmp_signed("==", kind, I64(NEAR)), near, other)
        b.position_at_end(near)
        ends.append((self.permute(cells, table, 0), near))
        b.branch(done)
        b.position_at_end(other)
        b.cbranch(b.icmp_signed("==", kind, I64(WIDE)), wide, far)
        b.position_at_end(wide)
        above = b.icmp_signed(">=", cells, ir.Constant(INTS, [32] * 16))
        found = b.select(above, self.permute(cells, table, 128), self.permute(cells, table, 0))
        ends.append((found, wide))
        b.branch(done)
        b.position_at_end(far)
        ends.append((self.gather(cells, table), far))
        b.branch(done)
        b.position_at_end(done)
        found = b.phi(LANES)
        for value, block in ends:
            found.add_incoming(value, block)
        return found

    def permute(self, cells, table, offset):
        """Return entries of 32 from an offset on, by the low five bits."""
        low, high = self.load(LANES, table, offset), self.load(LANES, table, offset + 64)
        return self.call("llvm.x86.avx512.vpermi2var.ps.512", LANES, low, cells, high)

    def gather(self, cells, table):
        """Return entries of a table of any length."""
        b = self.b
        cells = b.shl(b.zext(cells, LONGS), ir.Constant(LONGS, [2] * 16))
        cells = b.inttoptr(b.add(self.splat(table), cells), ir.VectorType(F32.as_pointer(), 16))
        name, every = "llvm.masked.gather.v16f32.v16p0", ir.Constant(MASK, [1] * 16)
        return self.call(name, LANES, cells, I32(4), every, same(0.0))


def same(value):
    """Return 16 times a constant."""
    return ir.Constant(LANES, [value] * 16)
