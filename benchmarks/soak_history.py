"""What happened in a soak, one JSON object a line, in the order in which it ended.

* ``facts``: what the run was told, first.
* ``op``: one call of a client: ``op`` (put, get, lookup, delete), ``t0`` and ``t1`` in seconds
  since the start, ``client``, ``store``, ``timeout_s``, ``error`` (class name or null), ``blocks``.
  Of a put each block has ``name``, ``version``, ``outcome`` ("unknown" if the call failed) and
  ``tiers``; of a get ``name`` and for each stratum a digest, or ``!reason``.
* ``fault``: ``fault``, ``store`` ("" for all), ``t0`` and ``t1``, ``names`` of damaged blocks.
* ``sample``: ``t``, resident bytes and bytes on disk of each store, bytes of Redis.
* ``end``: what was found once all was stopped.
"""

import json
import time
from pathlib import Path
from typing import IO, Any

Event = dict[str, Any]


class History:
    """Writes events as they end."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w")
        self._begin = time.monotonic()
        self.counts: dict[str, int] = {}

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._begin

    def add(self, kind: str, **fields: Any) -> None:
        """Write one event."""
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        name = fields.get("op") or fields.get("fault") or kind
        self.counts[name] = self.counts.get(name, 0) + 1

    def close(self) -> None:
        """End the file."""
        self._file.close()


def read(path: Path) -> list[Event]:
    """Return the events of a history."""
    with path.open() as file:
        return [json.loads(line) for line in file]
