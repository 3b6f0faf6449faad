"""The table of the papers' checks in methods/README.md names tests that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW = re.compile(
    r"^\| (?P<check>[A-Z]?[\d.]+) \| `(?P<file>tests/\S+\.py)::(?P<name>test_\w+)` \|$", re.M
)
NUMBERS = {"Z": 12, "H": 8, "G": 9, "V": 10, "S": 8}
TABLE = ROW.findall((ROOT / "methods/README.md").read_text(encoding="utf-8"))


def test_every_named_check_has_one_row() -> None:
    wanted = [f"{letter}{n}" for letter, last in NUMBERS.items() for n in range(1, last + 1)]
    assert [check for check, _, _ in TABLE] == [*wanted, "8.5"]


@pytest.mark.parametrize("file", sorted({file for _, file, _ in TABLE}))
def test_the_tests_of_the_table_exist_and_run_in_ci(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    tests = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for check, _, name in (row for row in TABLE if row[1] == file):
        assert name in tests, f"{check}: {file} has no {name}"
        marks = " ".join(ast.unparse(mark) for mark in tests[name].decorator_list)
        assert not re.search(r"\b(skip|slow|long|gpu|xfail)\b", marks), (
            f"{check} does not always run"
        )
