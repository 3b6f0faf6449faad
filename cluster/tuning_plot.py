"""The picture of a training: its loss by step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

_SMOOTHING = 0.9


def plot_losses(curves: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Draw each curve, and smoothed over about ten steps, to a PNG file; return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(6 * len(curves), 4), squeeze=False, layout="constrained"
    )
    for axis, (name, values) in zip(axes[0], curves.items(), strict=True):
        smooth, mean = [], values[0] if values else 0.0
        for value in values:
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
            smooth.append(mean)
        axis.plot(values, color="tab:blue", alpha=0.3)
        axis.plot(smooth, color="tab:blue")
        axis.set_xlabel("step")
        axis.set_title(name)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
