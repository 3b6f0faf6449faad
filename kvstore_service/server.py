"""Starting and stopping one store."""

import logging
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstrata.kvstore_service.admin_service import AdminService
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.kvstore_service.redis_tier import RedisTier
from kvstrata.kvstore_service.service import SERVICE_NAME, StoreService, store_handlers
from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tier import Tier
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos import admin_pb2, admin_pb2_grpc
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.service import SERVER_OPTIONS, ContractInterceptor, bind

logger = logging.getLogger(__name__)

_SERVICES = (
    "",
    SERVICE_NAME,
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
)


@dataclass(slots=True)
class RunningStore:
    """A store that serves.

    Attributes:
        address: ``host:port`` it listens at, with the real port.
        port: That port.
        store: The blocks, for tests and for embedding.
    """

    address: str
    port: int
    store: BlockStore
    workload: Workload
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer

    async def stop(self, grace_s: float = 10.0) -> None:
        """Refuse new calls, give running ones ``grace_s``, then close everything. Idempotent."""
        self.workload.is_draining = True
        self.store.arrivals.drain()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        await self.store.close()
        logger.info("store stopped: address=%s", self.address)


async def start_store(config: StoreConfig) -> RunningStore:
    """Start a store and return it when it serves.

    Raises:
        ConfigurationError: A bad setting, an occupied port, a Redis that does not answer, an ssd
            folder that cannot be had.
    """
    config.validate()
    store = BlockStore(DramTier(config.dram_bytes), await _lower_tiers(config))
    try:
        return await _serve(config, store)
    except BaseException:
        await store.close()
        raise


async def _lower_tiers(config: StoreConfig) -> list[Tier]:
    tiers: list[Tier] = []
    try:
        if config.redis_url:
            tiers.append(await _redis_tier(config, config.redis_url))
        if config.ssd_path:
            tiers.append(await _ssd_tier(config, config.ssd_path))
    except BaseException:
        for tier in tiers:
            await tier.close()
        raise
    return tiers


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
        max_stratum_bytes=config.limits.max_block_bytes,
    )


async def _ssd_tier(config: StoreConfig, path: str) -> SsdTier:
    tier = SsdTier(
        path,
        capacity_bytes=config.ssd_bytes,
        max_stratum_bytes=config.limits.max_block_bytes,
    )
    return await tier.open()


async def _serve(config: StoreConfig, store: BlockStore) -> RunningStore:
    workload = Workload()
    health_service = health.aio.HealthServicer()
    server = grpc.aio.server(interceptors=[ContractInterceptor()], options=SERVER_OPTIONS)

    async def on_drain() -> None:
        workload.is_draining = True
        store.arrivals.drain()
        await health_service.enter_graceful_shutdown()

    service = StoreService(store, workload, config.limits)
    server.add_generic_rpc_handlers((store_handlers(service),))
    admin_pb2_grpc.add_AdminServicer_to_server(  # type: ignore[no-untyped-call]
        AdminService(store, workload, config.limits, on_drain), server
    )
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection(
        [*_SERVICES[1:], health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    port = bind(server, config.listen)
    await server.start()
    for name in _SERVICES:
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    address = f"{config.listen.rpartition(':')[0]}:{port}"
    logger.info("store serves: address=%s dram_bytes=%d", address, config.dram_bytes)
    return RunningStore(address, port, store, workload, server, health_service)
