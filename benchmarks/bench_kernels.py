"""Claim: packing and unpacking KV runs near the speed of memory, and attention reads packed blocks.

For blocks of SmolLM2 and of Llama-3-8B (8 of its layers), on made-up tokens: GB/s of bf16 KV in or
out, medians of 15 rounds, or 7. In a round every implementation runs once: ours, the eager torch
reference, memcpy, and quanto and hqq with 4 bits. `of_memcpy` and `of_limit` are medians of the
rounds' ratios. The limit is memcpy; for `encode`, `decode` and `colsum` the slower of memcpy and
the op's product by torch.bmm in bf16; for `attend`, SDPA over bf16 as the engine calls it, so
there `of_limit` is the speed-up. The reference, and hqq when it encodes, get a part of the layers.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import kernel_attend
import kernel_calibrated
import kernel_elements
import records
from kernel_peers import INSTALL, missing_peers
from kernel_rounds import MIN_ROUNDS, Contest, measure
from kernel_shapes import BLOCKS, SHAPES, TINY, Shape

NUM_THREADS = 2
ROUNDS = 15
QUICK_TOKENS = (2048, 8192)
PACKAGES = ("numba", "transformers", "optimum-quanto", "hqq")
GROUPS: dict[str, Callable[[Shape, int], Iterator[Contest]]] = {
    "unpack": kernel_elements.unpack,
    "fallback": kernel_elements.fallback,
    "calibrated": kernel_calibrated.contests,
    "byte-planes": kernel_elements.byte_planes,
    "rope": kernel_elements.rope,
    "colsum": kernel_elements.colsum,
    "attend": lambda shape, _: kernel_attend.contests(shape),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", default="", metavar="A,B", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--shapes", default="", metavar="A,B", help="beginnings of models' names")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="blocks of 64 tokens")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}, with --quick {MIN_ROUNDS}")
    parser.add_argument("--threads", type=int, default=NUM_THREADS)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and lengths")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument(
        "--no-save",
        action="store_true",
        help="leave results/ as it is; so does every option that changes what is measured",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="with --ops: keep the saved rows of other ops, of this machine and these versions",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, and its processor time: for a machine that others use as well",
    )
    options = parser.parse_args(arguments)
    free = {"json", "no_save", "update", "cpu_time"} | ({"ops"} if options.update else set())
    changed = (n for n in vars(options) if n not in free)
    options.no_save |= any(getattr(options, n) != parser.get_default(n) for n in changed)
    options.threads = 1 if options.cpu_time else options.threads
    options.rounds = options.rounds or (MIN_ROUNDS if options.quick else ROUNDS)
    unknown = [name for name in _names(options.ops) if name not in GROUPS]
    if unknown or options.rounds < 1 or options.blocks < 1 or options.threads < 1:
        parser.error(f"unknown ops: {unknown}, or a count below 1")
    options.chosen = [
        shape
        for shape in (*SHAPES, TINY)
        if any(shape.name.lower().startswith(n.lower()) for n in _names(options.shapes))
        or (shape is not TINY and not options.shapes)
    ]
    if not options.chosen:
        parser.error(f"no shape is named {options.shapes}")
    return options


def _names(option: str) -> list[str]:
    return [name for name in option.split(",") if name]


def contests(options: argparse.Namespace) -> Iterator[Callable[[], Iterator[Contest]]]:
    """Yield what makes the contests of one op and model; memory is held for one at a time."""
    for name in _names(options.ops) or GROUPS:
        for shape in options.chosen:
            if name == "attend" and options.quick:
                yield lambda s=shape: kernel_attend.contests(s, QUICK_TOKENS)
            else:
                yield lambda s=shape, g=GROUPS[name]: g(s, options.blocks)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all rows."""
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    found = []
    console = Console(stderr=True)
    every = list(contests(options))
    for make in track(every, "measuring", console=console, disable=options.json):
        for contest in make():
            found += measure(
                contest,
                options.rounds,
                time.process_time if options.cpu_time else time.perf_counter,
            )
    return found


def show(found: list[dict[str, Any]]) -> None:
    table = Table(title="GB/s of bf16 KV; ratios are medians of ratios within a round")
    for name in ("op", "shape", "tokens", "impl", "GB/s", "ms", "min", "max"):
        table.add_column(name, justify="left" if name in ("op", "shape", "impl") else "right")
    for name in ("of memcpy", "of limit", "against"):
        table.add_column(name, justify="left" if name == "against" else "right")
    last = None
    for row in found:
        place = (row["op"], row["shape"], row["tokens"])
        if last not in (None, place):
            table.add_section()
        first = [str(part) if part else "" for part in place] if place != last else [""] * 3
        last = place
        against = ", ".join(
            f"{name} {ratio:.1f}x"
            for name, ratio in row.get("over", {}).items()
            if name not in ("memcpy", "matmul", "matmul, base")
        )
        table.add_row(
            *first,
            row["impl"],
            f"{row['gbps']:.3g}",
            *(f"{1e3 * seconds:.3g}" for seconds in (row["seconds"], *row["spread"])),
            f"{row['of_memcpy']:.3f}",
            f"{row['of_limit']:.2f}",
            against,
            style="bold" if "over" in row else None,
        )
    Console(width=180).print(table)


def main() -> int:
    options = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    note = Console(stderr=True)
    left_out = [f"{name}: not installed here; {INSTALL}" for name in missing_peers()]
    for sentence in left_out:
        note.print(f"left out: {sentence}")
    found = run(options)
    if not options.no_save:
        facts = records.machine(*PACKAGES) | {
            "clock": "cpu" if options.cpu_time else "wall",
            "rounds": options.rounds,
            "blocks": options.blocks,
            "left_out": left_out,
        }
        rows = records.joined("kernels", found, ("op",), facts) if options.update else found
        records.save("kernels", rows, **facts)
    if options.json:
        for row in found:
            print(json.dumps(row))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
