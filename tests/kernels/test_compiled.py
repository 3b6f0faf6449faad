"""Machine code on disk is used again, and only as long as its sources are what they were."""

import importlib
import os
import pkgutil
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvstrata.kernels
from kvstrata.kernels.compiled import digest_of, kernel

FILES = {
    "first_numba.py": "from kvstrata.kernels.second_numba import two\n",
    "second_numba.py": "from kvstrata.kernels.third import three\n",
    "third.py": "from kvstrata.kernels.fourth import four\nthree = 3\n",
    "fourth.py": "four = 4\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def digest(folder: Path) -> str:
    digest_of.cache_clear()
    return digest_of(folder / "first_numba.py")


@pytest.mark.parametrize(
    ("name", "is_seen"),
    [(name, name != "fourth.py") for name in FILES],
)
def test_code_is_old_when_what_it_has_compiled_in_changed(
    folder: Path, name: str, is_seen: bool
) -> None:
    """A module that is no kernel gives constants of its own, not what it imports."""
    before, stat = digest(folder), (folder / name).stat()
    (folder / name).write_text(FILES[name].replace("import", "import ", 1) + "#")
    os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (digest(folder) != before) is is_seen


def test_code_is_not_old_because_files_were_copied(folder: Path) -> None:
    before = digest(folder)
    for name in FILES:
        os.utime(folder / name, (1, 1))
    assert digest(folder) == before


def test_an_import_that_is_not_there_is_left_out(folder: Path) -> None:
    (folder / "third.py").unlink()
    assert digest(folder)


def test_every_kernel_with_code_on_disk_goes_by_its_sources() -> None:
    found = []
    for info in pkgutil.iter_modules(kvstrata.kernels.__path__):
        if info.name.endswith("_numba"):
            module = importlib.import_module(f"kvstrata.kernels.{info.name}")
            found += [
                (f"{info.name}.{name}", value._cache)
                for name, value in vars(module).items()
                if hasattr(value, "py_func") and type(value._cache).__name__ != "NullCache"
            ]
    assert len(found) > 40
    by_stamp = [name for name, cache in found if type(cache).__name__ == "FunctionCache"]
    assert by_stamp == [], "kernels that Numba's own cache looks after"


def test_a_second_process_would_load_what_the_first_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))

    def twice(x: int) -> int:
        return 2 * x

    first, second = kernel()(twice), kernel()(twice)
    assert first(3) == second(3) == 6
    assert sum(first.stats.cache_misses.values()) == 1
    assert sum(second.stats.cache_hits.values()) == 1


def test_code_for_types_that_are_gone_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index names the types of arguments, which another release may have had elsewhere."""
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))

    def add(pair: Any) -> Any:
        return pair.first + pair.second

    def pairs_of(name: str) -> dict[str, Any]:
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        module.__dict__["Pair"] = namedtuple("Pair", "first second", module=name)
        return module.__dict__

    before, after = pairs_of("pairs_before"), pairs_of("pairs_after")
    assert kernel()(add)(before["Pair"](1, 2)) == 3
    del before["Pair"]
    compiled, loaded = kernel()(add), kernel()(add)
    assert compiled(after["Pair"](1, 2)) == loaded(after["Pair"](1, 2)) == 3
    assert sum(compiled.stats.cache_misses.values()) == 1
    assert sum(loaded.stats.cache_hits.values()) == 1
