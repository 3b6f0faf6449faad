"""Admin at the gateway: the store's own answers, its statistics with our counters added."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc

from kvstrata.cluster.admission import Admission
from kvstrata.cluster.gateway import Gateway
from kvstrata.cluster.prompt_explanation import explain_prompt
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.quota_admin import answer_quota
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos import admin_pb2_grpc, kvstore_pb2
from kvstrata.protos.errors import KVStrataError, from_rpc_error
from kvstrata.protos.service import CALL_METADATA, metadata_of

STORE_TIMEOUT_S = 10.0
MAX_DRAIN_MS = 600_000


class GatewayAdmin(admin_pb2_grpc.AdminServicer):
    """Serves ``Admin``; everything about blocks is asked of the store."""

    def __init__(
        self,
        gateway: Gateway,
        admission: Admission,
        counters: Counters,
        tenants: Tenants,
        store: grpc.aio.Channel,
        on_drain: Callable[[], Awaitable[None]],
        metadata: Sequence[tuple[str, str]] = CALL_METADATA,
    ) -> None:
        self._gateway = gateway
        self._admission = admission
        self._tenants = tenants
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
        own = await self.own_stats()
        reply.counters.extend(c for c in own.counters if not _is_of_admin(c.labels))
        reply.histograms.extend(h for h in own.histograms if not _is_of_admin(h.labels))
        reply.gauges.extend(own.gauges)
        reply.uptime_s = own.uptime_s
        if self._gateway.draining:
            reply.health = "draining"
        return reply

    async def own_stats(self) -> pb.StatsReply:
        """Return what this gateway itself counts, nothing of the store."""
        return pb.StatsReply(
            counters=self._counters.messages(),
            histograms=self._counters.histograms(),
            gauges=[
                pb.Gauge(name="running_requests", value=self._gateway.num_running),
                pb.Gauge(name="running_bytes", value=self._gateway.running_bytes),
                *self._gateway.node_uses.gauges(),
            ],
            uptime_s=time.monotonic() - self._started,
            health="draining" if self._gateway.draining else "ok",
        )

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

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainReply:  # noqa: N802
        """See ``admin.proto``. Takes a prompt; scopes and hashes are passed on to the store."""
        if not request.HasField("prompt"):
            return await self._explain(request)
        tenant = (
            self._tenants.named(request.tenant)
            if request.tenant
            else self._tenants.identify(metadata_of(context))
        )
        return await explain_prompt(self._admission, request.prompt, tenant, self._explain)

    async def _explain(self, request: pb.ExplainRequest) -> pb.ExplainReply:
        reply: pb.ExplainReply = await self._ask(self._store.Explain, request)
        return reply

    async def Pin(  # noqa: N802
        self, request: kvstore_pb2.PinRequest, context: Any
    ) -> kvstore_pb2.PinReply:
        """See ``admin.proto``."""
        reply: kvstore_pb2.PinReply = await self._ask(self._store.Pin, request)
        return reply

    async def Unpin(  # noqa: N802
        self, request: kvstore_pb2.UnpinRequest, context: Any
    ) -> kvstore_pb2.UnpinReply:
        """See ``admin.proto``."""
        reply: kvstore_pb2.UnpinReply = await self._ask(self._store.Unpin, request)
        return reply

    async def Move(self, request: pb.MoveRequest, context: Any) -> pb.MoveReply:  # noqa: N802
        """See ``admin.proto``."""
        reply: pb.MoveReply = await self._ask(self._store.Move, request)
        return reply

    async def Verify(  # noqa: N802
        self, request: pb.VerifyRequest, context: Any
    ) -> AsyncIterator[pb.VerifyReply]:
        """See ``admin.proto``."""
        call = self._store.Verify(
            request, timeout=context.time_remaining(), metadata=self._metadata
        )
        try:
            async for reply in call:
                yield reply
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, "store") from error
        finally:
            call.cancel()

    async def Quota(self, request: pb.QuotaRequest, context: Any) -> pb.QuotaReply:  # noqa: N802
        """See ``admin.proto``. Of the gateway's users; without a file of them, of the store's."""
        if self._tenants.has_file:
            return answer_quota(request, self._tenants, self._gateway.quotas)
        reply: pb.QuotaReply = await self._ask(self._store.Quota, request)
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


def _is_of_admin(labels: Mapping[str, str]) -> bool:
    """Whether a number is of our own Admin calls, which the store counts under the same name."""
    return labels.get("method", "").startswith("Admin/")
