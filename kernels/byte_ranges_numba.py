"""Ranges of bytes on a CPU: one loop over them, where Python takes half a microsecond for each.

Roofline: 1 byte read and 1 written per byte; ranges are some hundred bytes and lie in a cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.huge_memory import empty_huge
from kvstrata.kernels.vectors_numba import intrinsic, pointer_to

_BYTE = ir.IntType(8)


def join_ranges_numba(
    data: torch.Tensor, firsts: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Return ``join_ranges`` of checked ranges."""
    joined = empty_huge((int(sizes.sum()),), torch.uint8)
    parts = (firsts.contiguous().numpy(), sizes.contiguous().numpy())
    _join(data.contiguous().numpy(), *parts, joined.numpy())
    return joined


@intrinsic
def copy_bytes(typingctx, target, to, source, first, size):
    """Copy bytes between arrays that do not overlap; nothing is checked."""

    def generate(context, builder, signature, args):
        to_type, _, from_type, _, _ = signature.args
        to_array, to_index, from_array, from_index, count = args
        cgutils.raw_memcpy(
            builder,
            pointer_to(context, builder, to_type, to_array, to_index, _BYTE),
            pointer_to(context, builder, from_type, from_array, from_index, _BYTE),
            count,
            1,
        )
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), generate


@kernel(error_model="numpy")
def _join(data, firsts, sizes, joined):
    to = 0
    for i in range(firsts.size):
        first, size = firsts[i], sizes[i]
        copy_bytes(joined, to, data, first, size)
        to += size
