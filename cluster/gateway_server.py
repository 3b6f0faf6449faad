"""The gateway's gRPC server: Inference, Admin, health and reflection on one port."""

import os
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstrata.cluster.admission import Admission
from kvstrata.cluster.gateway import Gateway
from kvstrata.cluster.gateway_admin import GatewayAdmin
from kvstrata.cluster.router import Router
from kvstrata.cluster.workers import Workers
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.metrics import MetricsPort
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.prefill_node.worker import WorkerInfo
from kvstrata.protos import admin_pb2_grpc, inference_pb2_grpc
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials, ServerTls
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.service import (
    SERVER_OPTIONS,
    ContractInterceptor,
    bind,
    call_metadata,
    open_channel,
)

SALT_VARIABLE = "KVSTRATA_SALT"
SERVICES = ("kvstrata.v1.Inference", "kvstrata.v1.Admin")
LOOKUP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class GatewayServer:
    """A serving gateway.

    Attributes:
        address: ``host:port`` that it listens on.
        metrics_address: Where metrics are; empty without.
        tenants: Who may call.
    """

    address: str
    metrics_address: str
    gateway: Gateway
    tenants: Tenants
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer
    _metrics: MetricsPort | None
    _client: StoreClient
    _channel: grpc.aio.Channel

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let running ones end within ``grace_s``, then cut them."""
        self.gateway.draining = True
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        if self._metrics is not None:
            await self._metrics.close()
        await self._client.close()
        await self._channel.close()


def salt_from_environment() -> bytes:
    """Return the deployment's secret part of the cache scope; empty without one."""
    return os.environ.get(SALT_VARIABLE, "").encode()


async def start_gateway(
    listen: str,
    *,
    store_address: str,
    workers: Workers,
    info: WorkerInfo,
    tokenizer: Any,
    salt: bytes = b"",
    tls: ServerTls | None = None,
    store_credentials: ClientCredentials = ANONYMOUS,
    store_admin_address: str = "",
    tenants: str = "",
    metrics_listen: str = "",
) -> GatewayServer:
    """Start a gateway and return it when it serves.

    Args:
        listen: ``host:port``; port 0 takes a free one.
        store_address: Of the store's KVStore.
        workers: The nodes.
        info: What they serve.
        tokenizer: The model's.
        salt: The deployment's secret part of every cache scope.
        tls: Of the port; plaintext without it.
        store_credentials: Shown to the store; of an admin tenant there, if Admin is to work here.
        store_admin_address: Of the store's Admin, where that has a port of its own.
        tenants: File of tenants; without it everybody is one tenant and needs no token.
        metrics_listen: ``host:port`` for Prometheus; none without it.

    Raises:
        ConfigurationError: The port is taken, the address is not local, or a file of certificates
            or tenants is bad.
    """
    known = Tenants(tenants)
    client = StoreClient(store_address, timeout_s=LOOKUP_TIMEOUT_S, credentials=store_credentials)
    channel = open_channel(store_admin_address or store_address, store_credentials)
    counters = Counters()
    admission = Admission(info, tokenizer, salt)
    gateway = Gateway(admission, Router(client, info), workers, counters, known)
    health_service = health.aio.HealthServicer()
    server = grpc.aio.server(
        interceptors=[ContractInterceptor(known.authorize, counters.observe_call)],
        options=SERVER_OPTIONS,
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    admin = GatewayAdmin(
        gateway,
        admission,
        counters,
        known,
        channel,
        health_service.enter_graceful_shutdown,
        call_metadata(store_credentials),
    )
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection(
        [*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    metrics = None
    try:
        port = bind(server, listen, tls)
        if metrics_listen:
            metrics = MetricsPort(metrics_listen, "kvstrata_gateway", admin.own_stats, tls)
    except ConfigurationError:
        await server.stop(None)
        await client.close()
        await channel.close()
        raise
    await server.start()
    for name in ("", *SERVICES):
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    return GatewayServer(
        f"{listen.rpartition(':')[0]}:{port}",
        metrics.address if metrics else "",
        gateway,
        known,
        server,
        health_service,
        metrics,
        client,
        channel,
    )
