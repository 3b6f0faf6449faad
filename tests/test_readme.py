"""Every example in a README runs, and prints what the README says.

A block marked ``python`` is executed; the blocks of one README share their names, top to bottom.
A block marked ``text`` right below one is its output, in which ``...`` stands for anything.
A block marked ``py`` needs what only its room's own tests have, which run it.
A README that speaks of an address is run against the stack: ``127.0.0.1:50051`` becomes the
stack's address, which is also in ``KVSTRATA_ADDRESS``.
"""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_rooms import ROOT

README_ADDRESS = "127.0.0.1:50051"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SEPARATOR = "\x00"
RUN_BLOCKS = """
import json, sys
names = {"__name__": "__main__"}
for line, block in json.load(sys.stdin):
    exec(compile("\\n" * line + block, sys.argv[1], "exec"), names)
    print("\\0", end="", flush=True)
"""


class Example(NamedTuple):
    """A block, the number of lines above it, and the output that it must have, if it is given."""

    line: int
    code: str
    output: str | None


def examples(text: str) -> list[Example]:
    fences = list(FENCE.finditer(text))
    found = []
    for i, fence in enumerate(fences):
        if fence[1] != "python":
            continue
        below = next(iter(fences[i + 1 :]), None)
        is_output = below and below[1] == "text" and not text[fence.end() : below.start()].strip()
        line = text[: fence.start()].count("\n") + 1
        found.append(Example(line, fence[2], below[2] if below and is_output else None))
    return found


def _readmes() -> list[object]:
    found: list[object] = []
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md")]):
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        if examples(text):
            needs_stack = any("Client(" in example.code for example in examples(text))
            marks = [pytest.mark.e2e] if needs_stack else []
            found.append(pytest.param(name, needs_stack, id=name, marks=marks))
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("readme", "needs_stack"), _readmes())
def test_the_examples_of_a_readme_run(
    readme: str, needs_stack: bool, request: pytest.FixtureRequest, tmp_path: Path
):
    blocks = examples((ROOT / readme).read_text())
    env = dict(os.environ)
    address = README_ADDRESS
    if needs_stack:
        address = env["KVSTRATA_ADDRESS"] = request.getfixturevalue("stack").address
    code = [(block.line, block.code.replace(README_ADDRESS, address)) for block in blocks]
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN_BLOCKS, readme],
        input=json.dumps(code),
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    for block, printed in zip(blocks, done.stdout.split(SEPARATOR), strict=False):
        if block.output is not None:
            want = block.output.replace(README_ADDRESS, address)
            matches = doctest.OutputChecker().check_output(want, printed, FLAGS)
            assert matches, f"{readme}:{block.line}: expected\n{want}\nprinted\n{printed}"


def test_examples_are_found_with_their_line_and_output():
    first = "# x\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
    text = f"{first}```python\ny = 2\n```\nprose\n```text\nno\n```\n"
    assert examples(text) == [Example(3, "print(1)\n", "1\n"), Example(11, "y = 2\n", None)]


@pytest.mark.parametrize(("name", "limit"), [("README.md", 150), ("CONTRIBUTING.md", 119)])
def test_a_page_stays_short(name: str, limit: int):
    assert len((ROOT / name).read_text().splitlines()) <= limit


@pytest.mark.parametrize("readme", sorted(ROOT.glob("*/README.md")), ids=lambda p: p.parent.name)
def test_a_readme_links_only_to_files_that_exist(readme: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", readme.read_text()):
        assert "://" in target or (readme.parent / target).exists(), f"{readme}: {target}"
