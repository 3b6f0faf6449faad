"""Counters since start; names end in ``_total``, labels are fixed per name."""

from collections import Counter as Tally
from collections.abc import Iterator

from kvstrata.protos.admin_pb2 import Counter

HITS = "hits_total"  # tier
MISSES = "misses_total"  # reason
PUTS = "puts_total"  # outcome, reason
EVICTIONS = "evictions_total"  # tier
SHED_BYTES = "shed_bytes_total"  # tier
CORRUPT = "corrupt_total"  # tier
TIER_ERRORS = "tier_errors_total"  # tier
RECEIVED_BYTES = "received_bytes_total"
SENT_BYTES = "sent_bytes_total"
WAITS = "waits_total"  # outcome
LOOKUPS = "lookups_total"
LOOKUP_BLOCKS = "lookup_blocks_total"  # result
SHARED_READS = "shared_reads_total"
WRITTEN_BEHIND = "written_behind_total"  # tier, outcome


class Counters:
    """Numbers that only grow. Label values come from small fixed sets, never from a request."""

    def __init__(self) -> None:
        self._values: Tally[tuple[str, tuple[tuple[str, str], ...]]] = Tally()

    def add(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add ``amount`` to the counter of that name and labels."""
        self._values[name, tuple(sorted(labels.items()))] += amount

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
