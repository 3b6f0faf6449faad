"""What has happened since start: the one source of ``Stats``, of the metrics port and of tests.

Counters only grow, and their names end in ``_total``; times fall into buckets. The labels of a name
are fixed, and their values come from small sets: where a name has a ``tenant``, it is the caller's
(``call_context``), and beyond ``MAX_TENANTS`` of them further ones are "other".
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterator

from kvstrata.protos import call_context
from kvstrata.protos.admin_pb2 import Counter, Histogram

HITS = "hits_total"  # tenant, tier
MISSES = "misses_total"  # tenant, reason
WANTED = "wanted_strata_total"  # tenant
ABANDONED = "abandoned_strata_total"  # tenant
PUTS = "puts_total"  # tenant, outcome, reason
EVICTIONS = "evictions_total"  # tier, reason
SHED_BYTES = "shed_bytes_total"  # tier
CORRUPT = "corrupt_total"  # tier
TIER_ERRORS = "tier_errors_total"  # tier
RECEIVED_BYTES = "received_bytes_total"  # tenant
SENT_BYTES = "sent_bytes_total"  # tenant
WAITS = "waits_total"  # tenant, outcome
OPENED = "opened_blocks_total"  # tenant, state
DELETIONS = "deletions_total"  # outcome
UNFINISHED = "unfinished_blocks_total"  # tenant, reason
ATTACHED = "attached_blocks_total"  # tenant, outcome
LOOKUPS = "lookups_total"  # tenant
LOOKUP_BLOCKS = "lookup_blocks_total"  # tenant, result
SEALS = "sealed_strata_total"  # tier, outcome
SHARED_READS = "shared_reads_total"
RETRIEVALS = "retrievals_total"
RETRIEVED_BLOCKS = "retrieved_blocks_total"  # result
REPRESENTATIVES_READ = "representatives_read_total"
WRITTEN_BEHIND = "written_behind_total"  # tier, outcome
REFUSALS = "refusals_total"  # tenant, reason
GIVEN_UP = "quota_evictions_total"  # tenant
RETENTIONS = "retained_blocks_total"  # tenant, outcome
RELEASED = "released_blocks_total"  # tenant
CALLS = "calls_total"  # tenant, method, code
TIER_BYTES = "tier_moved_bytes_total"  # tier, direction
REQUESTS = "requests_total"  # tenant, outcome; at a gateway, as all below
PROMPT_TOKENS = "prompt_tokens_total"  # tenant
CACHED_TOKENS = "cached_tokens_total"  # tenant
COALESCED_TOKENS = "coalesced_tokens_total"  # tenant
COALESCED_REQUESTS = "coalesced_requests_total"  # tenant
COMPUTED_TOKENS = "computed_tokens_total"  # tenant
GENERATED_TOKENS = "generated_tokens_total"  # tenant
RECOMPUTES = "recomputes_total"  # reason
RECOMPUTED_TOKENS = "recomputed_tokens_total"  # reason
FETCHED_BYTES = "fetched_bytes_total"
PUBLISHED_BYTES = "published_bytes_total"
COMMITTED_BLOCKS = "committed_blocks_total"
REPLAYS = "replays_total"
LAYER_EXECUTIONS = "layer_executions_total"  # of requests under SkipDecode
READ_PLANS = "read_plans_total"  # node, choice
REFINED_BLOCKS = "refined_blocks_total"

CALL_SECONDS = "call_seconds"  # method
TIER_SECONDS = "tier_operation_seconds"  # tier, operation
TTFT_SECONDS = "ttft_seconds"  # cached
TPOT_SECONDS = "tpot_seconds"
STAGE_SECONDS = "stage_seconds"  # node, stage
READ_PLAN_RATIO = "read_plan_ratio"  # node, choice; predicted over real time, in the same buckets

PER_TENANT = frozenset(
    {HITS, MISSES, WANTED, ABANDONED, PUTS, RECEIVED_BYTES, SENT_BYTES, WAITS, LOOKUPS}
    | {LOOKUP_BLOCKS, REFUSALS, GIVEN_UP, CALLS, REQUESTS, PROMPT_TOKENS, CACHED_TOKENS}
    | {COMPUTED_TOKENS, GENERATED_TOKENS, OPENED, UNFINISHED, ATTACHED}
    | {COALESCED_TOKENS, COALESCED_REQUESTS, RETENTIONS, RELEASED}
)
MAX_TENANTS = 100
OTHER = "other"
BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)

Labels = tuple[tuple[str, str], ...]


class Times:
    """How often something took how long.

    Attributes:
        counts: Observations up to each of ``BUCKETS_S``, each counted once; the last: longer ones.
        sum_s: Seconds of all together.
    """

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0


class Counters:
    """Numbers that only grow. One event loop owns them."""

    def __init__(self) -> None:
        self._values: Tally[tuple[str, Labels]] = Tally()
        self._times: dict[tuple[str, Labels], Times] = {}
        self._tenants: set[str] = set()

    def add(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add ``amount`` to the counter of that name and labels."""
        if name in PER_TENANT:
            labels["tenant"] = self._label(labels.get("tenant") or call_context.tenant.get())
        self._values[name, tuple(sorted(labels.items()))] += amount

    def _label(self, tenant: str) -> str:
        """Return the tenant's label."""
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                return OTHER
            self._tenants.add(tenant)
        return tenant

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Count one duration of that name and labels."""
        key = name, tuple(sorted(labels.items()))
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = Times()
        times.counts[bisect_left(BUCKETS_S, seconds)] += 1
        times.sum_s += seconds

    def observe_call(self, method: str, code: str, seconds: float) -> None:
        """Count one call of a service of ours; see ``protos.service.Observe``."""
        self.add(CALLS, method=method, code=code)
        self.observe(CALL_SECONDS, seconds, method=method)

    def get(self, name: str, **labels: str) -> int:
        """Return the sum over every counter of that name that carries ``labels``."""
        wanted = set(labels.items())
        return sum(
            n
            for (known, pairs), n in self._values.items()
            if known == name and wanted <= set(pairs)
        )

    def messages(self) -> Iterator[Counter]:
        """Yield every counter as the message of the contract, in stable order."""
        for (name, pairs), value in sorted(self._values.items()):
            yield Counter(name=name, labels=dict(pairs), value=value)

    def histograms(self) -> Iterator[Histogram]:
        """Yield every distribution of times as the message of the contract, in stable order."""
        for (name, pairs), times in sorted(self._times.items()):
            yield Histogram(
                name=name,
                labels=dict(pairs),
                bounds_s=BUCKETS_S,
                counts=times.counts,
                sum_s=times.sum_s,
            )
