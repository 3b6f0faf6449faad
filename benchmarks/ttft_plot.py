"""The plot of ``bench_ttft.py``: milliseconds to the first token against tokens of the prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "kvstrata balanced": "tab:red",
    "kvstrata exact": "tab:orange",
    "kvstrata single process": "tab:pink",
    "transformers": "tab:blue",
    "vllm": "tab:green",
    "vllm + lmcache": "tab:purple",
}
LINES = {"cold": "-", "warm-dram": ":", "warm-redis": "--", "warm-ssd": "-."}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a line a system and state."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 6), layout="constrained")
    for system, colour in COLOURS.items():
        for state, line in LINES.items():
            points = sorted(
                (row["prompt_tokens"], row["ttft_ms"])
                for row in rows
                if (row["system"], row["state"]) == (system, state)
            )
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linestyle=line,
                    marker=".",
                    label=f"{system}, {state}",
                )
    panel.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="TTFT, ms")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
