"""Replays the history of a soak and tells every promise that was broken. Touches no server.

What a store promises, and what this checks:

1. *Bytes*. Every stratum that is delivered is one that somebody had begun to put before the read
   ended, and all strata of one block in one read come from one writing.
2. *Durability*. A block that was acknowledged with a tier among its ``tiers`` is readable:

   * ``ssd``: from that store, until it is deleted, or its file is damaged. The store's death,
     Redis' death and a full disk change nothing.
   * ``redis``: from every store that shares the Redis, until it is deleted, its value is damaged,
     or Redis (which here keeps nothing on disk) dies. While Redis does not answer it may be missed;
     so it may after the store itself stood still, when its clocks ran out.
   * ``dram``: until it is evicted or the store ends; nothing is checked.

   Both tiers are larger than all streams that are written again, so nothing is evicted there.
   Every stratum that a Lookup told and leased is delivered to whoever asks within the lease, by
   every store, the small one included, unless one of the above happened, or the store died. (What
   was shed before, or deleted through another store, a Lookup does not tell.)
3. *Time*. Every call ends within its deadline and some slack.
4. *Silence*. A call fails only while its store is killed, paused or cut off, or right after; never
   by a defect of ours.
5. *Bounds*. Memory and disk stay within theirs, and no stream of calls dries up without a fault.
"""

import bisect
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from soak_blocks import FIRST_CHURN_STREAM, Name, digests
from soak_history import Event
from soak_traffic import LEASE_MS

SLACK_S = 4.0
RECOVERY_S = 10.0  # after a fault: reconnecting, listing, probing
STILL_S = 2.0  # a machine that let the clients wait for so long let the stores wait too
LINGER_S = 15.0  # a call that failed may still take effect for so long
GROWTH_BYTES = 24 << 20  # of a store's memory, from the middle third of a run to the last
NEVER = math.inf
UNREACHABLE = {"store_kill", "store_pause", "client_hold", "client_cut"}
SILENT_REDIS = {"redis_kill", "redis_pause", "redis_hold", "redis_cut"}


@dataclass(frozen=True)
class Violation:
    """A broken promise.

    Attributes:
        promise: "bytes", "durability", "time", "silence" or "bounds".
        t: When, in seconds since the start.
        what: What happened, with the names of block, store and client.
    """

    promise: str
    t: float
    what: str

    def __str__(self) -> str:
        return f"{self.t:8.2f} s  {self.promise}: {self.what}"


@dataclass
class Report:
    """What a history says.

    Attributes:
        violations: Broken promises; there should be none.
        figures: Counts and sizes.
    """

    violations: list[Violation] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Block:
    """What happened to one block in one place: a store's ssd, or Redis."""

    acks: list[tuple[float, float]] = field(default_factory=list)
    voids: list[tuple[float, float]] = field(default_factory=list)

    def is_promised(self, t0: float, t1: float) -> bool:
        """Return whether a read of [t0, t1] must find the block.

        So if it was acknowledged before the read began, and from the begin of that put to the end
        of the read nothing happened that ends the promise.
        """
        last_void = max((end for begin, end in self.voids if begin <= t1), default=-1.0)
        return any(begin > last_void and end < t0 for begin, end in self.acks)


class Validator:
    """Checks one history."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._facts = next((e for e in events if e["kind"] == "facts"), {})
        self._ops = [e for e in events if e["kind"] == "op"]
        self._faults = [e for e in events if e["kind"] == "fault"]
        self._samples = [e for e in events if e["kind"] == "sample"]
        self._ends = [e for e in events if e["kind"] == "end"]
        self._report = Report()

    def run(self) -> Report:
        """Check every promise."""
        self._check_bytes()
        self._check_durability()
        self._check_time()
        self._check_silence()
        self._check_bounds()
        self._count()
        self._report.violations.sort(key=lambda violation: violation.t)
        return self._report

    def _broken(self, promise: str, op: Event, what: str) -> None:
        where = f"{op.get('op', '')} {op.get('client', '')}@{op.get('store', '')}".strip("@ ")
        self._report.violations.append(Violation(promise, op["t0"], f"{where} {what}".strip()))

    def _check_bytes(self) -> None:
        put: dict[str, dict[int, float]] = defaultdict(dict)
        for op in self._ops:
            for block in op["blocks"] if op["op"] == "put" else ():
                begun = put[block["name"]]
                begun[block["version"]] = min(op["t0"], begun.get(block["version"], NEVER))
        known: dict[str, dict[str, tuple[int, int]]] = {}
        for op in self._ops:
            for block in op["blocks"] if op["op"] == "get" else ():
                name = block["name"]
                if name not in known:
                    known[name] = {
                        digest: (version, stratum)
                        for version in put[name]
                        for stratum, digest in digests(Name.parse(name), version).items()
                    }
                versions = set()
                for stratum, found in _delivered(block):
                    version, of_stratum = known[name].get(found, (-1, stratum))
                    if version < 0 or of_stratum != stratum:
                        self._broken("bytes", op, f"wrong bytes of {name}, stratum {stratum}")
                    elif put[name][version] > op["t1"]:
                        self._broken("bytes", op, f"{name} read before it was put")
                    versions.add(version)
                if len(versions) > 1:
                    self._broken("bytes", op, f"{name} mixes writings {sorted(versions)}")

    def _check_durability(self) -> None:
        places: dict[tuple[str, str], _Block] = defaultdict(_Block)
        redis_deaths = [(f["t0"], f["t1"]) for f in self._faults if f["fault"] == "redis_kill"]
        for op in self._ops:
            if op["op"] not in ("put", "delete"):
                continue
            until = op["t1"] + (LINGER_S if op["error"] else 0.0)
            for block in op["blocks"]:
                name = block["name"]
                if op["op"] == "delete":
                    for place in ("redis", op["store"]):
                        places[name, place].voids.append((op["t0"], until))
                    continue
                if block["outcome"] in ("committed", "exists", "kept"):
                    span = (op["t0"], op["t1"])
                    if "ssd" in block["tiers"]:
                        places[name, op["store"]].acks.append(span)
                    if "redis" in block["tiers"]:
                        places[name, "redis"].acks.append(span)
        for fault in self._faults:
            place = "redis" if fault["fault"] == "redis_flip" else fault["store"]
            for name in fault["names"]:
                places[name, place].voids.append((fault["t0"], NEVER))
        silent = {
            store: _Spans(
                (f["t0"], f["t1"])
                for f in self._faults
                if f["fault"] in SILENT_REDIS
                or (f["fault"] == "store_pause" and f["store"] == store)
            )
            for store in ("a", "b", "c")
        }
        deaths = _Spans(redis_deaths)
        self._promised = self._leased = 0
        for op in self._ops:
            if op["op"] != "get" or op["error"]:
                continue
            for block in op["blocks"]:
                if Name.parse(block["name"]).stream < FIRST_CHURN_STREAM:
                    self._check_read(op, block, places, silent[op["store"]], deaths)
                if "leased_t0" in op:
                    self._check_leased(op, block, places, silent[op["store"]])

    def _check_read(
        self,
        op: Event,
        block: dict[str, Any],
        places: dict[tuple[str, str], _Block],
        silent: "_Spans",
        deaths: "_Spans",
    ) -> None:
        span = (op["t0"], op["t1"])
        name = block["name"]
        promises = []
        if places[name, op["store"]].is_promised(*span):
            promises.append(f"ssd of {op['store']}")
        shared = places[name, "redis"]
        if not silent.touch(*span, RECOVERY_S):
            alive = _Block(
                [ack for ack in shared.acks if not deaths.touch(ack[0], span[1], 0.0)], shared.voids
            )
            if alive.is_promised(*span):
                promises.append("redis")
        if not promises:
            return
        self._promised += 1
        misses = {v for k, v in block.items() if k.isdecimal() and v.startswith("!")}
        if misses:
            told = ", ".join(sorted(m[1:] for m in misses))
            self._broken("durability", op, f"{name} is {told}; promised by {', '.join(promises)}")

    def _check_leased(
        self,
        op: Event,
        block: dict[str, Any],
        places: dict[tuple[str, str], _Block],
        silent: "_Spans",
    ) -> None:
        begin, end = op["leased_t0"], op["t1"]
        died = _Spans(
            (f["t0"], f["t1"])
            for f in self._faults
            if f["fault"] == "store_kill" and f["store"] == op["store"]
        )
        voids = [v for p in ("redis", op["store"]) for v in places[block["name"], p].voids]
        if (
            end - begin > LEASE_MS / 1000
            or died.touch(begin, end, 0.0)
            or silent.touch(begin, end, RECOVERY_S)
            or any(v0 <= end and v1 >= begin for v0, v1 in voids)
        ):
            return
        self._leased += 1
        misses = sorted(
            {
                v[1:]
                for k, v in block.items()
                if k.isdecimal() and v.startswith("!") and int(k) in block.get("leased", (int(k),))
            }
        )
        if misses:
            self._broken("durability", op, f"{block['name']} is {', '.join(misses)}; leased")

    def _check_time(self) -> None:
        lag = self._facts.get("max_lag_s", 0.0)
        for op in self._ops:
            took = op["t1"] - op["t0"]
            if took > op["timeout_s"] + SLACK_S + lag:
                self._broken("time", op, f"took {took:.1f} s of {op['timeout_s']:.1f} s")

    def _check_silence(self) -> None:
        cut_off = {
            store: _Spans(
                (f["t0"], f["t1"])
                for f in self._faults
                if f["fault"] in UNREACHABLE and f["store"] == store
            )
            for store in ("a", "b", "c")
        }
        stood_still = self._facts.get("max_lag_s", 0.0) > STILL_S
        for op in self._ops:
            if op["error"] == "DeadlineError" and stood_still:
                continue
            excused = cut_off[op["store"]].touch(op["t0"], op["t1"], RECOVERY_S)
            if op["error"] == "InternalError":  # a defect of ours, whatever else fails
                self._broken("silence", op, f"a defect: {op.get('message')}")
            elif op["error"] and not excused:
                what = f"failed while all was well: {op['error']}: {op.get('message')}"
                self._broken("silence", op, what)
            for block in op["blocks"] if op["op"] == "put" else ():
                if block["outcome"] == "rejected" and "throttled" not in block.get("reason", ""):
                    self._broken("silence", op, f"{block['name']} rejected: {block.get('reason')}")

    def _check_bounds(self) -> None:
        bounds = self._facts.get("bounds", {})
        for sample in self._samples:
            for kind, by_store in sample["bytes"].items():
                for store, num_bytes in by_store.items():
                    bound = bounds.get(kind, {}).get(store, NEVER)
                    if num_bytes > bound:
                        where = {"t0": sample["t"]}
                        what = f"{kind} of {store} is {num_bytes:,} bytes, bound {bound:,}"
                        self._broken("bounds", where, what)
        self._check_growth()
        for end in self._ends:
            for problem in end["problems"]:
                self._broken("bounds", {"t0": end["t"]}, problem)

    def _check_growth(self) -> None:
        """In a long run memory must not grow any more once it is warm."""
        third = len(self._samples) // 3
        for store in ("a", "b", "c") if third >= 100 else ():
            middle, last = [
                max(s["bytes"]["rss"].get(store, 0) for s in part)
                for part in (self._samples[third : 2 * third], self._samples[2 * third :])
            ]
            self._report.figures.setdefault("rss_growth_bytes", {})[store] = last - middle
            if last > middle + GROWTH_BYTES:
                what = f"rss of {store} grew from {middle:,} to {last:,} bytes"
                self._broken("bounds", {"t0": self._samples[-1]["t"]}, what)

    def _count(self) -> None:
        figures = self._report.figures
        ops: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        strata: Counter[str] = Counter()
        outcomes: Counter[str] = Counter()
        tiers: Counter[str] = Counter()
        for op in self._ops:
            ops[op["op"]] += 1
            failed[op["error"] or ""] += 1
            for block in op["blocks"]:
                if op["op"] == "put":
                    outcomes[block["outcome"]] += 1
                elif op["op"] == "get":
                    tiers[block.get("tier", "none")] += 1
                    for key, value in block.items():
                        if key.isdecimal():
                            strata["delivered" if value[0] != "!" else value[1:]] += 1
        del failed[""]
        figures["ops"] = dict(ops)
        figures["failed_ops"] = dict(failed)
        figures["strata"] = dict(strata)
        figures["put_outcomes"] = dict(outcomes)
        figures["read_from"] = dict(tiers)
        figures["promised_reads"], figures["leased_reads"] = self._promised, self._leased
        figures["faults"] = dict(Counter(f["fault"] for f in self._faults))
        figures["max_lag_s"] = self._facts.get("max_lag_s", 0.0)
        figures["damaged"] = sum(len(f["names"]) for f in self._faults)
        for kind in ("rss", "disk", "redis"):
            for store in ("a", "b", "c", "redis"):
                values = [s["bytes"].get(kind, {}).get(store, 0) for s in self._samples]
                if any(values):
                    figures.setdefault(f"max_{kind}_bytes", {})[store] = max(values)
        times = sorted(op["t1"] - op["t0"] for op in self._ops if not op["error"])
        if times:
            figures["p50_ms"] = round(1000 * times[len(times) // 2], 2)
            figures["p99_ms"] = round(1000 * times[int(len(times) * 0.99)], 2)
            figures["max_ms"] = round(1000 * times[-1], 1)


class _Spans:
    """Stretches of time, asked for often."""

    def __init__(self, spans: Iterable[tuple[float, float]]) -> None:
        self._spans = sorted(spans)
        self._begins = [begin for begin, _ in self._spans]

    def touch(self, t0: float, t1: float, after_s: float) -> bool:
        """Return whether [t0, t1] meets a stretch, each taken to last ``after_s`` longer."""
        last = bisect.bisect_right(self._begins, t1)
        return any(end + after_s >= t0 for _, end in self._spans[max(0, last - 8) : last])


def _delivered(block: dict[str, Any]) -> Iterable[tuple[int, str]]:
    for key, value in block.items():
        if key.isdecimal() and not value.startswith("!"):
            yield int(key), value


def validate(events: Sequence[Event]) -> Report:
    """Return what a history says about every promise."""
    return Validator(events).run()
