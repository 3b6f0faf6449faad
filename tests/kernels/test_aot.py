"""Every GPU kernel compiles for every GPU that we name, within the cost that it states.

No GPU is needed. A clean process compiles (``compile_ahead.py``), because this one interprets.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from kvstrata.kernels.aot import AotCase

HERE = Path(__file__).resolve().parent
ROOM = HERE.parents[1] / "kernels"
MODULES = sorted(path.stem for path in ROOM.glob("*_triton.py"))
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
# Every case of every kernel with `make aot`; otherwise the largest of every kernel.
WHOLE = os.environ.get("KVSTRATA_AOT") == "all"
MAX_CHILDREN = 2
TIME_LIMIT_S = 540

Row = dict[str, Any]
Compile = Callable[..., list[Row]]


@pytest.fixture(scope="module")
def compile_ahead(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile modules for targets in clean processes; returns one row per case."""
    if importlib.util.find_spec("triton") is None:
        pytest.fail("GPU kernels cannot be compiled: install triton (pip install -e '.[dev]')")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    def child(targets: str, modules: list[str]) -> list[Row]:
        command = [sys.executable, "-P", HERE / "compile_ahead.py", targets, *modules]
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def run(modules: list[str], targets: tuple[str, ...] = TARGETS) -> list[Row]:
        shares = [",".join(targets[start::MAX_CHILDREN]) for start in range(MAX_CHILDREN)]
        with ThreadPoolExecutor(MAX_CHILDREN) as pool:
            done = pool.map(lambda share: child(share, modules), [s for s in shares if s])
            return [row for rows in done for row in rows]

    return run


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, compile_ahead: Compile) -> list[Row]:
    """Everything that the selected tests ask for, compiled once."""
    asked = {
        item.callspec.params["module"]
        for item in request.session.items
        if hasattr(item, "callspec") and "compiled" in getattr(item, "fixturenames", ())
    }
    targets = TARGETS if WHOLE else tuple(f"{target}/few" for target in TARGETS)
    return compile_ahead([f"kvstrata.kernels.{module}" for module in sorted(asked)], targets)


def faults(row: Row) -> list[str]:
    """Say what is wrong with a compiled case; nothing, if it keeps its limits."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spilled"]:
        found.append(f"spills {row['spilled']}")
    if row["registers"] > row["max_registers"]:
        found.append(f"{row['registers']} registers, limit {row['max_registers']}")
    if row["shared_bytes"] > row["max_shared_bytes"]:
        found.append(f"{row['shared_bytes']} bytes shared, limit {row['max_shared_bytes']}")
    if row["wide_loads"] and not row["wide"]:
        found.append("no 16-byte load")
    return found


@pytest.mark.timeout(TIME_LIMIT_S + 60)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", MODULES)
def test_every_case_compiles_within_its_limits(
    module: str, target: str, compiled: list[Row], record_property: Callable[[str, object], None]
) -> None:
    rows = [r for r in compiled if r["module"].endswith(f".{module}") and r["target"] == target]
    assert rows, f"{module} has no AOT cases"
    names = [row["case"] for row in rows]
    assert len(names) == len(set(names)), f"{module}: two AOT cases have one name: {names}"
    kernels = {r["kernel"] for r in compiled if r["module"] == rows[0]["module"]}
    assert {r["kernel"] for r in rows} == kernels
    for row in rows:
        limits = {"error", "max_registers", "max_shared_bytes", "wide_loads"}
        record_property(row["case"], {k: v for k, v in row.items() if k not in limits})
    broken = [f"{row['case']}: {'; '.join(found)}" for row in rows if (found := faults(row))]
    assert not broken, f"{module} on {target}:\n" + "\n".join(broken)


POOR_KERNELS = '''
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase


@triton.jit
def strided_copy(source, target, n, step: tl.constexpr, size: tl.constexpr):
    """Loads one element at a time: neighbours are ``step`` apart."""
    i = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(target + i, tl.load(source + i * step, mask=i < n), mask=i < n)


@triton.jit
def hoard(source, target, size: tl.constexpr):
    """Keeps a matrix in the registers of one warp."""
    i = tl.arange(0, size)
    grid = tl.load(source + i[:, None] * size + i[None, :])
    for _ in range(3):
        grid += tl.sum(grid, 0)[None, :] * tl.sum(grid, 1)[:, None]
    tl.store(target + i[:, None] * size + i[None, :], grid)


@triton.jit
def product(source, target, size: tl.constexpr):
    """Multiplies a matrix by itself: the operands pass through shared memory."""
    i = tl.arange(0, size)
    grid = tl.load(source + i[:, None] * size + i[None, :])
    tl.store(target + i[:, None] * size + i[None, :], tl.dot(grid, grid))


COPY = {"source": "*fp32", "target": "*fp32", "n": "i32"}
GRIDS = {"source": "*fp32", "target": "*fp32"}
HALVES = {"source": "*fp16", "target": "*fp32"}
AOT = (
    AotCase("fine", strided_copy, COPY, {"step": 1, "size": 1024}, divisible=("n",)),
    AotCase("narrow", strided_copy, COPY, {"step": 5, "size": 1024}),
    AotCase("narrow_but_said", strided_copy, COPY, {"step": 5, "size": 1024}, wide_loads=False),
    AotCase("spilling", hoard, GRIDS, {"size": 256}, num_warps=32),
    AotCase("greedy", hoard, GRIDS, {"size": 32}, num_warps=1, max_registers=32),
    AotCase("sharing", product, HALVES, {"size": 64}, max_shared_bytes=1024),
    AotCase("misspelt", strided_copy, COPY, {"stride": 5, "size": 1024}),
)
'''


@pytest.mark.timeout(120)
def test_a_poor_kernel_is_found_out(compile_ahead: Compile, tmp_path: Path) -> None:
    path = tmp_path / "poor.py"
    path.write_text(POOR_KERNELS)
    empty = tmp_path / "empty.py"
    empty.write_text("")
    rows = compile_ahead([str(path), str(empty)], ("cuda:90", "hip:gfx942"))
    said = {(row["target"], row["case"]): " ".join(faults(row)) for row in rows}
    for target in ("cuda:90", "hip:gfx942"):
        assert said[target, "fine"] == ""
        assert said[target, "narrow"] == "no 16-byte load"
        assert said[target, "narrow_but_said"] == ""
        assert "registers, limit 32" in said[target, "greedy"]
        assert "bytes shared, limit 1024" in said[target, "sharing"]
        assert "arguments without type or value: ['step']" in said[target, "misspelt"]
        assert "no arguments: ['stride']" in said[target, "misspelt"]
        assert "AOT" in said[target, "(import)"]
    assert "spills" in said["cuda:90", "spilling"]


def test_a_case_is_frozen_and_needs_no_compiler() -> None:
    case = AotCase("copy", kernel=None, signature={"source": "*bf16"})
    with pytest.raises(FrozenInstanceError):
        case.name = "other"  # type: ignore[misc]
    loaded = "import sys, kvstrata.kernels.aot; print({'triton', 'numba'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", loaded], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
