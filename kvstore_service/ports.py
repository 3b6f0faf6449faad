"""The ports of one store: KVStore, and Admin beside it or on a port of its own."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstrata.kvstore_service.admin_service import AdminService
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.service import SERVICE_NAME, StoreService, store_handlers
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.protos import admin_pb2, admin_pb2_grpc
from kvstrata.protos.service import SERVER_OPTIONS, ContractInterceptor, Observe, bind

ADMIN_NAME = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name


@dataclass(frozen=True, slots=True)
class Ports:
    """Open ports.

    Attributes:
        address: Where KVStore listens, ``host:port`` with the real port.
        admin_address: Where Admin listens; the same without a port of its own.
        health: What the health service says.
    """

    address: str
    admin_address: str
    health: health.aio.HealthServicer
    _servers: tuple[grpc.aio.Server, ...]

    async def drain(self) -> None:
        """Let health say NOT_SERVING."""
        await self.health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Let running calls end within ``grace_s``, then cut them. Idempotent."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))


async def open_ports(
    config: StoreConfig,
    tenants: Tenants,
    service: StoreService,
    make_admin: Callable[[health.aio.HealthServicer], AdminService],
    observe: Observe,
) -> Ports:
    """Open the ports and return them when they serve.

    Raises:
        ConfigurationError: A port is taken, an address is not local, or a certificate's file is
            bad; no port is open then.
    """
    health_service = health.aio.HealthServicer()

    def server(names: list[str]) -> grpc.aio.Server:
        made = grpc.aio.server(
            interceptors=[ContractInterceptor(tenants.authorize, observe)], options=SERVER_OPTIONS
        )
        health_pb2_grpc.add_HealthServicer_to_server(health_service, made)
        reflection.enable_server_reflection(
            [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], made
        )
        return made

    apart = bool(config.admin_listen)
    data = server([SERVICE_NAME] if apart else [SERVICE_NAME, ADMIN_NAME])
    data.add_generic_rpc_handlers((store_handlers(service),))
    admin: Any = server([ADMIN_NAME]) if apart else data
    admin_pb2_grpc.add_AdminServicer_to_server(  # type: ignore[no-untyped-call]
        make_admin(health_service), admin
    )
    servers = (data, admin) if apart else (data,)
    try:
        address = _bind(data, config.listen, config)
        admin_address = _bind(admin, config.admin_listen, config) if apart else address
        for each in servers:
            await each.start()
    except BaseException:
        for each in servers:
            await each.stop(None)
        raise
    for name in ("", SERVICE_NAME, ADMIN_NAME):
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    return Ports(address, admin_address, health_service, servers)


def _bind(server: grpc.aio.Server, listen: str, config: StoreConfig) -> str:
    return f"{listen.rpartition(':')[0]}:{bind(server, listen, config.tls)}"
