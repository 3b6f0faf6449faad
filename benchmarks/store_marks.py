"""The figures that the store is to reach, and what a run of ``bench_store.py`` says of each."""

from collections.abc import Iterator, Sequence
from typing import Any

# What of the store's, in which tier, against which system; the least ratio to it.
RATIOS = (
    ("get", "dram", "grpcio", 0.85),
    ("get", "redis", "redis-py", 0.8),
    ("get", "dram", "mooncake", 3.0),
    ("get", "redis", "lmcache", 3.0),
    ("get", "redis", "lmcache-resp", 3.0),
)
LOOKUP_MS = 3.0
BYTES_A_BLOCK = 200


def marks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line per mark that ``rows`` can tell of: the mark, then what was reached."""
    for op, tier, system, least in RATIOS:
        rivals = [
            row
            for row in rows
            if (row["op"], row["tier"], row["system"]) == (op, tier, system) and row["of_kvstrata"]
        ]
        for block in dict.fromkeys(row["block"] for row in rivals):
            ratios = {
                row["streams"]: 1 / row["of_kvstrata"] for row in rivals if row["block"] == block
            }
            reached = ", ".join(f"{ratio:.2f} ({n})" for n, ratio in ratios.items())
            verdict = "reached" if min(ratios.values()) >= least else "falls short"
            yield f"{op} {tier}, {block}: {least} of {system}'s; by streams: {reached}: {verdict}"
    for row in rows:
        if row["op"].startswith("lookup"):
            verdict = "reached" if row["p50_ms"] < LOOKUP_MS else "falls short"
            yield f"{row['op']}: p50 below {LOOKUP_MS} ms; {row['p50_ms']} ms: {verdict}"
        if row["op"] == "index":
            verdict = "reached" if row["bytes_a_block"] <= BYTES_A_BLOCK else "falls short"
            size = row["bytes_a_block"]
            yield f"index: at most {BYTES_A_BLOCK} bytes a block; {size}: {verdict}"
