"""Admin at the gateway: the store's own answers, its statistics with our counters added."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from kvstrata.cluster.gateway import Gateway
from kvstrata.kvstore_service.counters import Counters
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos import admin_pb2_grpc
from kvstrata.protos.errors import KVStrataError, from_rpc_error
from kvstrata.protos.service import CALL_METADATA

STORE_TIMEOUT_S = 10.0
MAX_DRAIN_MS = 600_000


class GatewayAdmin(admin_pb2_grpc.AdminServicer):
    """Serves ``Admin``; everything about blocks is asked of the store."""

    def __init__(
        self,
        gateway: Gateway,
        counters: Counters,
        store: grpc.aio.Channel,
        on_drain: Callable[[], Awaitable[None]],
        metadata: Sequence[tuple[str, str]] = CALL_METADATA,
    ) -> None:
        self._gateway = gateway
        self._counters = counters
        self._store: Any = admin_pb2_grpc.AdminStub(store)  # type: ignore[no-untyped-call]
        self._on_drain = on_drain
        self._metadata = metadata
        self._started = time.monotonic()

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:  # noqa: N802
        """See ``admin.proto``. A store that does not answer is told in ``health``."""
        try:
            reply: pb.StatsReply = await self._ask(self._store.Stats, request)
        except KVStrataError as error:
            reply = pb.StatsReply(health=f"degraded: store: {error.message}")
        reply.counters.extend(self._counters.messages())
        reply.uptime_s = time.monotonic() - self._started
        if self._gateway.draining:
            reply.health = "draining"
        return reply

    async def ListBlocks(  # noqa: N802
        self, request: pb.ListBlocksRequest, context: Any
    ) -> pb.ListBlocksReply:
        """See ``admin.proto``."""
        reply: pb.ListBlocksReply = await self._ask(self._store.ListBlocks, request)
        return reply

    async def Inspect(self, request: pb.InspectRequest, context: Any) -> pb.InspectReply:  # noqa: N802
        """See ``admin.proto``."""
        reply: pb.InspectReply = await self._ask(self._store.Inspect, request)
        return reply

    async def Evict(self, request: pb.EvictRequest, context: Any) -> pb.EvictReply:  # noqa: N802
        """See ``admin.proto``."""
        reply: pb.EvictReply = await self._ask(self._store.Evict, request)
        return reply

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:  # noqa: N802
        """See ``admin.proto``. Drains this gateway, not the store."""
        self._gateway.draining = True
        await self._on_drain()
        deadline = time.monotonic() + min(request.timeout_ms, MAX_DRAIN_MS) / 1000
        while self._gateway.num_running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        running = self._gateway.num_running
        return pb.DrainReply(drained=not running, in_flight=running)

    async def _ask(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=STORE_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, "store") from error
