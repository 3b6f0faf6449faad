"""Half an hour of load and faults: what three stores and a Redis promise, and whether it held.

    make soak                              # 30 minutes; --quick takes 20 s, --seed N replays

Eight writers and sixteen readers work on two stores that share a Redis and on a small one that has
none, while every 5 s something fails: Redis or a store is killed and started again, or stopped;
bits are flipped on disk and in Redis; a disk is filled; connections are held or cut. Clients record
what they were told (``soak_traffic.py``), faults what they did (``soak_faults.py``), and afterwards
``soak_validator.py`` replays that history against what the store promises. Exit code 1 if a promise
was broken.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import records
import redis.asyncio
from soak_blocks import STRATA, STREAM_BLOCKS
from soak_faults import FAULTS, Faults
from soak_history import Event, History, read
from soak_plot import draw
from soak_servers import MIB, Arena, Sizes, StoreProcess
from soak_traffic import STREAMS_PER_WRITER, Traffic
from soak_validator import Report, validate

from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.protos import admin_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.errors import KVStrataError, from_rpc_error
from kvstrata.protos.service import CALL_METADATA, open_channel

SECONDS, QUICK_SECONDS = 1800.0, 20.0
WRITERS, READERS = 8, 16
FAULT_EVERY_S = 5.0
HEAL_S = 60.0
# What a process may take beyond what it keeps on purpose: interpreter, gRPC, frames on their way.
BASE_RSS_BYTES = 160 * MIB
PACKAGES = ("grpcio", "redis", "protobuf")


def bounds(sizes: Sizes, num_writers: int) -> dict[str, dict[str, int]]:
    """Return how much memory and disk each process may take.

    Of what waits for a tier that does not answer there is at most one writing of each block, in
    each of two queues; Redis keeps its own overhead a value on top of the bytes that are counted.
    """
    block = sum(STRATA.values()) + 8192
    behind = 2 * num_writers * STREAMS_PER_WRITER * STREAM_BLOCKS * block
    return {
        "rss": {
            "a": BASE_RSS_BYTES + 2 * sizes.dram + behind,
            "b": BASE_RSS_BYTES + 2 * sizes.dram + behind,
            "c": BASE_RSS_BYTES + 2 * sizes.small_dram + sizes.small_ssd,
        },
        "disk": {"a": sizes.ssd, "b": sizes.ssd, "c": sizes.small_ssd},
        "redis": {"redis": int(1.5 * sizes.redis)},
    }


class Soak:
    """One run.

    Args:
        folder: Where history and logs go.
        seconds: How long faults go on.
        seed: Chooses what clients and faults do.
        writers: How many clients write.
        readers: How many clients read.
        fault_every_s: From one fault to the next.
        kinds: Which faults.
        on_second: Called about every second, with the last fault.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seconds: float,
        seed: int,
        writers: int = WRITERS,
        readers: int = READERS,
        fault_every_s: float = FAULT_EVERY_S,
        kinds: Sequence[str] = FAULTS,
        on_second: Callable[[float, str], None] = lambda now, fault: None,
    ) -> None:
        self._folder = folder
        self._seconds = seconds
        self._seed = seed
        self._writers = writers
        self._readers = readers
        self._fault_every_s = fault_every_s
        self._kinds = kinds
        self._on_second = on_second
        self._fault = ""
        self._sizes = Sizes()
        self.path = folder / "history.jsonl"

    async def run(self) -> tuple[list[Event], Report]:
        """Run, and return what happened and what it means."""
        history = History(self.path)
        max_lag_s = 0.0
        try:
            async with Arena(self._sizes, self._folder).running() as arena:
                max_lag_s = await self._work(arena, history)
                await self._end(arena, history)
        finally:
            history.add(
                "facts",
                seed=self._seed,
                seconds=self._seconds,
                writers=self._writers,
                readers=self._readers,
                fault_every_s=self._fault_every_s,
                max_lag_s=round(max_lag_s, 2),
                disks_can_be_filled=all(s.disk.can_be_filled for s in arena.stores.values()),
                bounds=bounds(self._sizes, self._writers),
            )
            history.close()
        events = await asyncio.to_thread(read, self.path)
        return events, await asyncio.to_thread(validate, events)

    async def _work(self, arena: Arena, history: History) -> float:
        addresses = {name: store.front.address for name, store in arena.stores.items()}
        traffic = Traffic(addresses, history, self._seed)
        faults = Faults(arena, history, self._seed, self._fault_every_s, traffic.names, self._kinds)
        faults.on_fault = self._note
        watching = asyncio.create_task(self._watch(arena, history))
        working = asyncio.create_task(traffic.run(self._writers, self._readers))
        failing = asyncio.create_task(faults.run())
        try:
            await asyncio.wait([working, failing], timeout=self._seconds)
            faults.stopping.set()
            await failing
            self._note("healing")
            await self._settle(arena, history)
            traffic.stopping.set()
            await working
            self._note("reading everything")
            for store in ("a", "b"):
                await traffic.sweep(store)
        finally:
            for task in (failing, working, watching):
                task.cancel()
            results = await asyncio.gather(failing, working, watching, return_exceptions=True)
        for result in results[:2]:
            if isinstance(result, Exception):
                raise result
        return self._max_lag_s

    def _note(self, fault: str) -> None:
        self._fault = fault

    async def _watch(self, arena: Arena, history: History) -> None:
        """Take a sample a second, and see how late this process itself is."""
        self._max_lag_s = 0.0
        while True:
            begin = history.now()
            await asyncio.sleep(1)
            self._max_lag_s = max(self._max_lag_s, history.now() - begin - 1)
            rss = {name: store.rss_bytes() for name, store in arena.stores.items()}
            disk = {
                name: await asyncio.to_thread(store.disk.used_bytes)
                for name, store in arena.stores.items()
            }
            sizes: dict[str, Any] = {"rss": rss, "disk": disk}
            if arena.redis_is_up:
                with contextlib.suppress(redis.asyncio.RedisError, OSError):
                    sizes["redis"] = {"redis": await self._redis_bytes(arena)}
            history.add("sample", t=round(history.now(), 2), bytes=sizes)
            self._on_second(history.now(), self._fault)

    async def _redis_bytes(self, arena: Arena) -> int:
        client = redis.asyncio.Redis(port=arena.redis.port, socket_timeout=1)
        async with client:
            return int((await client.info("memory"))["used_memory"])

    async def _settle(self, arena: Arena, history: History) -> None:
        """Wait until every store says that all is well."""
        deadline = history.now() + HEAL_S
        problems: list[str] = []
        while history.now() < deadline:
            problems = []
            for name, store in arena.stores.items():
                try:
                    health = (await stats(store)).health
                except KVStrataError as error:
                    health = str(error)
                if health != "ok":
                    problems.append(f"store {name} did not heal in {HEAL_S:.0f} s: {health}")
            if not problems:
                return
            await asyncio.sleep(0.5)
        history.add("end", t=history.now(), problems=problems)

    async def _end(self, arena: Arena, history: History) -> None:
        """Check what must be true when nothing happens any more, then stop everything."""
        problems: list[str] = []
        for name, store in arena.stores.items():
            told = await stats(store)
            if told.in_flight_puts or told.pinned_bytes:
                problems.append(
                    f"store {name} ends with {told.in_flight_puts} puts and "
                    f"{told.pinned_bytes} pinned bytes"
                )
            problems += [
                f"store {name} evicted {tier.evictions} blocks from {tier.tier}, which has room"
                for tier in told.tiers
                if name != "c" and tier.tier in ("ssd", "redis") and tier.evictions
            ]
            for tier in told.tiers:
                if tier.bytes > tier.capacity_bytes:
                    problems.append(f"tier {tier.tier} of {name} holds more than it may")
            code = await store.stop()
            if code:
                problems.append(f"store {name} ended with {code}")
        for name, store in arena.stores.items():
            problems += [f"disk of {name}: {p}" for p in await check_folder(store)]
        history.add("end", t=history.now(), problems=problems)


async def stats(store: StoreProcess) -> Any:
    async with open_channel(f"127.0.0.1:{store.port}") as channel:
        admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
        try:
            return await admin.Stats(admin_pb2.StatsRequest(), timeout=5, metadata=CALL_METADATA)
        except Exception as error:
            raise from_rpc_error(error, store.name) from None  # type: ignore[arg-type]


async def check_folder(store: StoreProcess) -> list[str]:
    """Return what is wrong with the folder of a store that has ended."""
    tier = SsdTier(
        str(store.disk.store_folder), capacity_bytes=1 << 40, max_stratum_bytes=256 * MIB
    )
    await tier.open()
    try:
        await tier.check_integrity()
        held = (await tier.usage()).blocks
        files = len(store.disk.files())
        return [] if held == files else [f"{files} files for {held} blocks"]
    except AssertionError as error:
        return [str(error)]
    finally:
        await tier.close()


def show(console: Console, report: Report, replay: str) -> None:
    table = Table(title="soak", show_header=False)
    for name, value in report.figures.items():
        table.add_row(name, ", ".join(f"{k} {v:,}" for k, v in value.items())
                      if isinstance(value, dict) else f"{value:,}")  # fmt: skip
    console.print(table)
    for violation in report.violations[:40]:
        console.print(f"[red]{violation}[/red]", highlight=False)
    if len(report.violations) > 40:
        console.print(f"... and {len(report.violations) - 40} more")
    verdict = "every promise held" if not report.violations else "promises were broken"
    console.print(f"{verdict}; replay: {replay}", highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS:.0f} s")
    parser.add_argument("--seed", type=int, default=None, help="repeat the run that printed it")
    parser.add_argument("--faults", default=",".join(FAULTS), help="only these, by comma")
    parser.add_argument("--folder", type=Path, default=None, help="keep history and logs there")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = parser.parse_args()
    seconds = QUICK_SECONDS if options.quick else options.seconds
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3), "big")
    kinds = options.faults.split(",")
    if unknown := set(kinds) - set(FAULTS):
        parser.error(f"unknown faults {', '.join(sorted(unknown))}; use {', '.join(FAULTS)}")
    replay = f"make soak SOAK='--seed {seed} --seconds {seconds:g}"
    replay += "'" if len(kinds) == len(FAULTS) else f" --faults {options.faults}'"
    console = Console(stderr=options.json)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
        )
        bar = progress.add_task("starting", total=seconds)

        def on_second(now: float, fault: str) -> None:
            progress.update(bar, completed=min(now, seconds), description=f"{fault:18}")

        soak = Soak(folder, seconds=seconds, seed=seed, kinds=kinds, on_second=on_second)
        events, report = asyncio.run(soak.run())
        progress.stop()
        facts = next(e for e in events if e["kind"] == "facts")
        row = {
            "bench": "soak",
            "seed": seed,
            "seconds": seconds,
            "violations": len(report.violations),
            **report.figures,
        }
        if options.json:
            print(json.dumps(row))
        if (seconds >= SECONDS and options.folder is None) or os.environ.get("KVSTRATA_SAVE_SOAK"):
            records.save(
                "soak",
                [row, *({"violation": str(v)} for v in report.violations)],
                **records.machine(*PACKAGES),
                replay=replay,
                bounds=facts["bounds"],
            )
            draw(events, records.FOLDER / "soak.png")
        show(console, report, replay)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
