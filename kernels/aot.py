"""What is compiled ahead of time from a GPU kernel, and what the compiled code may cost.

Each ``*_triton.py`` states its cases in a tuple named ``AOT``; ``tests/kernels/test_aot.py``
compiles them for every supported GPU, without one, and reads their cost off the machine code. This
module imports no compiler, so whatever reads the cases needs none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel and the limits that its compiled code must keep.

    Spilled registers are never allowed, so no field allows them.

    Attributes:
        name: Unique within its module, e.g. ``"bf16_dim64"``.
        kernel: The ``triton.jit`` function.
        signature: Type of each argument that is not a constant, in Triton's spelling: ``"*bf16"``,
            ``"*u8"``, ``"i64"``, ``"fp32"``. Pointers are taken to be 16-byte aligned.
        constexprs: Value of each ``tl.constexpr`` argument.
        num_warps: Warps per program; a warp is 32 threads on NVIDIA, 64 on AMD.
        num_warps_amd: Warps on AMD where they differ.
        max_registers: Most registers per thread (vector registers on AMD, accumulators included).
        max_shared_bytes: Most shared memory (LDS on AMD) per program, in bytes.
        wide_loads: Whether the code must load 16 bytes per thread and instruction somewhere. False
            suits only kernels whose reads are scattered or tiny.
        num_stages: Depth of the software pipeline of loops with dots.
        divisible: Integer arguments (strides, lengths) that are multiples of 16 in every call.
        ones: Integer arguments that are 1 in every call, which Triton turns into constants.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_warps_amd: int | None = None
    max_registers: int = 128
    max_shared_bytes: int = 48 * 1024
    wide_loads: bool = True
    num_stages: int = 2
    divisible: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
