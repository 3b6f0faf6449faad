"""The plot of ``bench_policy.py``: hit rate against cache size, every policy and the optimum."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLES = {
    "optimum": ("tab:gray", "--", "Belady's optimum"),
    "ours": ("tab:red", "-", "ours (Gittins)"),
    "s3-fifo": ("tab:green", "-", "S3-FIFO"),
    "lru": ("tab:blue", "-", "LRU"),
}


def draw(rows: Sequence[dict[str, Any]], half_tokens: int, path: Path) -> None:
    """Draw one line a policy; higher is better, the dotted line is where LRU has half."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for panel, key, title in (
        (panels[0], "token_hit_rate", "whole trace"),
        (panels[1], "second_half_token_hit_rate", "second half; tuned on the first"),
    ):
        for policy, (colour, line, label) in STYLES.items():
            points = sorted((r["cache_tokens"], r[key]) for r in rows if r["policy"] == policy)
            panel.plot(
                *zip(*points, strict=True), color=colour, linestyle=line, marker=".", label=label
            )
        panel.axvline(half_tokens, color="black", linestyle=":", linewidth=0.8)
        panel.set(xscale="log", xlabel="cache size, tokens", title=title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("token hit rate")
    panels[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
