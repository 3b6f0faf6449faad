"""What every test runs under: no GPU needed, no network, fixed seeds, no process left behind."""

import importlib
import importlib.util
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN_MARK = "KVSTRATA_TEST_RUN"

# Before anything imports torch, transformers or triton, and inherited by every process of the run.
os.environ[RUN_MARK] = uuid.uuid4().hex
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a module with @triton.jit is imported
if importlib.util.find_spec("tests.stack") is not None:
    pytest_plugins = ["tests.stack"]


def pytest_configure() -> None:
    """Heed interrupts, which a shell's background jobs ignore, in this process and its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _is_left_over(process: psutil.Process, children: set[psutil.Process]) -> bool:
    """Tell whether it is ours: a descendant, or marked as ours although its parent is gone."""
    try:
        return (
            process.pid != os.getpid()
            and process.status() != psutil.STATUS_ZOMBIE
            and (process in children or process.environ().get(RUN_MARK) == os.environ[RUN_MARK])
            and "resource_tracker" not in " ".join(process.cmdline())
        )
    except psutil.Error:  # ended meanwhile, or another user's
        return False


def _left_over() -> list[psutil.Process]:
    children = set(psutil.Process().children(recursive=True))
    return [process for process in psutil.process_iter() if _is_left_over(process, children)]


@pytest.fixture(scope="session", autouse=True)
def no_process_survives() -> Iterator[None]:
    """Fail the run, loudly, when something that it started is still alive at its end."""
    yield
    deadline = time.monotonic() + 10.0
    while (alive := _left_over()) and time.monotonic() < deadline:
        time.sleep(0.2)
    report = []
    for process in alive:
        try:
            report.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
        except psutil.Error:
            continue
    if report:
        pytest.fail("processes outlived the tests (killed now):\n" + "\n".join(report), False)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Give every test the same random numbers, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def short_tmp() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's address ends at 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvs", dir="/tmp") as folder:
        yield Path(folder)


class PoisonedTorch:
    """The torch module, except that fresh memory holds NaN (or the largest integer)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._poison(torch.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._poison(torch.empty_like(*args, **kwargs))

    def _poison(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.bool:
            return tensor.fill_(True)
        floating = tensor.is_floating_point() or tensor.is_complex()
        return tensor.fill_(float("nan") if floating else torch.iinfo(tensor.dtype).max)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tests/kernels, make an element that a kernel forgot to write visible."""
    if ROOT / "tests" / "kernels" not in request.path.parents:
        return
    room = importlib.import_module("kvstrata.kernels")
    for found in pkgutil.iter_modules(room.__path__):
        try:
            module = importlib.import_module(f"kvstrata.kernels.{found.name}")
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            continue
        if getattr(module, "torch", None) is torch:
            monkeypatch.setattr(module, "torch", PoisonedTorch())
    monkeypatch.setattr("kvstrata.kernels.huge_memory.LEAST_BYTES", sys.maxsize)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the rooms, so that no file of an earlier build gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOT.glob("*/__init__.py"):
        shutil.copytree(
            room.parent,
            source / room.parent.name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", out]
    done = subprocess.run([*build, source], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


class Environment:
    """A fresh virtual environment with the wheel.

    KVStrata comes from the wheel alone. Its dependencies come from the environment that runs the
    tests, through a ``.pth`` file, which adds a path without reading that environment's own
    ``.pth`` files: the editable install of the checkout stays out of reach.
    """

    def __init__(self, home: Path, wheel: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        self.bin = home / "bin"
        self.python = self.bin / "python"
        (self.site,) = home.glob("lib/python*/site-packages")
        self.pip("install", "--no-deps", "--no-index", wheel)
        (self.site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")

    def pip(self, *args: str | Path) -> None:
        command = [self.python, "-P", "-m", "pip", *args, "--disable-pip-version-check", "--quiet"]
        done = subprocess.run(command, cwd=self.site, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def new_wheel_venv(wheel: Path, tmp_path: Path) -> Environment:
    """An environment with the wheel that the test may change."""
    return Environment(tmp_path / "venv", wheel)


@pytest.fixture(scope="session")
def wheel_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel that tests share: ``.python``, ``.bin`` and ``.site``."""
    return Environment(tmp_path_factory.mktemp("wheel") / "venv", wheel)


@pytest.fixture(scope="session")
def run_outside(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a command in an empty folder, without this run's import paths; returns what it wrote."""
    folder = tmp_path_factory.mktemp("outside")

    def run(*command: str | Path, **env: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            command, cwd=folder, env=inherited | env, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
