"""Claim: at the 2x setting of SkipDecode a batch gets at least 1.7 times the tokens per second.

The same batch of sequences over the same cached blocks, with all layers and by a schedule whose
budget falls over the tokens that are generated; both take turns within a round. Speed depends on
which layers run, not on the weights, so no adapter is needed here; quality does
(``kvstrata tune skipdecode``). The layers that ran are counted.
"""

import argparse
import asyncio
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import decode_ours
import records
from bench_decode import text_of

from kvstrata.engine.model import Model
from kvstrata.kernels.warmup import WORKER_OPS, warm_up
from kvstrata.methods.presets import Method
from kvstrata.methods.skipdecode import SkipDecode

POINTS = "1x2048,8x512,8x2048"
NUM_TOKENS = 65
SKIPPED = 2  # first intervals, while caches and tables are made


def skipping(method: Method, num_layers: int, speedup: float = 2.0) -> Method:
    """Return a method by the schedule of that speed-up, falling over ``NUM_TOKENS``."""
    schedule = SkipDecode.for_speedup(num_layers, speedup, decay_tokens=NUM_TOKENS - 2)
    return replace(method, skip=schedule)


def tokens_per_s(run: decode_ours.Run, batch: int) -> float:
    """Return the throughput of all steps but the first few."""
    steps = [max(times) for times in zip(*run.steps_s, strict=True)]
    return batch * (len(steps) - 1 - SKIPPED) / (steps[-1] - steps[SKIPPED])


def measure(batch: int, cached: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return the row of one batch over so many cached tokens each."""
    model = Model.load(dtype=dtype, device="cpu")
    model.pack()
    warm_up((model.spec.head_dim,), (dtype,), WORKER_OPS)
    dense = decode_ours.methods(model)["balanced"]
    skip = skipping(dense, model.spec.num_layers)
    prompt = text_of(model.tokenizer, cached + 1)
    rates: dict[str, list[float]] = {"dense": [], "skip": []}
    ran = 0
    for _ in range(rounds):
        for name, method in (("dense", dense), ("skip", skip)):
            run = asyncio.run(decode_ours.decode(model, method, prompt, batch, NUM_TOKENS))
            rates[name].append(tokens_per_s(run, batch))
            ran = run.layer_executions  # of the last, which skips
    ratios = sorted(s / d for s, d in zip(rates["skip"], rates["dense"], strict=True))
    assert skip.skip is not None
    return {
        "bench": "skipdecode",
        "batch": batch,
        "cached_tokens": cached,
        "dtype": str(dtype).removeprefix("torch."),
        "max_layers": skip.skip.max_layers,
        "min_layers": skip.skip.min_layers,
        "layer_executions": ran,
        "scheduled_executions": batch * skip.skip.executions(NUM_TOKENS - 1),
        "dense_executions": batch * (NUM_TOKENS - 1) * model.spec.num_layers,
        "tokens_per_s": round(statistics.median(rates["skip"]), 2),
        "dense_tokens_per_s": round(statistics.median(rates["dense"]), 2),
        "times_dense": round(statistics.median(ratios), 3),
        "times_dense_min_max": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def main() -> int:
    """Measure, and print a table, or one JSON object a point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", default=POINTS, help="batch x cached tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations")
    parser.add_argument("--quick", action="store_true", help="one point, two rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    options = parser.parse_args()
    is_whole = vars(options) == vars(parser.parse_args([])) | {"json": options.json}
    if options.quick:
        options.points, options.rounds = POINTS.split(",")[0], 2
    points = [tuple(map(int, point.split("x"))) for point in options.points.split(",")]
    dtype = getattr(torch, options.dtype)
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        rows = [
            measure(batch, cached, dtype, options.rounds)
            for batch, cached in progress.track(points, description="points")
        ]
    if is_whole:
        facts = records.machine("numba") | {"rounds": options.rounds, "new_tokens": NUM_TOKENS}
        records.save("skipdecode", rows, **facts)
    if options.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    columns = [name for name in rows[0] if name not in ("bench", "dtype")]
    table = Table(*columns, title="decoding at the 2x setting of SkipDecode")
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns))
    Console(width=160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
