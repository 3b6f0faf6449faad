"""Claim: the papers' methods do what they claim, and compose with the codec, on a real model.

A prompt is run once, uncompressed, and all of its rows are asked for scores. Each scheme keeps less
of its KV: fewer tokens (a budget), fewer bits, or both. On what is left the prompt's continuation
is teacher-forced, planted facts and lines are asked for, and passages are to be repeated. Budgets
are shares of the prompt's tokens; `ratio` is bf16 against everything that is stored, masks and
frames included. `needle` (facts and lines) and `accuracy` (passages to repeat) are shares of what
the uncompressed model gets right. Eviction happens once, after the prompt, for all schemes alike.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import methods_catalogue
import methods_kvpress
import records
from codec_measures import measure, refer
from codec_texts import TextTooShortError, read_texts
from methods_measures import Measured, rows
from methods_plot import draw_quality
from methods_schemes import MethodScheme, Observed
from methods_tasks import Tasks, of_text, with_lines

from kvstrata.engine.model import Model

CONTINUATION = 256
TEXTS = ("technical", "genesis", "alice", "play", "faq", "quotes")
LINED = ("technical", "genesis", "alice", "play")
# By prompt length: texts, and texts with lists.
FULL = {
    1536: (TEXTS, LINED),
    512: (TEXTS[:3], ()),
    4096: (("technical", "genesis", "alice"), ("play",)),
}
PLAN = {1536: (("technical", "genesis", "faq"), ("alice",))}
QUICK = {1536: (("technical",), ())}
QUICK_BUDGETS = (0.5, 0.2)
OTHER_BUDGETS = (0.5, 0.2)  # at lengths other than the first
PACKAGES = ("transformers", "kvpress", "optimum-quanto", "hqq", "numba")
COLUMNS = ("method", "budget", "ratio", "perplexity", "kl", "top1", "needle", "accuracy")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, GGUF file or hub id (default: SmolLM2-135M)")
    parser.add_argument("--schemes", default="", metavar="A,B", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contexts", type=int, metavar="N", help="the first N; default: all")
    parser.add_argument("--quick", action="store_true", help="one context, two budgets")
    parser.add_argument("--full", action="store_true", help="all lengths and budgets: hours")
    parser.add_argument(
        "--add", action="store_true", help="to the rows in results/, with --schemes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--no-save", action="store_true", help="leave results/ as it is")
    options = parser.parse_args(arguments)
    partial = bool(options.schemes) and not options.add
    other = bool(options.model) or bool(options.seed) or options.contexts is not None
    options.no_save |= options.quick or partial or other
    return options


def contexts(
    tokenizer: Any, plan: dict[int, tuple[Sequence[str], Sequence[str]]], seed: int
) -> tuple[list[Tasks], list[str]]:
    """Return the contexts of a plan, and a sentence for each text that is too short."""
    texts = {text.name: text for text in read_texts(tokenizer)}
    found, short = [], []
    for length, (plain, lined) in plan.items():
        for number, name in enumerate((*plain, *lined)):
            try:
                draw = 1000 * seed + number
                if number < len(plain):
                    made = of_text(
                        texts[name], tokenizer, length, CONTINUATION, segment=0, seed=draw
                    )
                else:
                    made = with_lines(texts[name], tokenizer, length, CONTINUATION, seed=draw)
                found.append(made)
            except TextTooShortError as error:
                short.append(str(error))
    return found, short


def schemes_of(
    model: Model, options: argparse.Namespace, budgets: Sequence[float]
) -> tuple[list[MethodScheme], dict[str, str]]:
    """Return what to measure, and why each of the others cannot be."""
    has_kvpress = methods_kvpress.is_installed()
    codecs, missing = methods_catalogue.other_codecs(options.seed)
    if not has_kvpress:
        missing |= dict.fromkeys(methods_kvpress.PRESSES, methods_kvpress.INSTALL)
    taus = methods_catalogue.TAUS if options.full else methods_catalogue.SHORT_TAUS
    every = [
        methods_catalogue.whole(),
        *methods_catalogue.eviction(budgets, options.seed, has_kvpress=has_kvpress),
        *methods_catalogue.gated(model.gates, model.profile, budgets),
        *methods_catalogue.coded(model.profile, budgets),
        *methods_catalogue.zipvl(taus),
        *codecs,
    ]
    names = [name for name in options.schemes.split(",") if name]
    if not options.full:
        every = [s for s in every if methods_catalogue.is_short(s)]
    unknown = set(names) - {scheme.name for scheme in every}
    if unknown:
        raise ValueError(f"no scheme {', '.join(sorted(unknown))}")
    return [s for s in every if not names or s.name in names], missing


def run(
    model: Model,
    jobs: Sequence[tuple[Tasks, Sequence[MethodScheme]]],
    options: argparse.Namespace,
) -> Iterator[list[Measured]]:
    """Yield what was measured of one context after the other."""
    press = methods_kvpress.PressScores(options.model) if methods_kvpress.is_installed() else None
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=options.json,
    )
    with progress:
        total = sum(len(t.context.prompt) * (len(schemes) + 8) for t, schemes in jobs)
        bar = progress.add_task("", total=total)
        for tasks, schemes in jobs:
            context = tasks.context
            length = len(context.prompt)
            place = f"{context.text} {length}"
            progress.update(bar, description=f"{place} prefill")
            prompt = Observed.observe(model, context.prompt)
            if press is not None and any(s.name.startswith("kvpress") for s in schemes):
                prompt.peer_scores.update(press.of(context.prompt))
            reference = refer(prompt, context)
            progress.advance(bar, 8 * length)
            found = []
            for scheme in schemes:
                progress.update(bar, description=f"{place} {scheme.name}")
                sample = measure(scheme, prompt, context, reference)  # type: ignore[arg-type]
                found.append(Measured(scheme.name, scheme.budget, sample, tasks))
                progress.advance(bar, length)
            yield found


def show(found: Sequence[dict[str, Any]]) -> None:
    for tokens in sorted({row["tokens"] for row in found}):
        table = Table(title=f"prompts of {tokens} tokens")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == "method" else "right")
        here = [row for row in found if row["tokens"] == tokens]
        for row in sorted(here, key=lambda r: (-(r["ratio"] or 0), r["perplexity"] or 0)):
            cells = ("-" if row[c] is None else str(row[c]) for c in COLUMNS)
            table.add_row(*cells, style=None if row["peer"] else "bold")
        Console(width=120).print(table)


def main() -> int:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    note = Console(stderr=True)
    model = Model.load(options.model)
    plan = FULL if options.full else QUICK if options.quick else PLAN
    budgets = methods_catalogue.BUDGETS if options.full else methods_catalogue.SHORT_BUDGETS
    budgets = QUICK_BUDGETS if options.quick else budgets
    try:
        schemes, missing = schemes_of(model, options, budgets)
    except ValueError as error:
        note.print(f"error: {error}")
        return 2
    for name, reason in missing.items():
        note.print(f"left out: {name}, {reason}")
    found_contexts, short = contexts(model.tokenizer, plan, options.seed)
    for sentence in short:
        note.print(f"left out: {sentence}")
    found_contexts = found_contexts[: options.contexts]
    first = next(iter(plan))
    fewer = [s for s in schemes if s.budget in (1.0, *OTHER_BUDGETS)]
    jobs = [(t, schemes if len(t.context.prompt) == first else fewer) for t in found_contexts]
    measured: list[Measured] = []
    found: list[dict[str, Any]] = []
    facts = records.machine(*PACKAGES) | {"model": model.name, "seed": options.seed}
    for done, part in enumerate(run(model, jobs, options), start=1):
        measured += part
        found = rows(measured, model.name)
        if options.add:
            found = records.joined("methods", found, ("method", "budget", "tokens"), facts)
        if not options.no_save:
            left_out, contexts_done = [*missing, *short], f"{done} of {len(jobs)}"
            records.save("methods", found, **facts, left_out=left_out, contexts_done=contexts_done)
            draw_quality([r for r in found if r["tokens"] == first], records.FOLDER)
    if options.json:
        for row in found:
            print(json.dumps(row))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
