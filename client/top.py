"""A live view of a running store or gateway: what it did in the last seconds."""

import json
import time
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvstrata.client.tables import add, right, size
from kvstrata.protos.errors import printable

Stats = dict[str, Any]
_BYTES = ("received_bytes_total", "sent_bytes_total")


def rates(before: Stats, after: Stats, seconds: float) -> dict[str, Any]:
    """Return what grew between two ``Stats``, per second, and how things are now."""

    def grown(name: str, **labels: str) -> float:
        return (_sum(after, name, labels) - _sum(before, name, labels)) / seconds

    misses = {
        reason: (count - before["misses"].get(reason, 0)) / seconds
        for reason, count in after["misses"].items()
    }
    hits = grown("hits_total")
    asked = hits + sum(misses.values())
    return {
        "health": after["health"],
        "hits_per_s": hits,
        "misses_per_s": {reason: rate for reason, rate in misses.items() if rate},
        "hit_rate": hits / asked if asked else None,
        "received_bytes_per_s": grown(_BYTES[0]),
        "sent_bytes_per_s": grown(_BYTES[1]),
        "puts_per_s": grown("puts_total"),
        "lookups_per_s": grown("lookups_total"),
        "evictions_per_s": grown("evictions_total"),
        "refusals_per_s": grown("refusals_total"),
        "requests_per_s": grown("requests_total"),
        "generated_tokens_per_s": grown("generated_tokens_total"),
        "in_flight_puts": after["in_flight_puts"],
        "pinned_bytes": after["pinned_bytes"],
        "tiers": after["tiers"],
        "calls": _calls(before, after, seconds),
    }


def _sum(stats: Stats, name: str, labels: dict[str, str]) -> int:
    return sum(
        counter["value"]
        for counter in stats["counters"]
        if counter["name"] == name and labels.items() <= counter["labels"].items()
    )


def _calls(before: Stats, after: Stats, seconds: float) -> list[dict[str, Any]]:
    """Return calls per second and their mean duration, by method, busiest first."""
    old = {t["labels"].get("method"): t for t in before["times"] if t["name"] == "call_seconds"}
    rows = []
    for times in after["times"]:
        method = times["labels"].get("method")
        if times["name"] != "call_seconds":
            continue
        count = times["count"] - (old[method]["count"] if method in old else 0)
        took_s = times["sum_s"] - (old[method]["sum_s"] if method in old else 0.0)
        if count:
            mean_ms = took_s / count * 1000
            rows.append({"method": method, "per_s": count / seconds, "mean_ms": mean_ms})
    return sorted(rows, key=lambda row: -float(row["per_s"]))


def watch(ask: Callable[[], Stats], interval_s: float, count: int, as_json: bool) -> None:
    """Show the rates of each interval, ``count`` times, for ever with 0; Ctrl-C ends it."""
    before, begin_s = ask(), time.monotonic()
    shown = 0
    with Live(console=Console(), auto_refresh=False, transient=False) as live:
        try:
            while not count or shown < count:
                time.sleep(interval_s)
                after, now_s = ask(), time.monotonic()
                found = rates(before, after, now_s - begin_s)
                if as_json:
                    typer.echo(json.dumps(found))
                else:
                    live.update(_view(found), refresh=True)
                before, begin_s = after, now_s
                shown += 1
        except KeyboardInterrupt:
            return


def _view(found: dict[str, Any]) -> RenderableType:
    misses = ", ".join(f"{rate:.1f} {r}" for r, rate in sorted(found["misses_per_s"].items()))
    hit_rate = "-" if found["hit_rate"] is None else f"{found['hit_rate']:.1%}"
    lines = [
        f"health {found['health']}",
        f"hits {found['hits_per_s']:.1f}/s, hit rate {hit_rate}; misses {misses or 'none'}",
        f"in {size(int(found['received_bytes_per_s']))}/s, "
        f"out {size(int(found['sent_bytes_per_s']))}/s; "
        f"puts {found['puts_per_s']:.1f}/s, evictions {found['evictions_per_s']:.1f}/s, "
        f"refusals {found['refusals_per_s']:.1f}/s; pinned {size(found['pinned_bytes'])}",
    ]
    if found["requests_per_s"] or found["generated_tokens_per_s"]:
        lines.append(
            f"requests {found['requests_per_s']:.2f}/s, "
            f"tokens {found['generated_tokens_per_s']:.1f}/s"
        )
    tiers = Table("tier", "health", *right("blocks", "bytes", "of", "behind"))
    for name, tier in found["tiers"].items():
        share = tier["bytes"] / tier["capacity_bytes"] if tier["capacity_bytes"] else 0.0
        health = "ok" if tier["healthy"] else tier["detail"]
        sizes = (size(tier["bytes"]), f"{share:.0%}", size(tier["behind_bytes"]))
        add(tiers, name, health, tier["blocks"], *sizes)
    calls = Table("call", *right("per s", "mean ms"))
    for row in found["calls"]:
        add(calls, row["method"], f"{row['per_s']:.1f}", f"{row['mean_ms']:.2f}")
    return Group(*(Text(printable(text)) for text in lines), tiers, calls)
