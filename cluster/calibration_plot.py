"""The picture of a profile: how many bits each layer and head gets."""

from pathlib import Path

from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.presets import PRESET_BITS, from_preset
from kvstrata.methods.profile import Profile


def plot_widths(profile: Profile, path: Path) -> Path:
    """Draw the mean base widths under each preset, K and V, to a PNG file; return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(PRESET_BITS), figsize=(4 * len(PRESET_BITS), 7), squeeze=False
    )
    image = None
    for column, preset in enumerate(PRESET_BITS):
        codec = from_preset(preset, profile).codec
        assert isinstance(codec, CalibratedCodec)
        for row, (name, basis) in enumerate(zip("KV", codec.bases, strict=True)):
            widths = basis.layout.widths.float().mean(-1).view(profile.shape[:2]).numpy()
            axis = axes[row][column]
            image = axis.imshow(widths, aspect="auto", vmin=0, vmax=5, cmap="viridis")
            axis.set_title(f"{preset}: {name}, mean {widths.mean():.2f} bits")
            axis.set_xlabel("KV head")
            axis.set_ylabel(f"layer, from {profile.first_layer}")
    figure.colorbar(image, ax=axes, label="base planes per element")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
