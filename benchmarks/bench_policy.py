"""Claim: the dram tier's eviction policy saves more tokens from being computed again than LRU does.

A production trace of chat requests is replayed against the very classes that run in the tier, at
cache sizes from a few thousand tokens to every block of the trace, with Belady's optimum as the
limit (`policy_replay.optimum` says why nothing can do better). Hits are blocks of the longest
leading run of a request that is held. Constants were chosen on the first half of the requests; rows
say the hit rates of the whole trace and of the second half alone, after the first.

LRU is the strong one, over leaves, as in radix caches. The size to look at is the one where LRU has
half of the optimum's token hits, found by bisection.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import records
from policy_plot import draw
from policy_replay import optimum, replay
from policy_trace import BLOCK_TOKENS, DEFAULT, Request, num_distinct, read_trace

from kvstrata.kvstore_service.eviction import EvictionPolicy
from kvstrata.kvstore_service.eviction_gittins import GittinsPolicy
from kvstrata.kvstore_service.eviction_lru import LruPolicy
from kvstrata.kvstore_service.eviction_s3fifo import S3FifoPolicy
from kvstrata.kvstore_service.slots import Slots
from kvstrata.kvstore_service.testing import KeyedPolicy

POLICIES: dict[str, Callable[[Slots, Sequence[int]], EvictionPolicy]] = {
    "lru": LruPolicy,
    "s3-fifo": S3FifoPolicy,
    "ours": GittinsPolicy,
}
OPTIMUM = "optimum"
GRID, QUICK_GRID = (8, 2.83), (2048, 16.0)  # least size in blocks, step
NEAR, QUICK_NEAR = 1.02, 1.5  # how near the half of the optimum is looked for
NO_TRACE = 3


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, default=DEFAULT, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="few sizes, within a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--no-save", action="store_true", help="leave results/ as it is")
    return parser.parse_args(arguments)


class Replays:
    """Hits of each policy at each size, each replayed once."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._hits: dict[tuple[str, int], list[int]] = {}

    def hits(self, policy: str, num_blocks: int) -> list[int]:
        """Return the hit blocks of each request."""
        known = self._hits.get((policy, num_blocks))
        if known is None:
            if policy == OPTIMUM:
                known = optimum(self.requests, num_blocks)
            else:
                known = replay(KeyedPolicy(POLICIES[policy]), self.requests, num_blocks)
            self._hits[policy, num_blocks] = known
        return known

    def rates(self, policy: str, num_blocks: int, first: int = 0) -> tuple[float, float]:
        """Return token and block hit rate of the requests from ``first`` on."""
        rest = self.requests[first:]
        hits = self.hits(policy, num_blocks)[first:]
        tokens = sum(r.tokens_of(n) for r, n in zip(rest, hits, strict=True))
        blocks = sum(len(r.blocks) for r in rest)
        return tokens / sum(r.num_tokens for r in rest), sum(hits) / blocks

    def row(self, policy: str, num_blocks: int) -> dict[str, Any]:
        """Return one measurement."""
        tokens, blocks = self.rates(policy, num_blocks)
        late_tokens, late_blocks = self.rates(policy, num_blocks, len(self.requests) // 2)
        return {
            "bench": "policy",
            "policy": policy,
            "cache_tokens": num_blocks * BLOCK_TOKENS,
            "token_hit_rate": round(tokens, 5),
            "block_hit_rate": round(blocks, 5),
            "second_half_token_hit_rate": round(late_tokens, 5),
            "second_half_block_hit_rate": round(late_blocks, 5),
        }


def sizes(least: int, step: float, most: int) -> list[int]:
    """Return cache sizes in blocks, in equal steps of the logarithm, with ``most`` as the last."""
    found, size = [], float(least)
    while size < most:
        found.append(round(size))
        size *= step
    return [*found, most]


def half_size(replays: Replays, found: Sequence[int], near: float) -> int:
    """Return the size from which on LRU has half of the optimum's token hits, or more.

    Small caches may have that too, since all policies keep what every prompt begins with: the
    search goes down from the largest.
    """

    def reaches(size: int) -> bool:
        return 2 * replays.rates("lru", size)[0] >= replays.rates(OPTIMUM, size)[0]

    enough = found[-1]
    for size in reversed(found[:-1]):
        if not reaches(size):
            less = size
            break
        enough = size
    else:
        return enough
    while enough > less + 1 and enough > near * less:
        middle = min(max(round(math.sqrt(less * enough)), less + 1), enough - 1)
        if reaches(middle):
            enough = middle
        else:
            less = middle
    return enough


def measure(
    requests: Sequence[Request], grid: tuple[int, float], near: float, *, quiet: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows, and what they say at the size where LRU has half of the optimum."""
    replays = Replays(requests)
    found = sizes(*grid, num_distinct(requests))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )
    policies = (OPTIMUM, *POLICIES)
    with bar:
        task = bar.add_task("", total=len(policies) * (len(found) + 1) + 1)
        for size in found:
            for policy in policies:
                bar.update(task, description=f"{size * BLOCK_TOKENS:>11,} tokens {policy:8}")
                replays.hits(policy, size)
                bar.advance(task)
        bar.update(task, description="where LRU has half of the optimum")
        half = half_size(replays, found, near)
        bar.advance(task)
        for policy in policies:
            replays.hits(policy, half)
            bar.advance(task)
    rows = [replays.row(p, size) for size in sorted({*found, half}) for p in policies]
    here = {row["policy"]: row for row in rows if row["cache_tokens"] == half * BLOCK_TOKENS}
    summary = {"half_cache_tokens": half * BLOCK_TOKENS}
    for part, key in (("whole", "token_hit_rate"), ("second_half", "second_half_token_hit_rate")):
        for policy in ("ours", "s3-fifo"):
            summary[f"{policy}_over_lru_{part}"] = round(
                here[policy][key] / (here["lru"][key] or 1), 4
            )
        summary[f"lru_of_optimum_{part}"] = round(here["lru"][key] / (here[OPTIMUM][key] or 1), 4)
    return rows, summary


def show(rows: Sequence[dict[str, Any]], half_tokens: int) -> None:
    for title, suffix in (
        ("whole trace", ""),
        ("second half of the requests, after the first; constants were chosen on the first", "2"),
    ):
        prefix = "second_half_" if suffix else ""
        table = Table(title=f"token hits / block hits, {title}", caption="> LRU at half of optimum")
        for name in ("cache tokens", *POLICIES, OPTIMUM, "ours/lru", "ours/optimum"):
            table.add_column(name, justify="right")
        for size in sorted({row["cache_tokens"] for row in rows}):
            at = {row["policy"]: row for row in rows if row["cache_tokens"] == size}
            rate = {name: row[f"{prefix}token_hit_rate"] for name, row in at.items()}
            table.add_row(
                f"{'> ' if size == half_tokens else ''}{size:,}",
                *(
                    f"{rate[p]:.3f} / {at[p][f'{prefix}block_hit_rate']:.3f}"
                    for p in (*POLICIES, OPTIMUM)
                ),
                *(f"{rate['ours'] / (rate[p] or 1):.3f}" for p in ("lru", OPTIMUM)),
                style="bold" if size == half_tokens else None,
            )
        Console(width=120).print(table)


def main() -> int:
    options = parse()
    if not options.trace.is_file():
        print(f"bench-policy needs the trace {options.trace}: not there", file=sys.stderr)
        return NO_TRACE
    requests = read_trace(options.trace)
    grid, near = (QUICK_GRID, QUICK_NEAR) if options.quick else (GRID, NEAR)
    rows, summary = measure(requests, grid, near, quiet=options.json)
    if not (options.no_save or options.quick):
        records.save("policy", rows, trace=options.trace.name, **summary, **records.machine())
        draw(rows, summary["half_cache_tokens"], records.FOLDER / "policy.png")
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        show(rows, summary["half_cache_tokens"])
    print(json.dumps({"bench": "policy", "summary": summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
