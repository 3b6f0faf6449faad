"""The timeline of requests as a picture: who did what when."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

COLOURS = {
    "route": "#9aa0a6",
    "prefill": "#d93025",
    "compress": "#f29900",
    "ship": "#fbbc04",
    "fetch": "#1a73e8",
    "decompress": "#12b5cb",
    "tail": "#9334e6",
    "decode": "#188038",
    "replay": "#5f6368",
}


class Timed(Protocol):
    """A request with a name and the JSON object that the client printed for it."""

    @property
    def name(self) -> str:
        """What to call it in the picture."""
        ...

    @property
    def output(self) -> dict[str, Any]:
        """Holds ``cache.stages`` with start and duration in seconds."""
        ...


def draw_timeline(requests: Sequence[Timed], path: Path) -> None:
    """Write a PNG with one row per request, stages left to right, zero at the request's start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.9 * len(requests)), layout="constrained")
    seen: set[str] = set()
    for row, request in enumerate(requests):
        stages = request.output["cache"]["stages"]
        zero = min(stage["start_unix_s"] for stage in stages)
        for stage in stages:
            name = stage["stage"]
            axes.barh(
                row,
                stage["seconds"],
                left=stage["start_unix_s"] - zero,
                height=0.6,
                color=COLOURS.get(name, "#000000"),
                label=None if name in seen else name,
            )
            seen.add(name)
    axes.set_yticks(range(len(requests)), [request.name for request in requests])
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the request came")
    axes.set_title("From prompt to tokens: where the time goes")
    axes.legend(ncols=len(seen), loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
