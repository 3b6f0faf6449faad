"""The plots of ``bench_methods.py``, ``bench_prefill.py`` and ``bench_vision.py``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("perplexity", "perplexity of the continuation"),
    ("needle", "planted facts and lines still right"),
    ("accuracy", "passages still repeated"),
)


def draw_quality(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw quality against stored bits, a line per scheme over its budgets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(19, 6.5), layout="constrained")
    names = sorted({row["method"] for row in rows})
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    for panel, (key, title) in zip(panels, PANELS, strict=True):
        for name in names:
            points = sorted(
                (row["bits"], row[key])
                for row in rows
                if row["method"] == name and row[key] is not None
            )
            if not points:
                continue
            peer = next(row["peer"] for row in rows if row["method"] == name)
            panel.plot(
                *zip(*points, strict=True),
                marker="o" if peer else "D",
                linestyle=":" if peer else "-",
                linewidth=1.0 if peer else 1.6,
                markersize=4 if peer else 6,
                color=colours[name],
                label=name,
            )
        panel.set(xscale="log", xlabel="stored bits per element of K and V", title=title)
        panel.set_xticks([0.5, 1, 2, 4, 8, 16], [0.5, 1, 2, 4, 8, 16])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    least = min((row["perplexity"] for row in rows), default=1.0)
    panels[0].set_ylim(0.99 * least, 1.25 * least)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8)
    figure.suptitle("solid lines and diamonds: KVStrata; dotted lines and dots: peers")
    figure.savefig(folder / "methods.png", dpi=110)
    plt.close(figure)


def draw_prefill(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw prefill and attention time against prompt length, a line per tau."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for panel, key in zip(panels, ("attention_ms", "prefill_ms"), strict=True):
        for budget in sorted({row["budget"] for row in rows}, reverse=True):
            points = sorted((r["tokens"], r[key]) for r in rows if r["budget"] == budget)
            dense = budget == 1.0
            panel.plot(
                *zip(*points, strict=True),
                marker="o",
                linestyle=":" if dense else "-",
                label="dense" if dense else f"ZipVL, tau {budget}",
            )
        panel.set(xscale="log", yscale="log", xlabel="prompt tokens", title=key.replace("_", ", "))
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(folder / "prefill.png", dpi=110)
    plt.close(figure)


def draw_vision(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw the share of right answers against size, a line per scheme over its budgets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    for panel, shown in zip(panels, ("pictures", "videos"), strict=True):
        here = [row for row in rows if row["shown"] == shown]
        for name in dict.fromkeys(row["method"] for row in here):
            points = sorted((r["ratio"], r["accuracy"]) for r in here if r["method"] == name)
            peer = any(row["peer"] for row in here if row["method"] == name)
            line = ":" if peer else "-"
            panel.plot(*zip(*points, strict=True), marker="o", linestyle=line, label=name)
        panel.set(xscale="log", xlabel="times smaller than bf16", title=f"{shown}: answers right")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(folder / "vision.png", dpi=110)
    plt.close(figure)
