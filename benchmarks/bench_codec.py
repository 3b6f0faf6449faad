"""Claim: at the same size no other codec keeps the model's predictions and facts as well as ours.

A prompt is run once, uncompressed. Each scheme stores its KV and reads it back; on what it reads
the text's continuation is teacher-forced, and facts planted in the prompt are asked for. Sizes of
ours are the bytes of the stored frames, headers and all; of peers, codes and parameters. KL and
log P are against the uncompressed cache, in nats. Peers are eager torch with one byte a code, so
only `quanto` and `hqq` have meaningful times among them; `make bench-kernels` is about speed.
The model is float32 on a CPU, so `exact` stores 32-bit numbers and has a ratio below 1.
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

import records
import torch
from codec_caches import cache_peers
from codec_measures import ALL, Sample, beaten_by, measure, refer, rows, totals
from codec_peers import paper_peers
from codec_plot import draw
from codec_schemes import PeerScheme, Prefilled, Scheme, choose, our_schemes
from codec_texts import PLANTED, Context, Text, TextTooShortError, read_files, read_texts

from kvstrata.engine.model import Model
from kvstrata.methods.profile import Profile
from kvstrata.protos.identity import BLOCK_TOKENS

CONTEXT, CONTINUATION = 1536, 256
# Other lengths, for ours and few peers; with the contexts of 1536 tokens they hold over 200 facts.
OTHER_LENGTHS = {
    1024: PLANTED,
    4096: ("technical", "source", "genesis", "alice", "play", "faq"),
    7872: ("technical", "source", "genesis"),
}
FEW_PEERS = ("fp8", "kivi-4", "kivi-2", "turboquant-like-3")
QUICK_TEXTS = ("technical", "source")
PACKAGES = ("transformers", "optimum-quanto", "hqq", "numba")
COLUMNS = {
    "scheme": "scheme",
    "text": "text",
    "context": "context",
    "bits": "bits",
    "ratio": "ratio",
    "kl": "KL",
    "kl_se": "+-",
    "perplexity": "perplexity",
    "top1": "top-1",
    "recall": "recall",
    "facts_right": "right",
    "facts": "facts",
    "encode_s": "encode s",
    "decode_s": "decode s",
}
DIGITS = {"kl": 5, "kl_se": 5, "recall": 3, "top1": 3}


# Options that take a part of the whole run, or say what becomes of it.
PARTS = ("context", "json", "no_save", "repeats", "schemes", "texts", "untimed")
KEYS = ("scheme", "text", "context")

Job = tuple[Context, Sequence[Scheme]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, GGUF file or hub id (default: SmolLM2-135M)")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--context", type=int, action="append", default=[], metavar="TOKENS")
    parser.add_argument("--continuation", type=int, default=CONTINUATION, metavar="TOKENS")
    parser.add_argument("--segments", type=int, help="contexts per text (default 1)")
    parser.add_argument("--schemes", default="", metavar="A,B", help="default: all")
    parser.add_argument("--texts", default="", metavar="A,B", help="names of default texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="times are medians of so many")
    parser.add_argument(
        "--untimed", action="store_true", help="leave times out: the machine is shared"
    )
    parser.add_argument("--quick", action="store_true", help="two texts, few peers")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument(
        "--no-save",
        action="store_true",
        help="leave results/ as it is; so does every option that changes what is measured on. "
        "Others take a part of the whole, whose rows replace those of equal scheme, text, context",
    )
    options = parser.parse_args(arguments)
    changed = (n for n in vars(options) if n not in PARTS)
    options.no_save |= any(getattr(options, n) != parser.get_default(n) for n in changed)
    options.no_save |= not {CONTEXT, *OTHER_LENGTHS}.issuperset(options.context)
    if any(n % BLOCK_TOKENS or n < BLOCK_TOKENS for n in options.context):
        parser.error(f"--context must be a positive multiple of {BLOCK_TOKENS}")
    if options.continuation < 2 or min(options.segments or 1, options.repeats) < 1:
        parser.error("--continuation must be at least 2, --segments and --repeats at least 1")
    return options


def plan(
    model: Model, texts: Sequence[Text], options: argparse.Namespace
) -> tuple[list[Context], list[str]]:
    """Return the contexts to measure, and a sentence for each that its text is too short for.

    A context of the whole run has the same facts in every part of it.
    """
    names = [n for n in options.texts.split(",") if n] or (QUICK_TEXTS if options.quick else ())
    chosen = [text for text in texts if options.text or not names or text.name in names]
    wanted = [
        (text, length, segment)
        for length in options.context or [CONTEXT]
        for text in chosen
        for segment in range(options.segments or 1)
    ]
    if not (options.context or options.quick or options.text):
        wanted += _other_places(chosen)
    whole = [(text, CONTEXT, 0) for text in texts] + _other_places(texts)
    numbers: dict[tuple[str, int, int], int] = {}
    for text, length, segment in whole + wanted:
        numbers.setdefault((text.name, length, segment), len(numbers))
    contexts, short = [], []
    for text, length, segment in wanted:
        try:
            if length + options.continuation + 1 > model.spec.max_positions:
                raise TextTooShortError(
                    f"{length} + {options.continuation} tokens exceed the model's "
                    f"{model.spec.max_positions} positions"
                )
            seed = 1000 * options.seed + numbers[text.name, length, segment]
            contexts.append(
                text.context(
                    model.tokenizer, length, options.continuation, segment=segment, seed=seed
                )
            )
        except TextTooShortError as error:
            short.append(str(error))
    return contexts, short


def _other_places(texts: Sequence[Text]) -> list[tuple[Text, int, int]]:
    return [
        (text, length, 0)
        for length, names in OTHER_LENGTHS.items()
        for text in texts
        if text.name in names
    ]


def schemes_here(
    options: argparse.Namespace, profile: Profile | None
) -> tuple[list[Scheme], dict[str, str]]:
    """Return what to measure, and why each of the others cannot be."""
    peers = paper_peers(options.seed)
    caches, missing = cache_peers()
    peers |= caches
    every: list[Scheme] = [*our_schemes(profile), *(PeerScheme(*item) for item in peers.items())]
    names = [name for name in options.schemes.split(",") if name]
    if options.quick and not names:
        names = [s.name for s in every if not s.peer or s.name in FEW_PEERS]
    chosen = choose(every, names)
    return chosen, missing | {s.name: "not asked for" for s in every if s not in chosen}


def jobs_of(
    contexts: Sequence[Context], schemes: Sequence[Scheme], options: argparse.Namespace
) -> list[Job]:
    """Return what is measured where: of the peers only few at the lengths that nobody asked for."""
    few = [scheme for scheme in schemes if not scheme.peer or scheme.name in FEW_PEERS]
    asked = options.context or [CONTEXT]
    return [(c, schemes if len(c.prompt) in asked else few) for c in contexts]


def run(
    model: Model, jobs: Sequence[Job], seed: int, *, quiet: bool, repeats: int = 1
) -> Iterator[list[Sample]]:
    """Yield the samples of one context after the other."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )
    with progress:
        # Kernels are compiled and tables made at the first use, which is not what is timed.
        first = Prefilled.of(model, jobs[0][0].prompt[: 2 * BLOCK_TOKENS], seed)
        for scheme in jobs[0][1]:
            scheme.store(first)
        # Work is counted in tokens: a long context takes longer in every step.
        total = sum(len(context.prompt) * (len(schemes) + 3) for context, schemes in jobs)
        bar = progress.add_task("", total=total)
        for context, schemes in jobs:
            place = f"{context.text} {len(context.prompt)}"
            progress.update(bar, description=f"{place} prefill")
            prompt = Prefilled.of(model, context.prompt, seed)
            reference = refer(prompt, context)
            progress.advance(bar, 3 * len(context.prompt))
            samples = []
            for scheme in schemes:
                progress.update(bar, description=f"{place} {scheme.name}")
                samples.append(measure(scheme, prompt, context, reference, repeats))
                progress.advance(bar, len(context.prompt))
            yield samples


def show(found: Sequence[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for key, name in COLUMNS.items():
        table.add_column(name, justify="left" if key in ("scheme", "text") else "right")
    for row in sorted(found, key=lambda r: (r["context"], r["text"], r["bits"])):
        style = None if row["peer"] else "bold"
        table.add_row(*(_cell(key, row) for key in COLUMNS), style=style)
    Console(width=150).print(table)


def _cell(key: str, row: dict[str, Any]) -> str:
    value = row[key]
    if value is None:
        return "-"
    if key == "facts_right":
        return f"{value}/{row['facts_right_reference']}"
    if key == "context" and not value:
        return ALL
    if isinstance(value, float):
        return f"{value:.{DIGITS.get(key, 2)}f}"
    return str(value)


def report(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        for row in found:
            print(json.dumps(row))
        return
    show([row for row in found if row["text"] != ALL], "each text")
    show([row for row in found if row["text"] == ALL], "all texts of a length, and all lengths")
    for sentence in beaten_by([row for row in found if row["text"] == ALL]):
        print(sentence)


def main() -> int:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    note = Console(stderr=True)
    model = Model.load(options.model)
    texts = read_files(options.text) if options.text else read_texts(model.tokenizer)
    try:
        schemes, missing = schemes_here(options, model.profile)
    except ValueError as error:
        note.print(f"error: {error}")
        return 2
    for name, reason in missing.items():
        note.print(f"left out: {name}, {reason}")
    contexts, short = plan(model, texts, options)
    for sentence in short:
        note.print(f"left out: {sentence}")
    if not contexts:
        note.print("error: nothing to measure")
        return 2
    samples: list[Sample] = []
    found: list[dict[str, Any]] = []
    jobs = jobs_of(contexts, schemes, options)
    settings = {s.name: s.settings for s in our_schemes(model.profile)}
    threads = None if options.untimed else torch.get_num_threads()
    measurements = run(model, jobs, options.seed, quiet=options.json, repeats=options.repeats)
    for measured in measurements:
        samples += measured
        of_texts = [
            row | {"settings": settings.get(row["scheme"])} for row in rows(samples, threads)
        ]
        if not options.no_save:
            facts = {
                **records.machine(*PACKAGES),
                "model": model.name,
                "dtype": str(model.spec.dtype),
                "seed": options.seed,
                "continuation": options.continuation,
            }
            del facts["threads"]  # rows have their own
            with records.locked("codec"):
                saved = [
                    row
                    for row in records.saved("codec", facts)
                    if row["text"] != ALL and row["settings"] == settings.get(row["scheme"])
                ]
                of_texts = records.replaced(saved, of_texts, KEYS)
                found = of_texts + totals(of_texts)
                records.save("codec", found, **facts)
            draw(
                [row for row in found if row["text"] == ALL and row["context"] == CONTEXT],
                records.FOLDER / "codec.png",
            )
        found = of_texts + totals(of_texts)
    report(found, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
