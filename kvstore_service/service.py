"""The KVStore service: the data plane over a ``BlockStore``."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.data_codec import (
    GetPart,
    PutPart,
    decode_put_request,
    encode_get_reply,
)
from kvstrata.kvstore_service.get_stream import get_parts, layer_range, shown
from kvstrata.kvstore_service.live_service import LiveService, live_handlers
from kvstrata.kvstore_service.put_stream import BlockAssembly, ByteBudget
from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.read_ahead import cancel, read_ahead
from kvstrata.kvstore_service.request_check import (
    parse_hashes,
    parse_keys,
    parse_retention,
    parse_strata,
)
from kvstrata.kvstore_service.retrieve_handler import RetrieveHandler
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tenants import Tenant, Tenants
from kvstrata.kvstore_service.wire import key_message
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import (
    DeadlineError,
    InvalidRequestError,
    KVStrataError,
    MalformedMessageError,
    ThrottledError,
)
from kvstrata.protos.identity import BlockKey, ScopeDigest
from kvstrata.protos.kvstore_pb2_grpc import KVStoreServicer
from kvstrata.protos.retention import check_names
from kvstrata.protos.retention_pb2 import ReleaseReply, ReleaseRequest
from kvstrata.protos.service import discard, metadata_of

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["KVStore"].full_name

Blocks = asyncio.Queue[asyncio.Task[pb.PutReply] | None]


def store_handlers(service: "StoreService") -> grpc.GenericRpcHandler:
    """Return the handlers of ``service``, the data codec on the two that carry frames."""
    unary: dict[str, Any] = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(service, name),
            request_deserializer=request.FromString,
            response_serializer=reply.SerializeToString,
        )
        for name, request, reply in (
            ("Lookup", pb.LookupRequest, pb.LookupReply),
            ("Pin", pb.PinRequest, pb.PinReply),
            ("Unpin", pb.UnpinRequest, pb.UnpinReply),
            ("Delete", pb.DeleteRequest, pb.DeleteReply),
            ("Retrieve", pb.RetrieveRequest, pb.RetrieveReply),
            ("Release", ReleaseRequest, ReleaseReply),
        )
    }
    put: Any = grpc.stream_stream_rpc_method_handler(
        service.Put,
        request_deserializer=decode_put_request,
        response_serializer=pb.PutReply.SerializeToString,
    )
    get: Any = grpc.unary_stream_rpc_method_handler(
        service.Get,
        request_deserializer=pb.GetRequest.FromString,
        response_serializer=encode_get_reply,
    )
    handlers = {**unary, "Put": put, "Get": get, **live_handlers(service.live)}
    return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)


class StoreService(KVStoreServicer):
    """Serves blocks; every guarantee is in ``kvstore.proto``.

    Below this class keys are stored keys: each handler maps those of its request by the caller's
    ``Namespace`` before anything is looked up.
    """

    def __init__(
        self,
        store: BlockStore,
        workload: Workload,
        limits: StoreLimits,
        tenants: Tenants,
        quotas: Quotas,
        representative_bytes: int = 256 << 20,
    ) -> None:
        self._store = store
        self._workload = workload
        self._limits = limits
        self._tenants = tenants
        self._quotas = quotas
        self._budget = ByteBudget(limits.max_in_flight_bytes)
        search = RetrieveHandler(store, workload, limits, representative_bytes, self._admit)
        self.Retrieve = search  # type: ignore[method-assign]
        self.live = LiveService(store, workload, limits, tenants, quotas, self._budget)

    def _caller(self, context: Any) -> Tenant:
        return self._tenants.identify(metadata_of(context))

    def _admit(self, context: Any) -> Tenant:
        """Return the caller, one request counted."""
        tenant = self._caller(context)
        self._quotas.count_request(tenant)
        return tenant

    async def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupReply:  # noqa: N802
        """Tell the longest run of committed blocks."""
        keys = parse_hashes(request.scope, request.block_hashes, self._limits.max_hashes)
        hint = None
        if request.HasField("retention"):
            hint = parse_retention(request.retention, self._limits.max_keep_ms)
        tenant = self._admit(context)
        keys = tenant.namespace.run(keys)
        with self._workload.call():
            if hint is None:
                self._store.retention.note_use(keys)
            else:
                self._store.retention.note(tenant.name, hint, keys)
            lease_ms = min(request.lease_ms, self._limits.max_lease_ms)
            found = await self._store.lookup(keys, lease_ms / 1000)
        return pb.LookupReply(
            strata=found.strata,
            tiers=found.tiers,
            block_bytes=found.num_bytes,
            tier_names=[tier.name for tier in self._store.tiers],
            degraded=found.degraded,
            pending=self._store.arrivals.num_pending(keys[len(found) :]),
        )

    async def Put(  # noqa: N802
        self, requests: AsyncIterator[PutPart], context: Any
    ) -> AsyncIterator[pb.PutReply]:
        """Commit blocks one after another; nothing of a block that did not arrive whole is kept."""
        receiving: asyncio.Task[None] | None = None
        try:
            tenant = self._caller(context)
            with self._workload.call():
                blocks: Blocks = asyncio.Queue(1)
                receiving = asyncio.create_task(self._receive_then_end(requests, blocks, tenant))
                try:
                    while (block := await blocks.get()) is not None:
                        yield await block
                    await receiving
                except ThrottledError as error:
                    await asyncio.wait([receiving])
                    yield _refused(error)
                    await discard(requests, self._limits.put_idle_s, _data_size)
                    raise
                finally:
                    await cancel([receiving])
        except ThrottledError:
            raise
        except KVStrataError:
            if receiving is None or not receiving.cancelled():
                await discard(requests, size=_data_size)
            raise

    async def _receive_then_end(
        self, requests: AsyncIterator[PutPart], blocks: Blocks, tenant: Tenant
    ) -> None:
        """Queue every block, then None, also if the stream breaks; raises what broke it."""
        try:
            await self._receive_all(requests, blocks, tenant)
        except Exception:
            await blocks.put(None)
            raise
        await blocks.put(None)

    async def _receive_all(
        self, requests: AsyncIterator[PutPart], blocks: Blocks, tenant: Tenant
    ) -> None:
        """Receive one block while the one before is being committed."""
        tasks: set[asyncio.Task[pb.PutReply]] = set()

        def ended(task: asyncio.Task[pb.PutReply]) -> None:
            tasks.discard(task)
            if not task.cancelled():
                task.exception()  # seen, even if the stream breaks before its turn

        try:
            async for part in requests:
                self._workload.refuse_if_draining()
                if part.opening is None:
                    raise MalformedMessageError(
                        "data without an open block",
                        "send PutOpen first, then as many bytes as declared",
                    )
                assembly = BlockAssembly(part.opening, self._limits)
                self._store.check_durability(assembly.durability)
                with _naming(assembly.key):
                    self._quotas.check_put(tenant, assembly.num_bytes)
                arrived = asyncio.Event()
                receive = self._receive(assembly, part, requests, arrived, tenant)
                task = asyncio.create_task(receive)
                tasks.add(task)
                task.add_done_callback(ended)
                await blocks.put(task)
                await arrived.wait()
                if not assembly.is_complete:
                    return
        except asyncio.CancelledError:
            await cancel(tasks)
            raise

    async def _receive(
        self,
        block: BlockAssembly,
        part: PutPart,
        requests: AsyncIterator[PutPart],
        arrived: asyncio.Event,
        tenant: Tenant,
    ) -> pb.PutReply:
        """Receive and commit one block; sets ``arrived`` when it reads no more requests."""
        (key,) = tenant.namespace.keys([block.key])
        try:
            async with contextlib.AsyncExitStack() as held:
                held.enter_context(_naming(block.key))
                held.enter_context(self._workload.receiving())
                held.enter_context(self._store.arrivals.writing(key))
                held.enter_context(self._quotas.of(tenant).in_flight(block.num_bytes))
                room = self._quotas.room(tenant, key, block.num_bytes, self._store)
                place = await held.enter_async_context(room)
                await held.enter_async_context(self._budget.reserved(block.num_bytes))
                block.add(part.data)
                while not block.is_complete:
                    block.add(await self._next_data(requests))
                arrived.set()
                self._store.counters.add(names.RECEIVED_BYTES, block.num_bytes)
                place.kept = True
                frames = tenant.namespace.stored(block.key, block.frames)
                if block.retention is not None:
                    self._store.retention.note(tenant.name, block.retention, [key])
                result = await self._store.put(key, frames, block.durability)
                place.kept = result.outcome != pb.PUT_OUTCOME_REJECTED
        finally:
            arrived.set()
        return pb.PutReply(
            key=key_message(block.key),
            outcome=result.outcome,  # type: ignore[arg-type]
            reason=result.reason,
            tiers=result.tiers,
        )

    async def _next_data(self, requests: AsyncIterator[PutPart]) -> Sequence[bytes | memoryview]:
        try:
            async with asyncio.timeout(self._limits.put_idle_s):
                opening, data = await anext(requests)
        except StopAsyncIteration:
            raise InvalidRequestError(
                "the stream ended inside a block", "send every declared byte before closing"
            ) from None
        except TimeoutError:
            raise DeadlineError(
                f"no byte of the open block for {self._limits.put_idle_s} s", "put it again"
            ) from None
        if opening is not None:
            raise MalformedMessageError("a block was opened inside another one")
        if not data:
            raise MalformedMessageError("a message without bytes")
        return data

    async def Get(  # noqa: N802
        self, request: pb.GetRequest, context: Any
    ) -> AsyncIterator[GetPart]:
        """Stream the wanted strata in request order, reading a few blocks ahead."""
        keys = parse_hashes(request.scope, request.block_hashes, self._limits.max_hashes)
        strata = parse_strata(request.strata)
        layers = layer_range(request)
        tenant = self._admit(context)
        namespace = tenant.namespace
        with self._workload.call():
            wait_s = min(request.wait_ms, self._limits.max_wait_ms) / 1000
            wait_until = asyncio.get_running_loop().time() + wait_s if wait_s else 0.0
            reads = read_ahead(
                self._store,
                namespace.run(keys),
                strata,
                wait_until,
                self._quotas.of(tenant),
                lambda: self._quotas.may_read_ahead(tenant),
            )
            async with contextlib.aclosing(reads):
                index = 0
                async for ready in reads:
                    blocks = [shown(read, ScopeDigest(request.scope), namespace) for read in ready]
                    for part in get_parts(index, blocks, layers):
                        self._store.counters.add(names.SENT_BYTES, sum(map(len, part.data)))
                        yield part
                    index += len(ready)

    async def Pin(self, request: pb.PinRequest, context: Any) -> pb.PinReply:  # noqa: N802
        """Exempt blocks from eviction for a while."""
        keys = parse_keys(request.keys, self._limits.max_hashes)
        ttl_ms = min(request.ttl_ms, self._limits.max_pin_ttl_ms)
        if not ttl_ms:
            raise InvalidRequestError("ttl_ms must be positive", "say for how long to pin")
        with self._workload.call():
            stored = self._admit(context).namespace.keys(keys)
            missing = set(await self._store.pin(stored, ttl_ms / 1000))
        absent = (k for k, s in zip(keys, stored, strict=True) if s in missing)
        return pb.PinReply(missing=map(key_message, absent))

    async def Unpin(self, request: pb.UnpinRequest, context: Any) -> pb.UnpinReply:  # noqa: N802
        """End pins early."""
        keys = parse_keys(request.keys, self._limits.max_hashes)
        await self._store.unpin(self._caller(context).namespace.keys(keys))
        return pb.UnpinReply()

    async def Delete(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteReply:  # noqa: N802
        """Forget blocks in every tier."""
        keys = parse_keys(request.keys, self._limits.max_hashes)
        tenant = self._admit(context)
        keys = tenant.namespace.keys(keys)
        with self._workload.call():
            self._quotas.of(tenant).remove(keys)
            return pb.DeleteReply(deleted=await self._store.delete(keys))

    async def Release(self, request: ReleaseRequest, context: Any) -> ReleaseReply:  # noqa: N802
        """Let what a session alone used go first."""
        check_names(request.session, request.account)
        if not request.session:
            raise InvalidRequestError("no session to release", "name the session of the hints")
        tenant = self._admit(context)
        with self._workload.call():
            blocks = self._store.retention.release(tenant.name, request.account, request.session)
        return ReleaseReply(blocks=blocks)


def _data_size(part: PutPart) -> int:
    return sum(map(len, part.data))


@contextlib.contextmanager
def _naming(key: BlockKey) -> Iterator[None]:
    """Let a refusal name the block, by the key that its tenant knows."""
    try:
        yield
    except ThrottledError as error:
        error.metadata["block_key"] = key.encode()
        raise


def _refused(error: ThrottledError) -> pb.PutReply:
    return pb.PutReply(
        key=key_message(BlockKey.decode(error.metadata["block_key"])),
        outcome=pb.PUT_OUTCOME_REJECTED,
        reason=f"throttled: {error.message}",
    )
