"""What each tenant uses at present, and the refusal when it is too much.

Three limits, each off at 0. *Requests*: a token bucket of one second's worth. *In flight*: bytes
being received for a tenant and bytes read for it that are not sent yet. At the limit a Put is
refused, while a Get only stops reading ahead: stores give way to reads. *Stored*: bytes of the
blocks that this process accepted, in whatever tier, until they are deleted or given up. A tenant at
that limit gives up its own blocks, the least recently used first; pinned ones stay, and when they
leave no room the Put is refused. What a tier evicted counts until its turn comes, which is soon: it
is among the least recently used there too.

Not covered: blocks that another process accepted, or this one before its last start.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstrata.kvstore_service.counters import GIVEN_UP, REFUSALS, Counters
from kvstrata.kvstore_service.departures import QUOTA
from kvstrata.kvstore_service.pin_table import Clock, PinTable
from kvstrata.kvstore_service.tenants import Tenant
from kvstrata.protos.errors import MAX_RETRY_AFTER_S, RETRY_AFTER, ThrottledError
from kvstrata.protos.identity import BlockKey

_RETRY_IN_FLIGHT_S = 0.1
_RETRY_STORED_S = 5.0
_BATCH = 64


class Keeper(Protocol):
    """What keeps the blocks: the store."""

    pins: PinTable

    async def delete(self, keys: Sequence[BlockKey], *, reason: str) -> int:
        """Forget blocks in every tier, and remember why."""
        ...


@dataclass(slots=True)
class Room:
    """A place for one block.

    Attributes:
        kept: Whether the block stays counted; set it when the block is, or may be, committed.
    """

    kept: bool = False


class TokenBucket:
    """Permits that come at a steady rate and are kept for one second at most.

    At 2 a second: three calls at once take two permits, the third is told to wait 0.5 s.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._permits = float("inf")
        self._at_s = clock()

    def take(self, per_s: float) -> float:
        """Take a permit and return 0, or take none and return the seconds until there is one."""
        now_s = self._clock()
        most = max(per_s, 1.0)
        self._permits = min(most, self._permits + (now_s - self._at_s) * per_s)
        self._at_s = now_s
        if self._permits >= 1:
            self._permits -= 1
            return 0.0
        return (1 - self._permits) / per_s


class Usage:
    """What one tenant uses.

    Attributes:
        in_flight_bytes: Being received for it, or read and not yet sent.
        stored_bytes: Of its blocks that count.
    """

    def __init__(self, clock: Clock) -> None:
        self.bucket = TokenBucket(clock)
        self.in_flight_bytes = 0
        self.stored_bytes = 0
        self._blocks: OrderedDict[BlockKey, int] = OrderedDict()

    @contextlib.contextmanager
    def in_flight(self, num_bytes: int) -> Iterator[None]:
        """Count bytes while they are in flight."""
        self.in_flight_bytes += num_bytes
        try:
            yield
        finally:
            self.in_flight_bytes -= num_bytes

    def add(self, key: BlockKey, num_bytes: int) -> None:
        """Count a block that was accepted, as the most recently used."""
        self.remove([key])
        self._blocks[key] = num_bytes
        self.stored_bytes += num_bytes

    def remove(self, keys: Iterable[BlockKey]) -> None:
        """Count blocks no longer."""
        for key in keys:
            self.stored_bytes -= self._blocks.pop(key, 0)

    def size(self, key: BlockKey) -> int:
        """Return the bytes that a block counts; 0 if it does not."""
        return self._blocks.get(key, 0)

    def touch(self, key: BlockKey) -> None:
        """Make a block the most recently used."""
        if key in self._blocks:
            self._blocks.move_to_end(key)

    def coldest(self, excess: int, spared: Callable[[BlockKey], bool]) -> list[BlockKey]:
        """Return blocks of ``excess`` bytes, coldest first; of fewer if the rest is spared."""
        chosen = []
        for key, num_bytes in self._blocks.items():
            if excess <= 0:
                break
            if not spared(key):
                chosen.append(key)
                excess -= num_bytes
        return chosen


class Quotas:
    """Every tenant's use of one process. One event loop owns it.

    Args:
        counters: Where refusals are counted, by tenant and reason.
        clock: Monotonic seconds.
    """

    def __init__(self, counters: Counters, clock: Clock = time.monotonic) -> None:
        self._counters = counters
        self._clock = clock
        self._usages: dict[str, Usage] = {}

    def of(self, tenant: Tenant) -> Usage:
        """Return what the tenant uses."""
        if tenant.name not in self._usages:
            self._usages[tenant.name] = Usage(self._clock)
        return self._usages[tenant.name]

    def count_request(self, tenant: Tenant) -> None:
        """Count one request; ``ThrottledError`` if the tenant had its share of this second."""
        if not tenant.requests_per_s:
            return
        wait_s = self.of(tenant).bucket.take(tenant.requests_per_s)
        if wait_s:
            raise self._refusal(
                tenant, "rate", f"more than {tenant.requests_per_s:g} requests a second", wait_s
            )

    def check_put(self, tenant: Tenant, num_bytes: int) -> None:
        """Raise ``ThrottledError`` if a block of that size may not be received now."""
        self.count_request(tenant)
        self.check_in_flight(tenant, num_bytes)
        if tenant.quota_bytes and num_bytes > tenant.quota_bytes:
            raise self._refusal(
                tenant, "bytes", f"a block larger than the quota of {tenant.quota_bytes} bytes", 0
            )

    def check_in_flight(self, tenant: Tenant, num_bytes: int) -> None:
        """Raise ``ThrottledError`` if so much more may not be received now."""
        limit = tenant.in_flight_bytes
        if limit and self.of(tenant).in_flight_bytes + num_bytes > limit:
            raise self._refusal(
                tenant, "in_flight", f"more than {limit} bytes in flight", _RETRY_IN_FLIGHT_S
            )

    def may_read_ahead(self, tenant: Tenant) -> bool:
        """Whether a Get may read more than it needs for its next reply."""
        limit = tenant.in_flight_bytes
        return not limit or self.of(tenant).in_flight_bytes < limit

    @contextlib.asynccontextmanager
    async def room(
        self, tenant: Tenant, key: BlockKey, num_bytes: int, store: Keeper
    ) -> AsyncIterator[Room]:
        """Count a block while it comes, and from then on if it was ``kept``.

        The tenant's other blocks make room for it before the body runs.

        Raises:
            ThrottledError: Pinned blocks leave no room; nothing was given up or counted.
        """
        room = Room()
        if not tenant.quota_bytes:
            yield room
            return
        usage = self.of(tenant)
        previous = usage.size(key)
        excess = usage.stored_bytes - previous + num_bytes - tenant.quota_bytes
        victims = usage.coldest(excess, lambda other: other == key or store.pins.holds(other))
        if sum(map(usage.size, victims)) < excess:
            raise self._refusal(
                tenant,
                "bytes",
                f"pinned blocks leave no room in the quota of {tenant.quota_bytes} bytes",
                _RETRY_STORED_S,
            )
        usage.remove(victims)
        usage.add(key, num_bytes)
        self._counters.add(GIVEN_UP, len(victims), tenant=tenant.name)
        try:
            for first in range(0, len(victims), _BATCH):
                await store.delete(victims[first : first + _BATCH], reason=QUOTA)
            yield room
        finally:
            if not room.kept:
                usage.remove([key])
                if previous:
                    usage.add(key, previous)

    def _refusal(self, tenant: Tenant, reason: str, what: str, retry_s: float) -> ThrottledError:
        self._counters.add(REFUSALS, tenant=tenant.name, reason=reason)
        retry_s = min(retry_s, MAX_RETRY_AFTER_S)
        error = ThrottledError(
            f"{reason}: {what} of tenant {tenant.name!r}",
            f"try again in {retry_s:.3f} s" if retry_s else "raise the tenant's quota",
        )
        if retry_s:
            error.metadata[RETRY_AFTER] = f"{retry_s:.3f}"
        return error
