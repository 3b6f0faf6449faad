"""What ``kvctl`` prints for people, drawn from the dictionaries of ``admin``."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from kvstrata.protos.errors import printable

PIPE_COLUMNS = 160  # a pipe has no width; wide enough for four strata side by side


def show_stats(found: dict[str, Any]) -> None:
    """Print tiers, misses and counters."""
    table = Table("tier", "health", *right("blocks", "bytes", "capacity", "hits", "evictions"))
    for name, tier in found["tiers"].items():
        health = "ok" if tier["healthy"] else f"down: {tier['detail']}"
        sizes = (size(tier["bytes"]), size(tier["capacity_bytes"]))
        add(table, name, health, tier["blocks"], *sizes, tier["hits"], tier["evictions"])
    line(f"health {found['health']}, up {found['uptime_s']:.0f} s")
    draw(table)
    misses = ", ".join(f"{n} {reason}" for reason, n in sorted(found["misses"].items()))
    line(f"{found['hits']} hits; misses: {misses or 'none'}")
    line(
        f"{found['pinned_blocks']} blocks pinned ({size(found['pinned_bytes'])}), "
        f"{found['in_flight_puts']} puts in flight"
    )
    if found["times"]:
        times = Table("times", "labels", *right("count", "mean ms", "p50 ms", "p99 ms"))
        for row in found["times"]:
            labels = ", ".join(f"{k}={v}" for k, v in row["labels"].items())
            mean = f"{row['sum_s'] / row['count'] * 1000:.2f}"
            quantiles = (_at_most(row[name]) for name in ("p50_s", "p99_s"))
            add(times, row["name"], labels, row["count"], mean, *quantiles)
        draw(times)
    if found["counters"]:
        counters = Table("counter", "labels", *right("value"))
        for counter in found["counters"]:
            labels = ", ".join(f"{k}={v}" for k, v in counter["labels"].items())
            add(counters, counter["name"], labels, counter["value"])
        draw(counters)


def show_blocks(found: dict[str, Any]) -> None:
    """Print one line per block; keys are never shortened, so that they can be copied."""
    for block in found["blocks"]:
        strata = "+".join(block["strata"])
        kept = retention_text(block)
        marks = "".join(f" {mark}" for mark in ("pinned" * block["pinned"], kept) if mark)
        tiers = ",".join(block["tiers"])
        line(
            f"{block['key']}  {size(block['bytes']):>10}  {strata}  {tiers}{marks and ' ' + marks}"
        )
    more = "; there are more, see --limit" if found["truncated"] else ""
    line(f"{len(found['blocks'])} blocks{more}")


def retention_text(found: dict[str, Any]) -> str:
    """Return priority, time and sessions of a block; empty without hints."""
    if not (kept := found.get("retention")):
        return ""
    return f"{kept['priority']} for {kept['keep_s']:.0f} s, {kept['sessions']} sessions"


def show_health(found: dict[str, Any]) -> None:
    """Print one word, then the reasons."""
    line("ok" if found["ok"] else f"not ok ({found['status']})")
    for reason in found["why"]:
        line(f"  {reason}")


def show_quota(found: dict[str, Any]) -> None:
    """Print limits and use of tenants."""
    table = Table("tenant", *right("stored", "of", "in flight", "of", "requests/s up to"))
    for row in found["tenants"]:
        add(
            table,
            row["tenant"],
            size(row["stored_bytes_now"]) if row["quota_bytes"] else "not counted",
            size(row["quota_bytes"]) if row["quota_bytes"] else "no limit",
            size(row["in_flight_bytes_now"]),
            size(row["in_flight_bytes"]) if row["in_flight_bytes"] else "no limit",
            f"{row['requests_per_s']:g}" if row["requests_per_s"] else "no limit",
        )
    draw(table)


def show_evicted(found: dict[str, Any]) -> None:
    """Print what was evicted."""
    line(f"{found['evicted']} evicted, {found['skipped_pinned']} pinned and kept")


def show_drained(found: dict[str, Any]) -> None:
    """Print whether all work has ended."""
    line("drained" if found["drained"] else f"not drained: {found['in_flight']} in flight")


def _at_most(seconds: float | None) -> str:
    return "-" if seconds is None else f"<= {seconds * 1000:g}"


def size(count: int) -> str:
    """Return a number of bytes as a person reads it; powers of 1024."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def right(*titles: str) -> list[Column]:
    """Return right-aligned columns."""
    return [Column(title, justify="right") for title in titles]


def add(table: Table, *cells: object) -> None:
    """Add a row; what a server sent is shown, never interpreted as markup."""
    table.add_row(*(Text(printable(str(cell))) for cell in cells))


def draw(table: Table) -> None:
    """Print ``table`` to stdout."""
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    Console(highlight=False, width=width).print(table)


def line(text: str) -> None:
    """Print one line to stdout, unwrapped."""
    Console(highlight=False).print(Text(printable(text)), soft_wrap=True)
