"""Number formats for Numba kernels: bf16 and fp16 read as float32 and rounded back, and bit casts.

numpy knows no bf16 and Numba computes no fp16, so a kernel sees their bits: bf16 as uint16, fp16 as
int16, fp32 as float32 (``as_numpy``). ``to_float`` and ``from_float`` look at that type when they
compile, so one source serves three dtypes, each with straight vector code.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload


def as_numpy(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    """Return the memory of a CPU tensor in the form that the kernels read; nothing is copied."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


@intrinsic
def _bits_of(typingctx, value):
    """Return the bits of a float32 as int32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _float_of(typingctx, bits):
    """Return the float32 with these bits, an int32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _half_widened(typingctx, bits):
    def generate(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _half_narrowed(typingctx, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


# Seen from outside, an intrinsic lacks the first parameter that its definition has.
bits_of: Any = _bits_of
float_of: Any = _float_of
_widen_half: Any = _half_widened
_narrow_half: Any = _half_narrowed


@njit(nogil=True)
def _narrow_bfloat(value):
    bits = np.uint32(bits_of(value))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    chosen = (bits | np.uint32(0x400000)) if is_nan else rounded
    return np.uint16(chosen >> np.uint32(16))


def to_float(value):
    """Return an element of an ``as_numpy`` array as float32, exactly."""
    raise NotImplementedError("for compiled code only")


@overload(to_float)
def _to_float(value):
    if isinstance(value, types.Float):
        return lambda value: np.float32(value)
    if value == types.uint16:
        return lambda value: float_of(np.int32(np.uint32(value) << np.uint32(16)))
    if value == types.int16:
        return lambda value: _widen_half(value)
    return None


def from_float(value, like):
    """Return a float32 rounded to the format of ``like``, half to even; NaN stays NaN."""
    raise NotImplementedError("for compiled code only")


@overload(from_float)
def _from_float(value, like):
    if isinstance(like, types.Float):
        return lambda value, like: value
    if like == types.uint16:
        return lambda value, like: _narrow_bfloat(value)
    if like == types.int16:
        return lambda value, like: _narrow_half(value)
    return None
