"""Compile the AOT cases of kernel modules and print what the code costs, as JSON.

A program of its own, because Triton's interpreter, which the tests run under, patches Triton's
language for the whole process:

    python -P compile_ahead.py cuda:90,hip:gfx942/few kvstrata.kernels.colsum_triton some/file.py

With ``/few`` only the last case of each kernel, which is its largest, is compiled.

It prints one object per module, target and case. A failure is an object with an ``error``.
"""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kvstrata.kernels.aot import AotCase

# A load of 16 bytes or more per thread: plain, or asynchronous into shared memory.
WIDE_PTX = re.compile(
    r"\bld\.global\S*\.(v4\.[bfus]32|v2\.[bfus]64|v8\.[bfus]32|v4\.[bfus]64|b128)\b"
    r"|\bcp\.async\.c[ag]\.shared\S*\.global\S*[^;]*, (0x10|16)\b"
    r"|\bcp\.async\.bulk\."
)
FEW = "/few"
WIDE_AMD = re.compile(r"\b(global|buffer)_load_(dwordx4|b128)\b")


def load(name: str) -> ModuleType:
    """Import a module by its dotted name, or a file that ends in ``.py``."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_target(text: str) -> GPUTarget:
    backend, _, arch = text.partition(":")
    return GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)


def compile_case(case: AotCase, target: GPUTarget) -> CompiledKernel:
    names = list(case.kernel.arg_names)
    constexprs = dict(case.constexprs) | dict.fromkeys(case.ones, 1)
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    signature |= dict.fromkeys(case.ones, "constexpr")
    missing = [n for n in names if signature[n] == "constexpr" and n not in constexprs]
    unknown = sorted({*case.signature, *case.constexprs, *case.divisible, *case.ones} - {*names})
    if missing or unknown:
        raise ValueError(f"arguments without type or value: {missing}; no arguments: {unknown}")
    aligned = [
        index
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in case.divisible
    ]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    num_warps = case.num_warps
    if target.backend == "hip" and case.num_warps_amd is not None:
        num_warps = case.num_warps_amd
    options = {"num_warps": num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=target, options=options)


def nvidia_registers(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread and bytes of stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, f"cuobjdump does not say how many registers: {text}"
    return int(usage[1]), int(usage[2])


def amd_registers(assembly: str) -> tuple[int, int]:
    """Return vector registers per thread and spilled registers, scalar ones included."""

    def count(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found is not None, f"the metadata of the assembly lacks .{key}"
        return int(found[1])

    return count("vgpr_count"), count("vgpr_spill_count") + count("sgpr_spill_count")


def measure(case: AotCase, target: GPUTarget) -> dict[str, Any]:
    compiled = compile_case(case, target)
    if target.backend == "cuda":
        registers, spilled = nvidia_registers(compiled.asm["cubin"])
        wide = WIDE_PTX.search(compiled.asm["ptx"]) is not None
    else:
        registers, spilled = amd_registers(compiled.asm["amdgcn"])
        wide = WIDE_AMD.search(compiled.asm["amdgcn"]) is not None
    return {
        "registers": registers,
        "spilled": spilled,
        "shared_bytes": compiled.metadata.shared,
        "wide": wide,
        "max_registers": case.max_registers,
        "max_shared_bytes": case.max_shared_bytes,
        "wide_loads": case.wide_loads,
    }


def last_of_each_kernel(cases: tuple[AotCase, ...]) -> tuple[AotCase, ...]:
    """Return, in order, the last case of each kernel."""
    return tuple({case.kernel: case for case in cases}.values())


def rows(name: str, targets: list[str]) -> Iterator[dict[str, Any]]:
    try:
        cases: tuple[AotCase, ...] = load(name).AOT
    except Exception:
        for told in targets:
            target = told.removesuffix(FEW)
            yield {"target": target, "case": "(import)", "error": traceback.format_exc(limit=-6)}
        return
    for told in targets:
        target = told.removesuffix(FEW)
        for case in last_of_each_kernel(cases) if told.endswith(FEW) else cases:
            kernel = getattr(case.kernel, "__name__", "")
            row: dict[str, Any] = {"target": target, "case": case.name, "kernel": kernel}
            try:
                row |= measure(case, parse_target(target))
            except Exception:
                row["error"] = traceback.format_exc(limit=-6)
            yield row


def main() -> None:
    targets = sys.argv[1].split(",")
    for name in sys.argv[2:]:
        for row in rows(name, targets):
            print(json.dumps({"module": name} | row), flush=True)


if __name__ == "__main__":
    main()
