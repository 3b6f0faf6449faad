"""What it is worth to begin on coarse blocks and refine them: first tokens over slow links.

    make bench-reading             # ARGS=--quick takes a minute and is not saved

A prompt of ``balanced`` lies in a store behind a link of so many megabytes per second, encoded with
the model's profile ("calibrated", whose BASE is most of the bytes) and as for a model that has none
("fallback", whose BASE is half of them). Each way to read it is carried out: all strata at once,
BASE alone ("fewer_strata"), BASE first and the rest behind it ("refine"), none ("recompute"). What
the planner chooses, from rates that it has measured itself on that link, is shown beside: for a
request without a limit, for one that wants its first token sooner than all strata can be there, and
for such a one with a short answer. The answer is that of all strata, forced on the others: their KL
against it tells what each token's distribution lost, those before and after the refinement.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import reading_plot
import records
from bench_ttft import prompts
from soak_proxy import Proxy

from kvstrata.decode_node.refinement import UNREFINED, refining
from kvstrata.engine.sampling import SamplingParams
from kvstrata.engine.sequence import RunningSequence
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.methods.presets import Method, from_preset
from kvstrata.prefill_node import Task, Worker, WorkerConfig
from kvstrata.prefill_node.flight import Flight
from kvstrata.prefill_node.prefill import PLANNED, carrying_out, load_cached, provide_blocks
from kvstrata.prefill_node.read_plan import ReadPlan, StoredBlock, fetch_all
from kvstrata.prefill_node.read_rates import MIN_SEEN, ReadRates, settings_of
from kvstrata.prefill_node.reading import plan_of, planned
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.report import ReportClock

BASE = Stratum.STRATUM_BASE
LINKS_MB_S = (50.0, 8.0, 3.0)
PROMPT_TOKENS, ANSWER_TOKENS, ROUNDS = 2048, 128, 3
SHORT_TOKENS = 2  # of an answer that ends before anything can be refined
QUICK_LINKS, QUICK_ROUNDS = (8.0,), 1
CHOICES = ("full", "refine", "fewer_strata", "recompute")
WANTS_S = 600.0


@dataclass
class Told:
    """One answer: seconds to its first token, to full precision, and the tokens' distributions."""

    first_s: float
    refined_s: float
    num_refined: int
    logits: torch.Tensor


class Reader:
    """A worker behind a link, and a prompt in the store."""

    def __init__(self, worker: Worker, link: Proxy, method: Method) -> None:
        self.worker = worker
        self.link = link
        self.method = method

    def task(self, prompt: Sequence[int]) -> Task:
        """Return a request that wants its answer some day."""
        sampling = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
        return Task("bench", tuple(prompt), self.method, sampling, time.time() + WANTS_S)

    async def publish(self, task: Task) -> Task:
        """Bring a prompt's blocks to the store, and return the task as a gateway would."""
        worker, clock, num_tokens = self.worker, ReportClock("bench"), len(task.prompt_ids)
        async with (
            worker.open(task, task.prompt_ids, 0, worker.steps.next_order()) as sequence,
            contextlib.aclosing(Flight(worker, sequence, task, clock)) as flight,
        ):
            sealed = await provide_blocks(
                worker, sequence, num_tokens // BLOCK_TOKENS, task, clock, flight, fetch_all(0)
            )
            await flight.publish(sealed)
        stored = tuple(StoredBlock(block.num_bytes, "dram") for block in sealed)
        return replace(task, stored=stored, expected_blocks=len(stored))

    async def learn(self, tasks: Sequence[Task]) -> None:
        """Forget what was measured, and measure this link, and computing and sealing, anew."""
        self.worker.rates = ReadRates()
        for task in tasks:
            await self.tell(task, fetch_all(len(task.stored)), [])
            await self.tell(task, ReadPlan("recompute", 0, len(task.stored)), [])

    async def tell(self, task: Task, plan: ReadPlan, forced: Sequence[int]) -> Told:
        """Read a prompt as a plan says and answer, with ``forced`` tokens if there are any."""
        worker, clock, begin = self.worker, ReportClock("bench"), time.perf_counter()
        rows: list[torch.Tensor] = []
        first_s = 0.0

        def choose(logits: torch.Tensor) -> int | None:
            nonlocal first_s
            first_s = first_s or time.perf_counter() - begin
            rows.append(logits.log_softmax(-1))
            if len(rows) == ANSWER_TOKENS:
                return None
            return forced[len(rows) - 1] if forced else int(logits.argmax())

        read = planned(task, plan)
        num_blocks = len(task.prompt_ids) // BLOCK_TOKENS
        cached = plan.num_fetched * BLOCK_TOKENS
        order = worker.steps.next_order()
        async with worker.open(read, task.prompt_ids, cached, order) as sequence:
            with carrying_out(plan, clock):
                blocks = await load_cached(worker, sequence, num_blocks, read, clock, plan)
                await self._compute(sequence, num_blocks, task, clock, plan)
            async with refining(worker, sequence, self.method, plan, blocks, clock):
                await worker.steps.generate(sequence, choose, lambda _: None)
        allowed = {"refine": UNREFINED + "late", "recompute": PLANNED}.get(plan.choice)
        if any(recompute.reason != allowed for recompute in clock.report.recomputes):
            raise AssertionError(f"{plan.choice}: {clock.report.recomputes}")
        told = clock.report.read_plans[0]
        return Told(first_s, told.refined_s, told.refined_blocks, torch.stack(rows))

    async def _compute(
        self,
        sequence: RunningSequence,
        num_blocks: int,
        task: Task,
        clock: ReportClock,
        plan: ReadPlan,
    ) -> None:
        async with contextlib.aclosing(Flight(self.worker, sequence, task, clock)) as flight:
            sealed = await provide_blocks(
                self.worker, sequence, num_blocks, task, clock, flight, plan
            )
        await self.worker.steps.settle(sequence, sealed)

    async def tell_all(
        self, tasks: Sequence[Task], told: Callable[[], None]
    ) -> dict[str, list[Told]]:
        """Read every prompt in every way; ``told`` is called after each."""
        found: dict[str, list[Told]] = {choice: [] for choice in CHOICES}
        for task in tasks:
            for choice, plan in self.plans(task).items():
                forced = found["full"][-1].logits.argmax(-1).tolist() if choice != "full" else []
                found[choice].append(await self.tell(task, plan, forced))
                told()
        return found

    def plans(self, task: Task) -> dict[str, ReadPlan]:
        """Return every way to read a prompt."""
        count, rest = len(task.stored), tuple(s for s in self.method.wanted if s != BASE)
        return {
            "full": fetch_all(count),
            "refine": ReadPlan("refine", count, count, (BASE,), refining=rest),
            "fewer_strata": ReadPlan("fewer_strata", count, count, (BASE,)),
            "recompute": ReadPlan("recompute", 0, count),
        }

    def chosen(self, task: Task) -> dict[str, ReadPlan]:
        """Return what the planner chooses, by what the request wants."""
        worker = self.worker
        precision = worker.rates.precision(
            settings_of(self.method.codec), (BASE,), self.method.codec.strata
        )
        patient = plan_of(worker, task, task.prompt_ids, task.stored)
        assert precision is not None, "BASE was never fetched"
        limit_s = patient.predicted_s * (1 + precision.share) / 2
        hasty = replace(task, coarsest=BASE, first_token_unix_s=time.time() + limit_s)
        short = replace(hasty, sampling=replace(task.sampling, max_tokens=SHORT_TOKENS))
        return {
            "patient": patient,
            "hasty": plan_of(worker, hasty, task.prompt_ids, task.stored),
            "hasty, short": plan_of(worker, short, task.prompt_ids, task.stored),
        }


async def measure(links: Sequence[float], rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Return a row per link and choice."""
    async with LocalStore() as store, Proxy(int(store.address.rpartition(":")[2])) as link:
        config = WorkerConfig(link.address, dtype="bfloat16", store_timeout_s=60.0, warm_up=True)
        worker = await asyncio.to_thread(Worker, config)
        profiles = worker.model.profile, None
        methods = [from_preset("balanced", profile=profile) for profile in profiles]
        bar = progress.add_task("links", total=len(methods) * len(links) * rounds * len(CHOICES))
        try:
            found = prompts(worker.model.tokenizer, (256, PROMPT_TOKENS), max(MIN_SEEN, rounds))
            rows = []
            for method in methods:
                reader = Reader(worker, link, method)
                link.byte_s = 0.0
                small = [await reader.publish(reader.task(p)) for p in found[256][:MIN_SEEN]]
                large = found[PROMPT_TOKENS][:rounds]
                tasks = [await reader.publish(reader.task(prompt)) for prompt in large]
                for mb_s in links:
                    link.byte_s = 1e-6 / mb_s
                    await reader.learn(small)
                    chosen = reader.chosen(tasks[0])
                    told = await reader.tell_all(tasks, lambda: progress.advance(bar))
                    rows += [*_rows(method.codec.name, mb_s, told, chosen)]
            return rows
        finally:
            await worker.close()


def _rows(
    codec: str, mb_s: float, told: dict[str, list[Told]], chosen: dict[str, ReadPlan]
) -> Iterator[dict[str, Any]]:
    for choice, all_told in told.items():
        kl = [
            _kl(full.logits, own.logits) for full, own in zip(told["full"], all_told, strict=True)
        ]
        curve = torch.stack(kl).mean(0)
        plans = {wants: plan for wants, plan in chosen.items() if plan.choice == choice}
        yield {
            "bench": "reading",
            "codec": codec,
            "link_mb_s": mb_s,
            "choice": choice,
            "prompt_tokens": PROMPT_TOKENS,
            "ttft_ms": _ms(own.first_s for own in all_told),
            "refined_ms": _ms(own.refined_s for own in all_told),
            "refined_blocks": min(own.num_refined for own in all_told),
            "chosen_for": sorted(plans),
            "predicted_ms": round(1e3 * next((p.predicted_s for p in plans.values()), 0.0), 1),
            "kl_first": float(curve[0]),
            "kl_first_half": float(curve[: ANSWER_TOKENS // 2].mean()),
            "kl_second_half": float(curve[ANSWER_TOKENS // 2 :].mean()),
            "kl_by_token": [round(float(x), 6) for x in curve],
        }


def _ms(seconds: Iterator[float]) -> float:
    return round(1e3 * statistics.median(seconds), 1)


def _kl(wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence of each token's distribution."""
    return (wanted.exp() * (wanted - got)).sum(-1)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(title=f"{PROMPT_TOKENS} stored tokens over a slow link")
    for name in ("codec", "MB/s", "choice", "chosen for", "first token ms", "refined ms"):
        table.add_column(name)
    table.add_column("KL, 1st half")
    table.add_column("2nd half")
    for row in rows:
        table.add_row(
            row["codec"],
            f"{row['link_mb_s']:g}",
            row["choice"],
            "; ".join(row["chosen_for"]),
            f"{row['ttft_ms']:.0f}",
            f"{row['refined_ms']:.0f}" if row["refined_ms"] else "",
            f"{row['kl_first_half']:.4f}",
            f"{row['kl_second_half']:.4f}",
        )
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--quick", action="store_true", help="one link, one round, not saved")
    options = parser.parse_args()
    links, rounds = (QUICK_LINKS, QUICK_ROUNDS) if options.quick else (LINKS_MB_S, ROUNDS)
    with Progress(console=Console(stderr=True), disable=options.json) as progress:
        rows = asyncio.run(measure(links, rounds, progress))
    if not options.quick:
        facts = records.machine("grpcio", "numba", "transformers")
        records.save("reading", rows, **facts, model="SmolLM2-135M-Instruct", rounds=rounds)
        reading_plot.draw(rows, records.FOLDER / "reading.png")
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
