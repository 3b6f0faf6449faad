"""The tables of faults and of complaints name tests and faults that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGES = {name: (TESTS / "e2e" / name).read_text() for name in ("README.md", "COMPLAINTS.md")}
NAMED = {found for text in PAGES.values() for found in re.findall(r"`([\w/]+\.py)::(\w+)`", text)}


def rows(text: str) -> list[list[str]]:
    """Return the cells of every line of a page's tables, but for the lines under their heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def names_in(path: Path) -> set[str]:
    """Return the tests of a file: functions, and test cases that it makes by assignment."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if name.startswith(("test_", "Test"))}


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_a_table_names_exists(file: str) -> None:
    assert {name for path, name in NAMED if path == file} <= names_in(TESTS / file)


@pytest.mark.parametrize("page", PAGES)
def test_every_mention_of_a_test_is_one_that_can_be_found(page: str) -> None:
    mentions = re.findall(r"::\w+", PAGES[page])
    assert len(mentions) == len(re.findall(r"[\w/]+\.py::\w+[` ]", PAGES[page])) > 0


def test_every_complaint_has_an_answer_and_a_test() -> None:
    table = [row for row in rows(PAGES["COMPLAINTS.md"]) if row[0].isdecimal()]
    assert [int(row[0]) for row in table] == list(range(1, 37))
    for number, complaint, answer, tests in table:
        assert complaint, number
        assert answer, number
        assert "::" in tests, number


def test_every_fault_of_the_soak_has_a_line() -> None:
    source = ast.parse((TESTS.parent / "benchmarks" / "soak_faults.py").read_text())
    (faults,) = (
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAULTS"
    )
    told = [name for row in rows(PAGES["README.md"]) for name in re.findall(r"`(\w+)`", row[1])]
    assert sorted(faults) == sorted(set(told) & set(faults)), set(faults) - set(told)
