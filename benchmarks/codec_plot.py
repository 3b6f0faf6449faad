"""The plots of ``bench_codec.py``: KL and lost recall against bits, ours and peers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEAST_KL = 1e-5
LEAST_LOSS = 1e-3


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one point per row; lower and further left is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for panel, key, title, least in (
        (panels[0], "kl", "KL(uncompressed || compressed), nats per token", LEAST_KL),
        (panels[1], "recall", "log P(answer) lost per planted fact, nats", LEAST_LOSS),
    ):
        for row in rows:
            if row[key] is None:
                continue
            lost = max(least, row["kl"] if key == "kl" else -row["recall"])
            colour = "tab:gray" if row["peer"] else "tab:red"
            error = 0.0 if key == "kl" else row["recall_se"]
            error = row["kl_se"] if key == "kl" else error
            panel.errorbar(
                row["bits"],
                lost,
                yerr=[[min(error, lost - least)], [error]],
                fmt="o" if row["peer"] else "D",
                color=colour,
                elinewidth=0.8,
            )
            panel.annotate(
                row["scheme"],
                (row["bits"], lost),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
        _draw_frontiers(panel, rows, key, least)
        panel.set(
            xscale="log", yscale="log", xlabel="stored bits per element of K and V", title=title
        )
        panel.set_xticks([1, 1.5, 2, 3, 4, 6, 8, 12, 16], [1, 1.5, 2, 3, 4, 6, 8, 12, 16])
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    figure.suptitle("red diamonds: KVStrata; gray: peers; lower left is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_frontiers(panel: Any, rows: Sequence[dict[str, Any]], key: str, least: float) -> None:
    for peer, colour in ((True, "tab:gray"), (False, "tab:red")):
        points = sorted(
            (row["bits"], max(least, row["kl"] if key == "kl" else -row["recall"]))
            for row in rows
            if row["peer"] is peer and row[key] is not None
        )
        best: list[tuple[float, float]] = []
        for point in points:
            if not best or point[1] < best[-1][1]:
                best.append(point)
        if best:
            panel.plot(*zip(*best, strict=True), color=colour, linewidth=0.8, alpha=0.6)
