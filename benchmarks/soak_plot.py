"""Calls, memory and disk over the time of a soak, with its faults."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_MIB = 1 << 20


def draw(events: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a picture of a history."""
    figure, axes = plt.subplots(3, 1, figsize=(11, 8), sharex=True)
    good: Counter[int] = Counter()
    bad: Counter[int] = Counter()
    for event in events:
        if event["kind"] == "op":
            (bad if event["error"] else good)[int(event["t1"] // 5) * 5] += 1
    times = sorted(set(good) | set(bad))
    axes[0].plot(times, [good[t] / 5 for t in times], label="answered")
    axes[0].plot(times, [bad[t] / 5 for t in times], label="failed, store cut off or down")
    axes[0].set_ylabel("calls a second")
    samples = [event for event in events if event["kind"] == "sample"]
    for axis, kind in ((axes[1], "rss"), (axes[2], "disk")):
        for store in ("a", "b", "c"):
            values = [(s["t"], s["bytes"][kind].get(store, 0)) for s in samples]
            points = [(t, value / _MIB) for t, value in values if value]
            axis.plot(*zip(*points, strict=True) if points else ([], []), label=f"store {store}")
        axis.set_ylabel(f"{kind}, MiB")
    colours: dict[str, Any] = {}
    for event in events:
        if event["kind"] == "fault":
            colour = colours.setdefault(event["fault"], f"C{len(colours) % 10}")
            for axis in axes:
                axis.axvspan(
                    event["t0"], max(event["t1"], event["t0"] + 0.2), color=colour, alpha=0.12
                )
    for axis in axes:
        axis.legend(loc="upper right", fontsize=8)
        axis.set_ylim(bottom=0)
    axes[2].set_xlabel("seconds; every stripe is a fault")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
