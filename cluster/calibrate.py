"""The command ``kvstrata calibrate``: a profile for a model, from text files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from kvstrata.protos.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np

console = Console(stderr=True)


def calibrate(
    text: Annotated[
        list[Path], typer.Option(help="UTF-8 text files; several kinds and languages.")
    ],
    model: Annotated[str | None, typer.Option(help="Folder, .gguf file or hub id.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the profile.")] = None,
    segments: Annotated[int, typer.Option(min=1, help="Stretches of text to look at.")] = 24,
    context: Annotated[int, typer.Option(min=128, help="Tokens of one stretch.")] = 1024,
    continuation: Annotated[int, typer.Option(min=32, help="Tokens that follow it.")] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Sampled continuations a stretch.")] = 1,
    rate_segments: Annotated[int, typer.Option(min=1, help="Stretches to measure on.")] = 3,
    prediction_segments: Annotated[
        int, typer.Option(min=0, help="Stretches to learn prediction from; 0 for none.")
    ] = 96,
    extend: Annotated[
        bool, typer.Option(help="Only renew the prediction of the model's profile.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal profiles.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Make the profile that near-lossless, balanced and small need; resumes where it stopped.

    Example: kvstrata calibrate --model ./llama --text prose.txt --text code.py --text deutsch.txt
    """
    from kvstrata.cluster.calibration import CalibrationPlan
    from kvstrata.cluster.calibration import calibrate as run
    from kvstrata.cluster.calibration import extend as renew
    from kvstrata.cluster.calibration_plot import plot_widths
    from kvstrata.cluster.model_check import load_model
    from kvstrata.engine.storage import profile_folder
    from kvstrata.methods.profile import load_profile

    texts = [_read(path) for path in text]
    loaded = load_model(model, dtype)
    if extend and loaded.profile is None:
        raise ConfigurationError("the model has no profile to extend", "leave --extend out")
    plan = CalibrationPlan(
        segments, context, continuation, samples, rate_segments, prediction_segments, seed
    )
    with Progress(console=console) as bar:
        bars: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = bar.add_task(stage, total=total)
            bar.update(bars[stage], completed=done, total=total)

        folder = out or profile_folder()
        if extend and (present := loaded.profile) is not None:
            path = renew(loaded, present, texts, plan, folder, tell)
        else:
            path = run(loaded, texts, plan, folder, tell)
    profile = load_profile(path)
    picture = plot_widths(profile, path.with_suffix(".png"))
    print(
        json.dumps(
            {
                "profile": str(path),
                "profile_id": profile.profile_id,
                "plot": str(picture),
                "rates": _rows(profile.rates),
                "predicted_rates": _rows(found.rates) if (found := profile.prediction) else [],
            }
        )
    )


def _rows(rates: "np.ndarray") -> list[dict[str, float]]:
    return [
        {"threshold": t, "bits": round(b, 4), "kl": round(kl, 6)} for t, b, kl in rates.tolist()
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}"[:200], "give files of UTF-8 text") from error
