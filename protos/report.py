"""Filling in a request's cache report while it runs."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kvstrata.protos import tracing
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.inference_pb2 import CacheReport, ReadPlan, StageTime

_TIERS = ("", "dram", "redis", "ssd", "object")


class ReportClock:
    """Adds stages and recomputes of one node to a ``CacheReport``, and stages to the trace.

    Args:
        node: Its name.
        parent: ``traceparent`` of the stages' spans; the current span without it.

    Attributes:
        report: What has been recorded so far; the owner may set its other fields directly.
    """

    def __init__(self, node: str, parent: str | None = None) -> None:
        self.node = node
        self._parent = parent
        self.report = CacheReport()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record how long the body took, also when it raises."""
        start, begin = time.time(), time.perf_counter()
        try:
            with tracing.current(f"{self.node}.{name}", parent=self._parent):
                yield
        finally:
            self._add(name, start, time.perf_counter() - begin)

    def add(self, name: str, start_unix_s: float, seconds: float) -> None:
        """Record a stage that was timed elsewhere."""
        tracing.record(f"{self.node}.{name}", self._parent, start_unix_s, seconds)
        self._add(name, start_unix_s, seconds)

    def _add(self, name: str, start_unix_s: float, seconds: float) -> None:
        self.report.stages.append(
            StageTime(stage=name, node=self.node, start_unix_s=start_unix_s, seconds=seconds)
        )

    def recompute(self, reason: str, tokens: int) -> None:
        """Record that ``tokens`` were computed although they should have come from the cache."""
        self.report.recomputes.add(reason=reason, tokens=tokens)

    def read(
        self, choice: str, num_stored: int, num_fetched: int, predicted_s: float, seconds: float
    ) -> ReadPlan:
        """Record how stored blocks were read; return the record, for what comes later."""
        return self.report.read_plans.add(
            node=self.node,
            choice=choice,
            stored_blocks=num_stored,
            fetched_blocks=num_fetched,
            predicted_s=predicted_s,
            seconds=seconds,
        )

    def unencodable(self, num_blocks: int) -> None:
        """Record blocks that the codec could not represent, so that they were not stored."""
        if num_blocks:
            self.report.recomputes.add(reason="unencodable", tokens=num_blocks * BLOCK_TOKENS)


def merge_reports(into: CacheReport, other: CacheReport) -> None:
    """Add ``other``'s stages, recomputes and byte counts to ``into``; keep the farthest tier.

    Of the other fields the last one wins; of ``layer_bits`` the last that says anything.
    """
    fetched = into.bytes_fetched + other.bytes_fetched
    published = into.bytes_published + other.bytes_published
    committed = into.committed_blocks + other.committed_blocks
    coalesced = into.coalesced_tokens + other.coalesced_tokens
    tier = farthest_tier([into.tier, other.tier])
    bits = [*(other.layer_bits if any(other.layer_bits) else into.layer_bits or other.layer_bits)]
    into.MergeFrom(other)
    into.layer_bits[:] = bits
    into.tier = tier
    into.bytes_fetched, into.bytes_published = fetched, published
    into.committed_blocks, into.coalesced_tokens = committed, coalesced


def farthest_tier(tiers: Iterable[str]) -> str:
    """Return the tier that takes longest to read; one that we do not know counts as dram."""
    return max(tiers, key=lambda tier: _TIERS.index(tier) if tier in _TIERS else 1, default="")
