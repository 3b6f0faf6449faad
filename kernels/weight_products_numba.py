"""Products of few rows with a weight in oneDNN's blocked layout, a block of outputs at a time.

The layout is that of ``BlockedWeight``. Weights and rows are int32 for pairs of bf16 (AVX512-BF16),
or float32; a ``depth`` counts these.
Each sum is added up in one order, so that a row's numbers do not depend on how many rows there are,
or which.

Roofline: a weight is read once for up to eight rows, so up to about that many rows it is memory
that bounds the product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvstrata.kernels.compiled import called
from kvstrata.kernels.vectors_numba import (
    LANES,
    add_pairs,
    floats,
    intrinsic,
    ints,
    load_as,
    many,
    pointer_to,
    splat_value,
)

_I32, _F32 = ir.IntType(32), ir.FloatType()


def _tile(num_rows, num_vectors):
    """Return what multiplies so many rows by 16 times so many outputs; all sums in registers."""

    @intrinsic
    def run(typingctx, x, at, row, packed, start, line, depth, out, to, step):
        is_pairs = packed.dtype == types.int32
        element = _I32 if is_pairs else _F32
        _, pairs = add_pairs._defn(typingctx, floats, ints, ints)

        def generate(context, builder, signature, args):
            x, at, row, packed, start, line, depth, out, to, step = args
            x_type, packed_type, out_type = (signature.args[i] for i in (0, 3, 7))
            zero = ir.Constant(many(_F32), [0.0] * LANES)
            sums = [
                [cgutils.alloca_once_value(builder, zero) for _ in range(num_vectors)]
                for _ in range(num_rows)
            ]
            for each in sums:
                for one in each:
                    builder.store(zero, one)
            size = at.type
            with cgutils.for_range(builder, depth, intp=size) as loop:
                place = builder.add(start, builder.mul(loop.index, line))
                weights = [
                    load_as(
                        context,
                        builder,
                        packed_type(packed_type),
                        [packed, builder.add(place, size(v * LANES))],
                        element,
                    )
                    for v in range(num_vectors)
                ]
                for r in range(num_rows):
                    where = builder.add(builder.add(at, loop.index), builder.mul(row, size(r)))
                    one = builder.load(pointer_to(context, builder, x_type, x, where, element))
                    factor = splat_value(builder, one)
                    for v in range(num_vectors):
                        total = builder.load(sums[r][v])
                        if is_pairs:
                            total = pairs(context, builder, None, [total, factor, weights[v]])
                        else:
                            total = _fma(builder, factor, weights[v], total)
                        builder.store(total, sums[r][v])
            for r in range(num_rows):
                for v in range(num_vectors):
                    where = builder.add(
                        to, builder.add(builder.mul(step, size(r)), size(v * LANES))
                    )
                    pointer = pointer_to(context, builder, out_type, out, where, many(_F32))
                    builder.store(builder.load(sums[r][v]), pointer, align=4)
            return context.get_dummy_value()

        index = types.intp
        kinds = (x, index, index, packed, index, index, index, out, index, index)
        return types.void(*kinds), generate

    return run


def _fma(builder, a, b, c):
    kind = ir.FunctionType(many(_F32), [many(_F32)] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")
    return builder.call(function, [a, b, c])


def _tiles(num_vectors):
    """Return what multiplies any number of rows by as many vectors of outputs."""
    one, two, four = (_tile(count, num_vectors) for count in (1, 2, 4))
    half = min(num_vectors, 2)
    eight = _tile(8, half)

    @called
    def run(x, row, count, packed, start, line, depth, out, to, step):
        at = 0
        while count >= 8:
            for v in range(0, num_vectors, half):
                there, where = start + v * LANES, to + v * LANES
                eight(x, at, row, packed, there, line, depth, out, where, step)
            at, to, count = at + 8 * row, to + 8 * step, count - 8
        if count >= 4:
            four(x, at, row, packed, start, line, depth, out, to, step)
            at, to, count = at + 4 * row, to + 4 * step, count - 4
        if count >= 2:
            two(x, at, row, packed, start, line, depth, out, to, step)
            at, to, count = at + 2 * row, to + 2 * step, count - 2
        if count == 1:
            one(x, at, row, packed, start, line, depth, out, to, step)

    return run


_narrow, _middle, _wide = map(_tiles, (1, 2, 4))


@called
def multiply_block(x, row, count, packed, block, width, depth, out, to, step):
    """Write ``count`` rows times one block of outputs.

    Args:
        x: int32 or float32, rows.
        row: From one row to the next.
        count: Rows.
        packed: Likewise, the weight.
        block: Which block.
        width: Outputs of a block: 16, 32 or 64.
        depth: Of the weight.
        out: float32.
        to: Where the first row's ``width`` numbers are written.
        step: From one row's to the next's.
    """
    start = block * depth * width
    if width == 4 * LANES:
        _wide(x, row, count, packed, start, width, depth, out, to, step)
    elif width == 2 * LANES:
        _middle(x, row, count, packed, start, width, depth, out, to, step)
    else:
        _narrow(x, row, count, packed, start, width, depth, out, to, step)
