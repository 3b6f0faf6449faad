"""The command ``kvstrata tune``: training what a method needs, for one model."""

import json
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from kvstrata.protos.errors import ConfigurationError

console = Console(stderr=True)
app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Train what a method needs, for one model."
)
_DEFAULT_FILES = 150

Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", help="UTF-8 text files; default: the Python standard library."),
]
ModelName = Annotated[str | None, typer.Option("--model", help="Folder, .gguf file or hub id.")]


@app.callback()
def tune() -> None:
    """Train what a method needs, for one model."""


@app.command()
def skipdecode(
    out: Annotated[Path, typer.Option(help="Folder of the adapter; a second run resumes.")],
    text: Texts = None,
    model: ModelName = None,
    speedup: Annotated[float, typer.Option(min=1, help="Layers of the model a layer run.")] = 2.0,
    max_layers: Annotated[int, typer.Option(min=0, help="Instead: of the first token.")] = 0,
    min_layers: Annotated[int, typer.Option(min=0, help="And of the last.")] = 0,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens before the answer.")] = 128,
    answer: Annotated[int, typer.Option(min=2, help="Tokens over which the budget falls.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Stretches of text an update.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0, help="At its highest.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    likeness: Annotated[
        float, typer.Option(min=0, max=1, help="Weight of staying like the full model.")
    ] = 0.5,
    measured: Annotated[int, typer.Option(min=1, help="Held-out stretches to measure on.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
) -> None:
    """Make the adapter with which later tokens can skip layers; resumes where it stopped.

    Example: kvstrata tune skipdecode --out ./adapter --speedup 2 --text manual.txt
    """
    from kvstrata.cluster.model_check import load_model
    from kvstrata.cluster.skipdecode_tuning import TuningPlan
    from kvstrata.cluster.skipdecode_tuning import tune as run
    from kvstrata.cluster.tuning_plot import plot_losses
    from kvstrata.methods.skipdecode import SkipDecode

    texts = _texts(text)
    loaded = load_model(model, "float32")
    if max_layers or min_layers:
        schedule = SkipDecode(max_layers, min_layers, answer)
    else:
        schedule = SkipDecode.for_speedup(loaded.spec.num_layers, speedup, decay_tokens=answer)
    plan = TuningPlan(prompt, answer, batch, steps, learning_rate, rank, likeness, measured, seed)
    with _told() as tell:
        tuned = run(loaded, schedule, texts, plan, out, tell)
    picture = plot_losses({"loss of held-in text": tuned.losses}, out / "loss.png")
    result = {
        "adapter": str(out),
        "plot": str(picture),
        "schedule": asdict(schedule),
        "measured": {name: asdict(found) for name, found in tuned.measured.items()},
    }
    (out / "skipdecode.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


@app.command()
def gate(
    out: Annotated[Path, typer.Option(help="Folder of the gates; a second run resumes.")],
    text: Texts = None,
    examples: Annotated[
        list[Path] | None,
        typer.Option("--examples", help='Instead: lines of JSON, {"prompt": ..., "answer": ...}.'),
    ] = None,
    model: ModelName = None,
    keep: Annotated[float, typer.Option(help="Share of tokens to keep, in (0, 1].")] = 0.5,
    length: Annotated[int, typer.Option(min=128, help="Tokens of a stretch of text.")] = 512,
    warm_steps: Annotated[
        int, typer.Option(min=0, help="Updates before, towards what later tokens attend to.")
    ] = 400,
    cached: Annotated[int, typer.Option(min=1, help="Stretches that these run on.")] = 24,
    steps: Annotated[int, typer.Option(min=0, help="Updates through the whole model.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Stretches an update.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="At its highest.")] = 2e-4,
    loss: Annotated[str, typer.Option(help="hinge, linear or absolute.")] = "hinge",
    weight: Annotated[float, typer.Option(min=0, help="Of the loss of eviction.")] = 4.0,
    bidirectional: Annotated[bool, typer.Option(help="Gates see what follows, too.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Of an adapter that learns with them.")] = 0,
    measured: Annotated[int, typer.Option(min=1, help="Held-out stretches to measure on.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
) -> None:
    """Train the gates that tell which K and V to keep (Attention-Gate); resumes.

    Example: kvstrata tune gate --out ./gates --keep 0.5 --text manual.txt
    """
    from kvstrata.cluster.gate_plan import GatePlan, answered, cut
    from kvstrata.cluster.gate_tuning import tune_gates
    from kvstrata.cluster.model_check import load_model
    from kvstrata.cluster.tuning_plot import plot_losses

    plan = GatePlan(
        length=length,
        batch=batch,
        num_steps=steps,
        learning_rate=learning_rate,
        keep_rate=keep,
        loss=loss,  # type: ignore[arg-type]  # the plan refuses what is none
        weight=weight,
        warm_steps=warm_steps,
        num_cached=cached,
        bidirectional=bidirectional,
        rank=rank,
        num_measured=measured,
        seed=seed,
    )
    pairs = [_pairs(path) for path in examples or ()]
    texts = [] if pairs else _texts(text)
    loaded = load_model(model, "float32")
    groups = [[answered(loaded, *pair) for pair in group] for group in pairs]
    groups += [cut(loaded, one, plan) for one in texts]
    names = [path.name for path in (examples or text or ())] or ["the Python standard library"]
    note = f"{loaded.name}; {', '.join(names)}"
    with _told() as tell:
        tuned = tune_gates(loaded, groups, plan, out, tell, note)
    curves = {"loss before": tuned.warm_losses, "loss": tuned.losses, "kept": tuned.keep_rates}
    curves = {name: curve for name, curve in curves.items() if curve}
    picture = plot_losses(curves, out / "gates.png") if curves else None
    result = {
        "gates": str(out),
        "gates_id": tuned.gates.gates_id,
        "plot": str(picture),
        "measured": {name: asdict(found) for name, found in tuned.measured.items()},
        "kept": {name: found.kept_fraction for name, found in tuned.measured.items()},
    }
    (out / "gates.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


@contextmanager
def _told() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage that is told."""
    with Progress(console=console) as bar:
        bars: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = bar.add_task(stage, total=total)
            bar.update(bars[stage], completed=done, total=total)

        yield tell


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Return the prompts and answers in a file.

    Raises:
        ConfigurationError: It cannot be read, or a line is no example.
    """
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            example = json.loads(line)
            pairs.append((str(example["prompt"]), str(example["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path}, line {number} is no example: {error}"[:200],
                'give lines of JSON: {"prompt": "...", "answer": "..."}',
            ) from error
    return pairs


def _texts(paths: list[Path] | None) -> list[str]:
    """Return the texts of the files, or the largest modules of the standard library.

    Raises:
        ConfigurationError: A file cannot be read.
    """
    if not paths:
        library = Path(sysconfig.get_path("stdlib")).glob("*.py")
        paths = sorted(library, key=lambda path: (-path.stat().st_size, path))[:_DEFAULT_FILES]
    return [read_text(path) for path in paths]


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ConfigurationError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}"[:200], "give files of UTF-8 text") from error
