"""What threads that share memory need in Numba kernels: addresses, counters, waiting."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="no-untyped-def,misc"

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import populate_array

from kvstrata.kernels.compiled import called
from kvstrata.kernels.vectors_numba import intrinsic

_I64 = ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_HAS_PAUSE = platform.machine() in ("x86_64", "AMD64")
_SPINS = 4000  # about 50 microseconds, then others may have the processor


@intrinsic
def array_at(typingctx, address, number):
    """Return the numbers of a type from an address on, as an array; nobody knows how many."""
    kind = types.Array(number.dtype, 1, "C")

    def generate(context, builder, signature, args):
        array = context.make_array(kind)(context, builder)
        item = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        data = builder.inttoptr(args[0], context.get_data_type(kind.dtype).as_pointer())
        size, step = _I64(1 << 40), _I64(item)
        populate_array(array, data, [size], [step], step, None)
        return array._getvalue()

    return kind(types.int64, number), generate


def _place(context, builder, signature, args):
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def add_at(typingctx, counters, index, number):
    """Add to an int64 that other threads add to, and return what it was."""

    def generate(context, builder, signature, args):
        place = _place(context, builder, signature, args)
        return builder.atomic_rmw("add", place, args[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), generate


@intrinsic
def read_at(typingctx, counters, index):
    """Return an int64 that other threads write; what they wrote before is seen as well."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(_place(context, builder, signature, args), "acquire", 8)

    return types.int64(counters, types.int64), generate


@intrinsic
def call_at(typingctx, address):
    """Return the result of a C function at an address, ``int f(void)``."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        found = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.sext(found, _I64)

    return types.int64(types.int64), generate


@intrinsic
def call_with(typingctx, address, argument):
    """Call a C function at an address, ``void f(void *)``."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_POINTER])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [builder.inttoptr(args[1], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _pause(typingctx):
    def generate(context, builder, signature, args):
        if _HAS_PAUSE:
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@called
def wait_for(counters, index, least, give_way):
    """Wait until a counter has reached a number; ``give_way`` is the address of sched_yield."""
    spins = 0
    while read_at(counters, index) < least:
        _pause()
        spins += 1
        if spins > _SPINS:
            call_at(give_way)
