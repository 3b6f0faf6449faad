"""The plot of ``bench_reading.py``: times by link, and what each token of an answer lost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "full": "tab:blue",
    "refine": "tab:red",
    "fewer_strata": "tab:orange",
    "recompute": "tab:gray",
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw first tokens against links, and KL against tokens on the fastest link that is slow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    links = sorted({row["link_mb_s"] for row in rows})
    shown = links[len(links) // 2]
    figure, panels = plt.subplots(
        len(codecs), 2, figsize=(12, 4 * len(codecs)), layout="constrained", squeeze=False
    )
    for codec, (times, losses) in zip(codecs, panels, strict=True):
        for choice, colour in COLOURS.items():
            own = [r for r in rows if (r["codec"], r["choice"]) == (codec, choice)]
            own.sort(key=lambda row: row["link_mb_s"])
            reached = [row["ttft_ms"] for row in own]
            times.plot(links, reached, marker=".", color=colour, label=choice)
            curve = next(row["kl_by_token"] for row in own if row["link_mb_s"] == shown)
            losses.plot(curve, color=colour, label=choice)
        times.set(title=codec, xscale="log", yscale="log", xlabel="link, MB/s", xticks=links)
        times.set(ylabel="first token, ms", xticklabels=[f"{link:g}" for link in links])
        losses.set(xlabel="token of the answer", ylabel=f"KL to full precision, {shown:g} MB/s")
        times.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
