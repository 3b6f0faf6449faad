"""The plot of ``bench_decode.py``: tokens per second and bytes of KV against cached tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "kvstrata balanced": "tab:pink",
    "kvstrata balanced, frame": "tab:red",
    "kvstrata exact": "tab:orange",
    "transformers DynamicCache": "tab:blue",
    "transformers QuantizedCache 4 bit": "tab:gray",
    "vllm": "tab:green",
}
LINES = {1: ":", 8: "-", 16: "--"}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a line a system and batch; left higher is better, right lower."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for panel, key, title in (
        (panels[0], "tokens_per_s", "tokens per second, whole batch"),
        (panels[1], "kv_bytes", "bytes of KV, whole batch"),
    ):
        for system, colour in COLOURS.items():
            for batch, line in LINES.items():
                points = sorted(
                    (row["cached_tokens"], row[key])
                    for row in rows
                    if (row["system"], row["batch"]) == (system, batch)
                )
                if points:
                    label = f"{system}, batch {batch}"
                    panel.plot(
                        *zip(*points, strict=True),
                        color=colour,
                        linestyle=line,
                        marker=".",
                        label=label,
                    )
        panel.set(xscale="log", yscale="log", xlabel="cached tokens", title=title)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
