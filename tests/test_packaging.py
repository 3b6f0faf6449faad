"""The wheel holds every room and nothing else, and lives beside Hugging Face's `kernels`."""

import csv
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Environment
from tests.test_rooms import ROOMS, ROOT

CONTENT = ("*.py", "*.pyi", "*.proto", "py.typed")
FIND_ROOMS = f"""
from importlib.util import find_spec
specs = filter(None, map(find_spec, {sorted(ROOMS)!r}))
found = [str(spec.origin or list(spec.submodule_search_locations)) for spec in specs]
print([origin for origin in found if not origin.endswith("site-packages/kernels/__init__.py")])
"""


def test_pyproject_lists_exactly_the_rooms_on_disk():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert tool["packages"] == [f"kvstrata.{room}" for room in rooms]
    assert tool["package-dir"] == {f"kvstrata.{room}": room for room in rooms}


@pytest.mark.parametrize("cwd", ["elsewhere", "checkout"])
def test_no_room_has_a_bare_name(cwd: str, run_outside: Callable[..., str], tmp_path: Path):
    script = f"import os; os.chdir({str(ROOT if cwd == 'checkout' else tmp_path)!r}); {FIND_ROOMS}"
    assert run_outside(sys.executable, "-P", "-c", script) == "[]\n"


def test_the_store_and_the_client_never_load_torch(run_outside: Callable[..., str]):
    script = """
import sys, kvstrata.client.kvstrata, kvstrata.client.kvctl
print(sorted({"numpy", "ray", "torch", "transformers"} & set(sys.modules)))
import kvstrata.kvstore_service.command, kvstrata.kvstore_service.server
print(sorted({"ray", "torch", "transformers"} & set(sys.modules)))
"""
    assert run_outside(sys.executable, "-P", "-c", script) == "[]\n[]\n"


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel: Path):
    on_disk = {
        f"kvstrata/{path.relative_to(ROOT)}"
        for room in ROOMS
        for pattern in (*CONTENT, "profiles/*", "gates/*")
        for path in (ROOT / room).glob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert in_wheel == on_disk
    assert {f"kvstrata/{room}/py.typed" for room in ROOMS} <= in_wheel


def _installed_files(environment: Environment, project: str) -> set[str]:
    (record,) = environment.site.glob(f"{project}-*.dist-info/RECORD")
    return {row[0] for row in csv.reader(record.read_text().splitlines())}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_lives_beside_the_package_kernels(
    new_wheel_venv: Environment, run_outside: Callable[..., str]
):
    environment = new_wheel_venv
    try:
        environment.pip("install", "--no-deps", "-c", ROOT / "constraints.txt", "kernels")
    except AssertionError as error:
        pytest.fail(f"this test installs `kernels` from a package index, and could not:\n{error}")
    ours, theirs = (_installed_files(environment, name) for name in ("kvstrata", "kernels"))
    assert not ours & theirs
    script = """
import kernels, kvstrata.kernels, kvstrata.kernels.planes
assert callable(kernels.get_kernel), kernels.__file__
assert not hasattr(kvstrata.kernels, "get_kernel")
print(kernels.__file__, kvstrata.kernels.__file__, sep="\\n")
"""
    files = run_outside(environment.python, "-c", script).split()
    assert files == [
        str(environment.site / "kernels" / "__init__.py"),
        str(environment.site / "kvstrata" / "kernels" / "__init__.py"),
    ]
    assert "generate" in run_outside(environment.bin / "kvstrata", "--help")
