"""Starting and stopping one store."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from grpc_health.v1 import health

from kvstrata.kvstore_service.admin_service import AdminService
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.counters import DELETIONS, SHED_BYTES, Counters
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.encryption import Encryption
from kvstrata.kvstore_service.measured_tier import MeasuredTier
from kvstrata.kvstore_service.metrics import MetricsPort
from kvstrata.kvstore_service.pin_table import Clock
from kvstrata.kvstore_service.ports import Ports, open_ports
from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_deletions import RedisDeletions
from kvstrata.kvstore_service.redis_tier import RedisTier
from kvstrata.kvstore_service.service import StoreService
from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.store_health import StoreHealth
from kvstrata.kvstore_service.store_stats import StoreStats
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.kvstore_service.tier import SEAL_BYTES, Tier
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos.errors import ConfigurationError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RunningStore:
    """A store that serves.

    Attributes:
        store: The blocks, for tests and for embedding.
        workload: What runs.
        tenants: Who may call.
        quotas: What each uses.
        stats: What it tells of itself.
    """

    store: BlockStore
    workload: Workload
    tenants: Tenants
    quotas: Quotas
    stats: StoreStats
    _encryption: Encryption
    _ports: Ports
    _metrics: MetricsPort | None
    _watch: asyncio.Task[None]

    @property
    def address(self) -> str:
        """Where it listens, ``host:port`` with the real port."""
        return self._ports.address

    @property
    def admin_address(self) -> str:
        """Where Admin listens; the same without a port of its own."""
        return self._ports.admin_address

    @property
    def metrics_address(self) -> str:
        """Where metrics are; empty without."""
        return self._metrics.address if self._metrics else ""

    @property
    def port(self) -> int:
        """The port of ``address``."""
        return int(self.address.rpartition(":")[2])

    def reload(self) -> bool:
        """Read tenants and keys again; bad files change nothing. Return whether all were good."""
        return self.tenants.reload() and self._encryption.reload(self.tenants)

    async def stop(self, grace_s: float = 10.0) -> None:
        """Refuse new calls, give running ones ``grace_s``, then close everything. Idempotent.

        What was acknowledged and is still to be written to a tier is written within the same time;
        closing the tiers then takes as long as the writes that are under way.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + grace_s
        logger.info("store drains", extra={"in_flight": self.workload.in_flight})
        self.workload.is_draining = True
        self.store.arrivals.drain()
        while not self._watch.done():  # a client of Redis may turn a cancellation into a time-out
            self._watch.cancel()
            await asyncio.wait([self._watch], timeout=0.1)
        await self._ports.drain()
        await self._ports.stop(grace_s)
        if self._metrics is not None:
            await self._metrics.close()
        await self.store.flush(max(0.0, deadline_s - loop.time()))
        await self.store.close()
        logger.info("store stopped", extra={"address": self.address})


async def start_store(config: StoreConfig, clock: Clock = time.monotonic) -> RunningStore:
    """Start a store and return it when it serves; ``clock`` ends pins and paces requests.

    Raises:
        ConfigurationError: A bad setting, an occupied port, a Redis that does not answer, an ssd
            folder or an object store that cannot be had, a bad file of tenants or certificates.
    """
    config.validate()
    tenants = Tenants(config.tenants)
    counters = Counters()
    encryption = Encryption(tenants, config.key_file, counters)
    tiers = await _lower_tiers(config, counters)
    deletions = _deletions(tiers, counters)
    store = BlockStore(
        DramTier(config.dram_bytes, clock),
        [encryption.around(MeasuredTier(tier, counters)) for tier in tiers],
        clock,
        counters=counters,
        deletions=deletions,
    )
    if deletions is not None:
        deletions.follow(store.forget_deleted)
    try:
        quotas = Quotas(store.counters, clock)
        return await _serve(config, store, tenants, quotas, encryption)
    except BaseException:
        await store.close()
        raise


async def _lower_tiers(config: StoreConfig, counters: Counters) -> list[Tier]:
    tiers: list[Tier] = []
    try:
        if config.redis_url:
            redis = await _redis_tier(config, config.redis_url)
            redis.on_shed = lambda size: counters.add(SHED_BYTES, size, tier="redis")
            tiers.append(redis)
        if config.ssd_path:
            tiers.append(await _ssd_tier(config, config.ssd_path))
        if config.object_url:
            tiers.append(await _object_tier(config, config.object_url))
    except BaseException:
        for tier in tiers:
            await tier.close()
        raise
    return tiers


def _deletions(tiers: Sequence[Tier], counters: Counters) -> RedisDeletions | None:
    """Return how processes that share a Redis learn of each other's deletions."""
    for tier in tiers:
        if isinstance(tier, RedisTier):
            deletions = RedisDeletions(tier.connection)
            deletions.on_missed = lambda: counters.add(DELETIONS, outcome="missed")
            return deletions
    return None


async def _redis_tier(config: StoreConfig, url: str) -> RedisTier:
    connection = RedisConnection(
        url,
        timeout_s=config.redis_timeout_s,
        max_connections=config.redis_connections,
        probe_s=config.redis_probe_s,
    )
    try:
        await connection.check()
    except ConfigurationError:
        await connection.close()
        raise
    return RedisTier(
        connection,
        capacity_bytes=config.redis_bytes,
        ttl_s=config.ttl_s,
        max_stratum_bytes=config.limits.max_block_bytes + SEAL_BYTES,
    )


async def _ssd_tier(config: StoreConfig, path: str) -> SsdTier:
    tier = SsdTier(
        path,
        capacity_bytes=config.ssd_bytes,
        max_stratum_bytes=config.limits.max_block_bytes + SEAL_BYTES,
    )
    return await tier.open()


async def _object_tier(config: StoreConfig, url: str) -> Tier:
    try:
        from kvstrata.kvstore_service.object_service import ObjectService
        from kvstrata.kvstore_service.object_tier import ObjectTier
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the object tier needs {error.name}", "install kvstrata[object]"
        ) from error
    tier = ObjectTier(
        ObjectService(url, timeout_s=config.object_timeout_s),
        capacity_bytes=config.object_bytes,
        max_stratum_bytes=config.limits.max_block_bytes + SEAL_BYTES,
    )
    return await tier.open()


async def _serve(
    config: StoreConfig,
    store: BlockStore,
    tenants: Tenants,
    quotas: Quotas,
    encryption: Encryption,
) -> RunningStore:
    workload = Workload()
    feels = StoreHealth(store, workload)
    stats = StoreStats(store, workload, tenants, quotas, feels)

    def make_admin(health_service: health.aio.HealthServicer) -> AdminService:
        async def on_drain() -> None:
            workload.is_draining = True
            store.arrivals.drain()
            await health_service.enter_graceful_shutdown()

        return AdminService(store, workload, config.limits, tenants, quotas, stats, on_drain)

    service = StoreService(
        store, workload, config.limits, tenants, quotas, config.representative_bytes
    )
    ports = await open_ports(config, tenants, service, make_admin, store.counters.observe_call)
    metrics = None
    if config.metrics_listen:
        try:
            metrics = MetricsPort(config.metrics_listen, "kvstrata_store", stats.tell, config.tls)
        except BaseException:
            await ports.stop(0)
            raise
    watch = asyncio.create_task(feels.watch(ports.health))
    extra = {"address": ports.address, "tiers": ",".join(tier.name for tier in store.tiers)}
    logger.info("store serves", extra=extra)
    return RunningStore(store, workload, tenants, quotas, stats, encryption, ports, metrics, watch)
