"""How long the first token takes: cold, and with the prompt's KV in each tier.

    make bench-ttft                # everything; ARGS=--quick takes minutes and is not saved
    make bench-ttft ARGS="--lengths 4096 --systems kvstrata,vllm"   # other saved rows stay

Ours is the whole service (``kvstrata up``: gateway, Ray, both nodes, store, Redis, ssd) when
asked over gRPC, under ``balanced`` and ``exact``. Beside it, on the same prompts, the same dtype
and with the same threads: our engine as a single process without codec, store or hand-over;
transformers; and, once ``make peers-vllm`` has installed them, vLLM on CPU (with its prefix cache
as ``warm-dram``) and vLLM with LMCache over Redis. Systems take turns within a round, so that a
slow moment of the machine hits all of them. ``cached_tokens`` is what a request did not compute.
"""

import argparse
import contextlib
import json
import pydoc_data.topics
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import records
import ttft_ours
import ttft_plot
import ttft_vllm
from child_peer import PeerError
from ttft_alone import SingleProcess, Transformers

from kvstrata.engine.gguf_conversion import converted_folder
from kvstrata.engine.loading import find_default_model

LENGTHS = (512, 1024, 2048, 4096, 7936)  # the model has 8192 positions; all are full blocks of all
SYSTEMS = ("kvstrata", "single", "transformers", "vllm", "lmcache")
ROUNDS = 3
QUICK_LENGTHS, QUICK_ROUNDS = (512, 1024), 1
PRESETS = ("balanced", "exact")
SETTLE_STEPS = 10  # a tenth of a second each

# System, state, seconds, tokens that came from a cache.
Found = tuple[str, str, float, int]
Ask = Callable[[Sequence[int]], Iterator[Found]]


def prompts(tokenizer: Any, lengths: Sequence[int], rounds: int) -> dict[int, list[list[int]]]:
    """Return prompts of real text by length, none of which begins as another does."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 3000)
    ids = list(tokenizer.encode(text))
    found: dict[int, list[list[int]]] = {n: [] for n in lengths}
    for turn in range(rounds + 1):  # the first warms up
        for n in lengths:
            first = (turn * 1999 + n * 7) % (len(ids) - n)
            found[n].append(ids[first : first + n])
    return found


def ours(service: ttft_ours.Service) -> Ask:
    def ask(prompt: Sequence[int]) -> Iterator[Found]:
        for preset in PRESETS:
            for state, seconds, report in service.states(prompt, preset):
                yield f"kvstrata {preset}", state, seconds, report.cached_tokens

    return ask


def alone(system: SingleProcess | Transformers) -> Ask:
    def ask(prompt: Sequence[int]) -> Iterator[Found]:
        yield system.name, "cold", system.ask(prompt)[0], 0

    return ask


def vllm(system: ttft_vllm.VLLM, name: str, state: str) -> Ask:
    def ask(prompt: Sequence[int]) -> Iterator[Found]:
        seconds, cached, _ = system.ttft(prompt)
        if cached:
            raise PeerError(f"{cached} tokens of a new prompt were cached")
        yield name, "cold", seconds, 0
        if state == "warm-redis":
            system.ask("settle", steps=SETTLE_STEPS)
        seconds, cached, _ = system.ttft(prompt)
        if not cached:
            raise PeerError("a prompt that was asked before was not cached")
        yield name, state, seconds, cached

    return ask


def start(stack: contextlib.ExitStack, names: Sequence[str], dtype: str) -> tuple[list[Ask], Any]:
    """Start the systems; say which are left out, and why. Returns them and the tokenizer."""
    single = SingleProcess(getattr(torch, dtype))
    asks: list[Ask] = []
    if "kvstrata" in names:
        asks.append(ours(stack.enter_context(ttft_ours.running(dtype))))
    if "single" in names:
        asks.append(alone(single))
    if "transformers" in names:
        asks.append(alone(Transformers(getattr(torch, dtype))))
    folder, name = find_default_model()
    model = converted_folder(folder / name, getattr(torch, dtype))
    installed = ttft_vllm.versions()
    for system in ("vllm", "lmcache"):
        if system not in names:
            continue
        if not installed["vllm"] or not installed[system]:
            print(f"{system} is left out: make peers-vllm installs it", file=sys.stderr)
            continue
        try:
            if system == "vllm":
                running = ttft_vllm.VLLM(model, dtype)
                stack.callback(running.close)
                asks.append(vllm(running, "vllm", "warm-dram"))
            else:
                port = stack.enter_context(ttft_vllm.lmcache_over_redis())
                running = ttft_vllm.VLLM(model, dtype, port)
                stack.callback(running.close)
                asks.append(vllm(running, "vllm + lmcache", "warm-redis"))
        except PeerError as error:
            print(f"{system} is left out: {error}", file=sys.stderr)
    return asks, single.tokenizer


def measure(
    names: Sequence[str], lengths: Sequence[int], rounds: int, dtype: str, progress: Progress
) -> list[dict[str, Any]]:
    times: dict[tuple[str, int, str], list[float]] = {}
    cached: dict[tuple[str, int, str], int] = {}
    bar = progress.add_task("starting", total=None)
    with contextlib.ExitStack() as stack:
        asks, tokenizer = start(stack, names, dtype)
        texts = prompts(tokenizer, lengths, rounds)
        progress.update(bar, total=len(lengths) * len(asks) * rounds + len(asks))
        for ask in asks:  # once for nothing: what is made at first use
            list(ask(texts[lengths[0]][0]))
            progress.advance(bar)
        for n in lengths:
            for turn in range(rounds):
                for place in range(len(asks)):
                    progress.update(bar, description=f"{n} tokens, round {turn + 1}")
                    for system, state, seconds, hit in asks[(turn + place) % len(asks)](
                        texts[n][turn + 1]
                    ):
                        times.setdefault((system, n, state), []).append(1e3 * seconds)
                        cached[system, n, state] = hit
                    progress.advance(bar)
    return [
        {
            "bench": "ttft",
            "system": system,
            "state": state,
            "prompt_tokens": n,
            "ttft_ms": round(statistics.median(found), 1),
            "ttft_ms_min_max": [round(min(found), 1), round(max(found), 1)],
            "cached_tokens": cached[system, n, state],
            "dtype": dtype,
        }
        for (system, n, state), found in times.items()
    ]


def marks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratios that are aimed at, for every length at which both sides were measured."""
    at = {(r["system"], r["state"], r["prompt_tokens"]): r["ttft_ms"] for r in rows}
    pairs = (
        ("cold, of a single process", "cold", ("kvstrata single process", "cold"), 1.15),
        ("warm-redis, of cold", "warm-redis", (None, "cold"), 0.1),
        ("warm-redis, of vLLM + LMCache", "warm-redis", ("vllm + lmcache", "warm-redis"), 0.7),
    )
    found = []
    for n in sorted({row["prompt_tokens"] for row in rows}):
        for system in (f"kvstrata {preset}" for preset in PRESETS):
            for what, state, (peer, peer_state), aim in pairs:
                own, other = at.get((system, state, n)), at.get((peer or system, peer_state, n))
                if own and other:
                    line = {"bench": "ttft", "summary": what, "system": system}
                    found.append(line | {"prompt_tokens": n, "ratio": round(own / other, 3)})
                    found[-1]["aim"] = aim
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    lengths = sorted({row["prompt_tokens"] for row in rows})
    table = Table(title="milliseconds to the first token, by tokens of the prompt")
    for column in ("system", "state", *map(str, lengths)):
        table.add_column(column)
    at = {(r["system"], r["state"], r["prompt_tokens"]): r["ttft_ms"] for r in rows}
    for system, state in dict.fromkeys((r["system"], r["state"]) for r in rows):
        cells = (at.get((system, state, n), "-") for n in lengths)
        table.add_row(system, state, *map(str, cells))
    Console(width=120).print(table)
    for line in marks(rows):
        print(json.dumps(line))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="short prompts, not saved")
    parser.add_argument("--lengths", help="such as 512,4096")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--dtype", default="bfloat16", help="of weights, activations and KV")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="others are not saved")
    options = parser.parse_args()
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    if options.lengths:
        lengths = tuple(map(int, options.lengths.split(",")))
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    names = options.systems.split(",")
    if unknown := set(names) - set(SYSTEMS):
        parser.error(f"unknown system {sorted(unknown)[0]!r}; there are {', '.join(SYSTEMS)}")
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        rows = measure(names, lengths, rounds, options.dtype, progress)
    if not options.quick and rounds == ROUNDS:
        facts = records.machine("transformers", "grpcio", "ray", "redis", "numba")
        facts |= ttft_vllm.versions() | {"model": "SmolLM2-135M-Instruct", "rounds": rounds}
        keys = ("system", "state", "prompt_tokens", "dtype")
        saved = records.joined("ttft", rows, keys, facts)
        records.save("ttft", saved, **facts)
        ttft_plot.draw(saved, records.FOLDER / "ttft.png")
    if options.json:
        for row in [*rows, *marks(rows)]:
            print(json.dumps(row))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
