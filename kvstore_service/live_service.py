"""The calls of KVStore that carry blocks while they are made: Write and Attach."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from kvstrata.kvstore_service.attach_stream import AttachStream
from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.put_stream import ByteBudget
from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.request_check import parse_hashes, parse_strata
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.kvstore_service.workload import Workload
from kvstrata.kvstore_service.write_stream import WriteStream
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import KVStrataError
from kvstrata.protos.identity import ScopeDigest
from kvstrata.protos.service import discard, metadata_of


def live_handlers(service: "LiveService") -> dict[str, Any]:
    """Return the handlers of ``service`` by the calls' names."""
    return {
        "Write": grpc.stream_stream_rpc_method_handler(
            service.Write,
            request_deserializer=pb.WriteRequest.FromString,
            response_serializer=pb.WriteReply.SerializeToString,
        ),
        "Attach": grpc.unary_stream_rpc_method_handler(
            service.Attach,
            request_deserializer=pb.AttachRequest.FromString,
            response_serializer=pb.AttachReply.SerializeToString,
        ),
    }


class LiveService:
    """Serves blocks that are being made; every guarantee is in ``kvstore.proto``."""

    def __init__(
        self,
        store: BlockStore,
        workload: Workload,
        limits: StoreLimits,
        tenants: Tenants,
        quotas: Quotas,
        budget: ByteBudget,
    ) -> None:
        self._store = store
        self._workload = workload
        self._limits = limits
        self._tenants = tenants
        self._quotas = quotas
        self._budget = budget

    async def Write(  # noqa: N802
        self, requests: AsyncIterator[pb.WriteRequest], context: Any
    ) -> AsyncGenerator[pb.WriteReply]:
        """Take blocks segment by segment."""
        try:
            tenant = self._tenants.identify(metadata_of(context))
            with self._workload.call():
                stream = WriteStream(
                    self._store, self._workload, self._limits, tenant, self._quotas, self._budget
                )
                async with contextlib.aclosing(stream.serve(requests)) as replies:
                    async for reply in replies:
                        yield reply
        except KVStrataError:
            await discard(requests, size=_size)
            raise

    async def Attach(  # noqa: N802
        self, request: pb.AttachRequest, context: Any
    ) -> AsyncGenerator[pb.AttachReply]:
        """Stream blocks segment by segment, as they arrive."""
        keys = parse_hashes(request.scope, request.block_hashes, self._limits.max_hashes)
        strata = parse_strata(request.strata)
        tenant = self._tenants.identify(metadata_of(context))
        self._quotas.count_request(tenant)
        with self._workload.call():
            stream = AttachStream(
                self._store,
                tenant,
                self._quotas.of(tenant),
                ScopeDigest(request.scope),
                tenant.namespace.keys(keys),
                strata,
                min(request.silence_ms, self._limits.max_wait_ms) / 1000,
                request.pending_only,
            )
            async with contextlib.aclosing(stream.replies()) as replies:
                async for reply in replies:
                    yield reply


def _size(request: pb.WriteRequest) -> int:
    return sum(len(segment.data) for segment in request.segments)
