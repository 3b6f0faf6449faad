"""What the store tells of itself: ``Stats``, and one line of a listing."""

import time

from kvstrata.kvstore_service.counters import HITS, MAX_TENANTS
from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.store import BlockStore, Presence
from kvstrata.kvstore_service.store_health import StoreHealth
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.kvstore_service.tier import TierUsage
from kvstrata.kvstore_service.wire import key_message, size_messages
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos.identity import BlockKey


class StoreStats:
    """Everything that a store process counts, as one message."""

    def __init__(
        self,
        store: BlockStore,
        workload: Workload,
        tenants: Tenants,
        quotas: Quotas,
        health: StoreHealth,
    ) -> None:
        self._store = store
        self._workload = workload
        self._tenants = tenants
        self._quotas = quotas
        self._health = health
        self._started = time.monotonic()

    async def tell(self) -> pb.StatsReply:
        """Return it; a tier that does not answer is told as such."""
        health = await self._health.look()
        pinned_blocks, pinned_bytes = self._store.pins.usage()
        reply = pb.StatsReply(
            tiers=[self._tier(name, usage) for name, usage in health.usages.items()],
            counters=self._store.counters.messages(),
            histograms=self._store.counters.histograms(),
            pinned_blocks=pinned_blocks,
            pinned_bytes=pinned_bytes,
            in_flight_puts=self._workload.in_flight_puts,
            uptime_s=time.monotonic() - self._started,
            health=health.text,
        )
        reply.gauges.add(name="in_flight_calls", value=self._workload.in_flight)
        retention, ranked = self._store.retention, self._store.dram.ranked
        retention.expire()
        reply.gauges.add(name="retained_sessions", value=retention.num_sessions)
        for priority, num_bytes in (
            ("low", ranked.low_bytes),
            ("high", ranked.high_bytes.total()),
        ):
            reply.gauges.add(name="priority_bytes", labels={"priority": priority}, value=num_bytes)
        for tenant in self._tenants.all()[:MAX_TENANTS]:
            usage = self._quotas.of(tenant)
            values = {"tenant_in_flight_bytes": usage.in_flight_bytes}
            if tenant.quota_bytes:  # without one, stored bytes are not counted
                values["tenant_stored_bytes"] = usage.stored_bytes
                values["tenant_quota_bytes"] = tenant.quota_bytes
            for name, value in values.items():
                reply.gauges.add(name=name, labels={"tenant": tenant.name}, value=value)
        return reply

    def _tier(self, name: str, usage: TierUsage) -> pb.TierStats:
        return pb.TierStats(
            tier=name,
            healthy=usage.healthy,
            detail=usage.detail,
            blocks=usage.blocks,
            bytes=usage.num_bytes,
            capacity_bytes=usage.capacity_bytes,
            hits=self._store.counters.get(HITS, tier=name),
            evictions=usage.evictions,
            behind_bytes=self._store.behind_bytes(name),
            max_behind_bytes=self._store.max_behind_bytes if name != "dram" else 0,
        )


def block_listing(store: BlockStore, key: BlockKey, presence: Presence) -> pb.BlockListing:
    """Return one line of a listing."""
    sizes = {stratum: size for _, held in reversed(presence) for stratum, size in held.items()}
    listing = pb.BlockListing(
        key=key_message(key),
        strata=size_messages(dict(sorted(sizes.items()))),
        tiers=[name for name, _ in presence],
        pinned=store.pins.holds(key),
    )
    if (standing := store.retention.standing(key)) is not None:
        listing.priority = standing.priority  # type: ignore[assignment]
        listing.sessions = standing.num_sessions
        listing.keep_ms = int(standing.keep_s * 1000)
    return listing
