"""Claim: a batch decodes several times as fast as by transformers' ``generate``.

Tokens per second, time between tokens and bytes of KV, at several batches and lengths of cached
context. Every sequence of a batch holds its own copy of one prompt's blocks. Ours is the step loop
of a decode worker, sampling included; the peers are ``generate`` over a cache of the same prompt.
The row "frame" reads compressed blocks in place; the others hold them expanded, as presets do. The
row "prompts arriving" is of one batch beside which prompts of 2,048 tokens are computed and sealed
all the time. Transformers' QuantizedCache takes part where optimum-quanto is installed, vLLM on CPU
once ``make peers-vllm`` has installed it; vLLM's sequences share one prompt by its prefix cache,
and its bytes of KV are counted as if each had its own.
Systems take turns within a round, so that a slow moment of the machine hits all of them.
"""

import argparse
import asyncio
import json
import pydoc_data.topics
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import decode_ours
import decode_peers
import decode_plot
import records
import ttft_vllm
from child_peer import PeerError

from kvstrata.engine.gguf_conversion import converted_folder, read_model
from kvstrata.engine.loading import find_default_model
from kvstrata.engine.model import Model
from kvstrata.kernels.warmup import WORKER_OPS, warm_up

NUM_TOKENS = 33
SKIPPED = 2  # of the first intervals, while caches and tables are made
ROUNDS = 3
ARRIVING = {"balanced": (8, 2048)}  # beside which presets and points prompts arrive
ARRIVING_TOKENS = 2048
DISTURBED = ", prompts arriving"
POINTS = [(1, 512), (8, 512), (16, 512), (1, 2048), (8, 2048), (16, 2048), (1, 7936), (8, 7936)]


def text_of(tokenizer: Any, num_tokens: int) -> list[int]:
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 3000)
    return list(tokenizer.encode(text)[:num_tokens])


def figures(system: str, batch: int, cached: int, steps: list[float], kv: int) -> dict[str, Any]:
    """Return the row of one run.

    Args:
        system: Its name.
        batch: Sequences at once.
        cached: Tokens of context of each.
        steps: When the last token of each step came, seconds.
        kv: Bytes of KV at the end.
    """
    times = [1e3 * (b - a) for a, b in pairwise(steps)][SKIPPED:]
    return {
        "bench": "decode",
        "system": system,
        "batch": batch,
        "cached_tokens": cached,
        "tokens_per_s": round(1e3 * batch / statistics.fmean(times), 2),
        "tpot_p50_ms": round(statistics.median(times), 2),
        "tpot_p99_ms": round(sorted(times)[max(0, -(-99 * len(times) // 100) - 1)], 2),
        "kv_bytes": kv,
    }


class Bench:
    """Models of all systems, in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.ours = Model.load(dtype=dtype, device="cpu")
        self.ours.pack()
        warm_up((self.ours.spec.head_dim,), (dtype,), WORKER_OPS)
        self.methods = decode_ours.methods(self.ours)
        folder, name = find_default_model()
        self.peer = read_model(folder / name, dtype).eval()
        self.peer.generation_config.eos_token_id = None
        self.caches = {"transformers DynamicCache": 0}  # name to bits; 0: the model's dtype
        if decode_peers.has_quanto():
            self.caches["transformers QuantizedCache 4 bit"] = 4
        else:
            print("QuantizedCache is left out: optimum-quanto is missing", file=sys.stderr)
        self.name = str(dtype).removeprefix("torch.")
        self.vllm = self._start_vllm(converted_folder(folder / name, dtype))

    def _start_vllm(self, folder: Path) -> ttft_vllm.VLLM | None:
        """Start vLLM; None, and the reason on stderr, if it does not run here."""
        try:
            if not ttft_vllm.versions()["vllm"]:
                raise PeerError("make peers-vllm installs it")
            return ttft_vllm.VLLM(folder, self.name)
        except PeerError as error:
            print(f"vllm is left out: {error}", file=sys.stderr)
            return None

    def close(self) -> None:
        """End the peer that is a process."""
        if self.vllm is not None:
            self.vllm.close()

    def own(
        self, preset: str, batch: int, cached: int, *, disturbed: bool = False
    ) -> dict[str, Any]:
        """Return the row of one run of ours, ``disturbed`` by prompts that arrive."""
        tokens = text_of(self.ours.tokenizer, cached + 1 + ARRIVING_TOKENS)
        prompt, others = tokens[: cached + 1], tokens[-ARRIVING_TOKENS:] if disturbed else []
        method = self.methods[preset]
        run = asyncio.run(decode_ours.decode(self.ours, method, prompt, batch, NUM_TOKENS, others))
        steps = [max(times) for times in zip(*run.steps_s, strict=True)]
        name = f"kvstrata {preset}" + (DISTURBED if disturbed else "")
        return figures(name, batch, cached, steps, run.kv_bytes)

    def peers(self, batch: int, cached: int) -> list[dict[str, Any]]:
        """Return the rows of the peers."""
        prompt = text_of(self.ours.tokenizer, cached + 1)
        dense = decode_peers.prefill(self.peer, prompt)
        rows = []
        for system, nbits in self.caches.items():
            cache = decode_peers.repeated(dense, batch)
            if nbits:
                cache = decode_peers.quantised(self.peer, cache, nbits)
            steps, kv = decode_peers.decode(self.peer, cache, prompt, batch, NUM_TOKENS)
            rows.append(figures(system, batch, cached, steps, kv))
        if self.vllm is not None:
            task = {"prompt": prompt, "batch": batch, "tokens": NUM_TOKENS}
            steps = self.vllm.ask("decode", **task)["steps"]
            kv = batch * (cached + NUM_TOKENS) * self.ours.spec.kv_bytes_per_token_bf16
            kv = kv * self.ours.spec.dtype.itemsize // 2
            version = {"version": ttft_vllm.versions()["vllm"]}
            rows.append(figures("vllm", batch, cached, steps, kv) | version)
        return rows


def measure(points: list[tuple[int, int]], dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    bench = Bench(dtype)
    try:
        return _measure(bench, points, rounds)
    finally:
        bench.close()


def _measure(bench: Bench, points: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for batch, cached in points:
        for _ in range(rounds):
            rows = [bench.own(preset, batch, cached) for preset in bench.methods]
            rows += [
                bench.own(preset, batch, cached, disturbed=True)
                for preset, point in ARRIVING.items()
                if point == (batch, cached)
            ]
            for row in rows + bench.peers(batch, cached):
                found.setdefault((row["system"], batch, cached), []).append(row)
        for key, rows in found.items():
            if key[1:] == (batch, cached):
                print(json.dumps(median(rows)), file=sys.stderr, flush=True)
    return [median(rows) | {"dtype": bench.name} for rows in found.values()]


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the run in the middle by throughput, with the spread of all."""
    ordered = sorted(rows, key=lambda row: row["tokens_per_s"])
    rates = [row["tokens_per_s"] for row in ordered]
    return ordered[(len(rows) - 1) // 2] | {"tokens_per_s_min_max": [rates[0], rates[-1]]}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each point, our throughput and bytes as shares of transformers'."""
    at = {(r["system"], r["batch"], r["cached_tokens"]): r for r in rows}
    found = []
    for (system, batch, cached), row in at.items():
        dense = at.get(("transformers DynamicCache", batch, cached))
        if dense is None or not system.startswith("kvstrata"):
            continue
        what = {"bench": "decode", "summary": system, "batch": batch, "cached_tokens": cached}
        if system.endswith(DISTURBED):
            calm = at.get((system.removesuffix(DISTURBED), batch, cached))
            if calm is not None:
                ratio = round(row["tpot_p99_ms"] / calm["tpot_p99_ms"], 2)
                found.append(what | {"p99_of_undisturbed": ratio})
            continue
        bf16 = dense["kv_bytes"] * (1 if row["dtype"] == "bfloat16" else 0.5)
        what["times_transformers"] = round(row["tokens_per_s"] / dense["tokens_per_s"], 2)
        if (vllm := at.get(("vllm", batch, cached))) is not None:
            what["times_vllm"] = round(row["tokens_per_s"] / vllm["tokens_per_s"], 2)
        found.append(what | {"kv_of_bf16": round(row["kv_bytes"] / bf16, 4)})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one short point, not saved")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="others are not saved")
    parser.add_argument("--points", help="such as 8x2048,1x512; kept rows of other points stay")
    options = parser.parse_args()
    points = [(2, 256)] if options.quick else POINTS
    if options.points:
        points = [tuple(map(int, p.split("x"))) for p in options.points.split(",")]  # type: ignore[misc]
    rows = measure(points, getattr(torch, options.dtype), options.rounds)
    if not options.quick and options.rounds == ROUNDS:
        facts = records.machine("transformers", "optimum-quanto", "numba")
        facts |= {"rounds": options.rounds, "new_tokens": NUM_TOKENS}
        keys = ("system", "batch", "cached_tokens", "dtype")
        rows = records.joined("decode", rows, keys, facts)
        records.save("decode", rows, **facts)
        decode_plot.draw(rows, records.FOLDER / "decode.png")
    if options.json:
        for row in [*rows, *summary(rows)]:
            print(json.dumps(row))
        return 0
    table = Table(title="decoding")
    columns = [key for key in rows[0] if key != "bench"]
    for key in columns:
        table.add_column(key)
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    Console(width=160).print(table)
    for line in summary(rows):
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
