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

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import decode_ours
import records
from bench_decode import text_of

from kvstrata.engine.model import Model
from kvstrata.kernels.warmup import WORKER_OPS, warm_up
from kvstrata.methods.presets import Method
from kvstrata.methods.skipdecode import SkipDecode

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
    for _ in range(rounds):
        for name, method in (("dense", dense), ("skip", skip)):
            run = asyncio.run(decode_ours.decode(model, method, prompt, batch, NUM_TOKENS))
            rates[name].append(tokens_per_s(run, batch))
    ratios = sorted(s / d for s, d in zip(rates["skip"], rates["dense"], strict=True))
    assert skip.skip is not None
    return {
        "bench": "skipdecode",
        "batch": batch,
        "cached_tokens": cached,
        "dtype": str(dtype).removeprefix("torch."),
        "max_layers": skip.skip.max_layers,
        "min_layers": skip.skip.min_layers,
        "layer_executions": skip.skip.executions(NUM_TOKENS - 1),
        "layers_of_dense": (NUM_TOKENS - 1) * model.spec.num_layers,
        "tokens_per_s": round(statistics.median(rates["skip"]), 2),
        "dense_tokens_per_s": round(statistics.median(rates["dense"]), 2),
        "times_dense": round(statistics.median(ratios), 3),
        "times_dense_min_max": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def main() -> int:
    """Measure, and print one row a point as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", default="1x2048,8x512,8x2048", help="batch x cached tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations")
    parser.add_argument("--save", action="store_true", help="write results/skipdecode.json")
    options = parser.parse_args()
    rows = []
    for point in options.points.split(","):
        batch, cached = map(int, point.split("x"))
        rows.append(measure(batch, cached, getattr(torch, options.dtype), options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if options.save:
        facts = records.machine("numba") | {"rounds": options.rounds, "new_tokens": NUM_TOKENS}
        records.save("skipdecode", rows, **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
