"""Claim: ZipVL's sparse prefill attention beats dense attention on long prompts, by what it skips.

One prompt of real text, run whole: densely, with torch's causal kernel, and with ZipVL at several
tau. `attention_ms` is the attention of all layers, finding the tokens that matter included;
`prefill_ms` is the pass. `kept` is the mean share of tokens that matter in a layer, `operations`
the mean of its square, which is what should be left of dense attention's time. Quality is
`bench_methods.py`'s business.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import records
from bench_decode import text_of
from methods_plot import draw_prefill

from kvstrata.engine.attention import AttentionState, LayerRows
from kvstrata.engine.batch import KVCache
from kvstrata.engine.model import Model
from kvstrata.engine.staged_cache import StagedCache
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.zipvl import ZipVL

LENGTHS = (1024, 2048, 4096, 8190)  # the model ends at 8,192
TAUS = (0.975, 0.9)
COLUMNS = (
    "method", "budget", "tokens", "kept", "operations", "attention_ms", "attention_speedup",
    "prefill_ms", "prefill_speedup",
)  # fmt: skip


class TimedCache:
    """A cache that notes how long each layer's attention takes."""

    def __init__(self, held: KVCache) -> None:
        self._held = held
        self.attention_s = 0.0

    @property
    def length(self) -> int:
        """Tokens that have passed."""
        return self._held.length

    @length.setter
    def length(self, length: int) -> None:
        self._held.length = length

    def begin(self, num_tokens: int, rows: LayerRows = ()) -> AttentionState:
        """Return the attention of a pass; see ``KVCache``."""
        return _TimedState(self, self._held.begin(num_tokens, rows))

    def advance(self, num_tokens: int) -> None:
        """Count a pass; see ``KVCache``."""
        self._held.advance(num_tokens)


class _TimedState:
    def __init__(self, cache: TimedCache, state: AttentionState) -> None:
        self._cache = cache
        self._state = state
        self.rows = state.rows

    def attend(self, *given: Any) -> torch.Tensor:
        start = time.perf_counter()
        output = self._state.attend(*given)
        self._cache.attention_s += time.perf_counter() - start
        return output


def prefill(
    model: Model, ids: Sequence[int], tau: float | None
) -> tuple[float, float, list[float]]:
    """Return the seconds of a pass, those of its attention, and the share kept per layer."""
    cache: KVCache = model.new_cache(len(ids))
    staged = None
    if tau is not None:
        cache = staged = StagedCache(cache, Pipeline.of(ZipVL(tau=tau)))  # type: ignore[arg-type]
    timed = TimedCache(cache)
    start = time.perf_counter()
    model.forward(timed, ids)
    seconds = time.perf_counter() - start
    kept = [1.0]
    if staged is not None and staged.important is not None:
        kept = staged.important.float().mean(1).tolist()
    return seconds, timed.attention_s, kept


def rows_of(model: Model, ids: list[int], rounds: int, step: Any) -> list[dict[str, Any]]:
    """Return a row for dense attention and one per tau; all take turns."""
    runs: dict[float | None, list[tuple[float, float, list[float]]]] = {}
    for _ in range(rounds):
        for tau in (None, *TAUS):
            runs.setdefault(tau, []).append(prefill(model, ids, tau))
            step()
    rows = []
    for tau, found in runs.items():
        kept = found[0][2]
        of_dense = [
            [dense[i] / own[i] for dense, own in zip(runs[None], found, strict=True)]
            for i in (0, 1)
        ]
        rows.append(
            {
                "bench": "methods",
                "model": model.name,
                "method": "dense" if tau is None else "zipvl",
                "peer": tau is None,
                "budget": 1.0 if tau is None else tau,
                "tokens": len(ids),
                "kept": round(statistics.fmean(kept), 4),
                "operations": round(statistics.fmean(k * k for k in kept), 4),
                "attention_ms": round(1e3 * statistics.median(a for _, a, _ in found), 1),
                "attention_speedup": round(statistics.median(of_dense[1]), 3),
                "prefill_ms": round(1e3 * statistics.median(s for s, _, _ in found), 1),
                "prefill_speedup": round(statistics.median(of_dense[0]), 3),
                "spread": [round(min(of_dense[1]), 3), round(max(of_dense[1]), 3)],
                "rounds": rounds,
            }
        )
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, GGUF file or hub id (default: SmolLM2-135M)")
    parser.add_argument("--lengths", default="", metavar="N,M", help="in place of 1k to 8k")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="up to 2k tokens, one round")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    options = parser.parse_args(arguments)
    options.no_save = (
        options.quick or bool(options.model) or options.rounds < parser.get_default("rounds")
    )
    return options


def main() -> int:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    lengths = [int(n) for n in options.lengths.split(",") if n] or list(LENGTHS)
    if options.quick:
        lengths, options.rounds = [n for n in lengths if n <= 2048], 1
    model = Model.load(options.model)
    model.pack()
    facts = records.machine("transformers") | {"model": model.name, "dtype": str(model.spec.dtype)}
    found: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        bar = progress.add_task("", total=sum(lengths) * options.rounds * (1 + len(TAUS)))
        prefill(model, text_of(model.tokenizer, 512), TAUS[0])  # compiles what is compiled once
        for length in lengths:
            progress.update(bar, description=f"{length} tokens")
            ids = text_of(model.tokenizer, length)
            found += rows_of(model, ids, options.rounds, lambda n=length: progress.advance(bar, n))
            if not options.no_save:
                saved = records.joined("prefill", found, ("method", "budget", "tokens"), facts)
                records.save("prefill", saved, **facts)
                draw_prefill(saved, records.FOLDER)
    if options.json:
        for row in found:
            print(json.dumps(row))
        return 0
    table = Table(title="one prompt of real text, prefilled whole")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in found:
        table.add_row(*(str(row[name]) for name in COLUMNS))
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
