"""Where a benchmark's results go: one JSON file beside the plots, with machine and versions."""

import contextlib
import fcntl
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def machine(*packages: str) -> dict[str, Any]:
    """Return what the figures depend on; a package that is absent gets None."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        **versions,
    }


def saved(name: str, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of ``results/<name>.json``; none if it is absent or of other facts."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return []
    head = json.loads(path.read_text("utf-8"))
    rows: list[dict[str, Any]] = head.pop("rows")
    return rows if head.items() >= facts.items() else []


def save(name: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write ``results/<name>.json``: ``facts``, then one line per row. Returns the path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    head = json.dumps(facts, indent=1)[:-2] + "," if facts else "{"
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{head}\n "rows": [\n{lines}\n ]\n}}\n')
    return path


def joined(
    name: str, rows: list[dict[str, Any]], keys: Sequence[str], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the rows saved as ``name`` under equal facts, less those with equal keys, and ours."""
    return replaced(saved(name, facts), rows, keys)


def replaced(
    old: list[dict[str, Any]], rows: list[dict[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Return old rows, less those with the keys of new ones, and the new ones."""
    ours = {tuple(row[key] for key in keys) for row in rows}
    return [row for row in old if tuple(row[key] for key in keys) not in ours] + rows


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep others from joining rows to ``results/<name>.json`` meanwhile: parts may run at once."""
    path = Path(tempfile.gettempdir()) / f"kvstrata-bench-{name}-{os.getuid()}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
