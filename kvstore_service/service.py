"""The KVStore service: the data plane over a ``BlockStore``."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from typing import Any

import grpc

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.data_codec import (
    GetPiece,
    decode_put_request,
    encode_get_reply,
)
from kvstrata.kvstore_service.lower_reader import Piece, Read
from kvstrata.kvstore_service.put_stream import BlockAssembly, ByteBudget
from kvstrata.kvstore_service.request_check import (
    parse_hashes,
    parse_keys,
    parse_strata,
)
from kvstrata.kvstore_service.store import BlockStore, Presence
from kvstrata.kvstore_service.wire import key_message, stratum_enum
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import DeadlineError, InvalidRequestError, MalformedMessageError
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.kvstore_pb2_grpc import KVStoreServicer
from kvstrata.protos.service import CHUNK_BYTES

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["KVStore"].full_name
_READ_AHEAD_BLOCKS = 4

LayerRange = tuple[int, int] | None
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
    return grpc.method_handlers_generic_handler(SERVICE_NAME, {**unary, "Put": put, "Get": get})


class StoreService(KVStoreServicer):
    """Serves blocks; every guarantee is in ``kvstore.proto``."""

    def __init__(self, store: BlockStore, workload: Workload, limits: StoreLimits) -> None:
        self._store = store
        self._workload = workload
        self._limits = limits
        self._budget = ByteBudget(limits.max_in_flight_bytes)

    async def Lookup(self, request: pb.LookupRequest, context: Any) -> pb.LookupReply:  # noqa: N802
        """Tell the longest run of committed blocks."""
        keys = parse_hashes(request.scope, request.block_hashes, self._limits.max_hashes)
        with self._workload.call():
            found, degraded = await self._store.lookup(keys)
        return pb.LookupReply(blocks=map(_block_info, found), degraded=degraded)

    async def Put(  # noqa: N802
        self, requests: AsyncIterator[pb.PutRequest], context: Any
    ) -> AsyncIterator[pb.PutReply]:
        """Commit blocks one after another; nothing of a block that did not arrive whole is kept."""
        with self._workload.call():
            blocks: Blocks = asyncio.Queue(1)
            receiving = asyncio.create_task(self._receive_then_end(requests, blocks))
            try:
                while (block := await blocks.get()) is not None:
                    yield await block
                await receiving
            finally:
                await _cancel([receiving])

    async def _receive_then_end(
        self, requests: AsyncIterator[pb.PutRequest], blocks: Blocks
    ) -> None:
        """Queue every block, then None, also if the stream breaks; raises what broke it."""
        try:
            await self._receive_all(requests, blocks)
        except Exception:
            await blocks.put(None)
            raise
        await blocks.put(None)

    async def _receive_all(self, requests: AsyncIterator[pb.PutRequest], blocks: Blocks) -> None:
        """Receive one block while the one before is being committed."""
        tasks: set[asyncio.Task[pb.PutReply]] = set()

        def ended(task: asyncio.Task[pb.PutReply]) -> None:
            tasks.discard(task)
            if not task.cancelled():
                task.exception()  # seen, even if the stream breaks before its turn

        try:
            async for request in requests:
                self._workload.refuse_if_draining()
                if request.WhichOneof("part") != "open":
                    raise MalformedMessageError(
                        "data without an open block",
                        "send PutOpen first, then as many bytes as declared",
                    )
                assembly = BlockAssembly(request.open, self._limits)
                arrived = asyncio.Event()
                task = asyncio.create_task(self._receive(assembly, requests, arrived))
                tasks.add(task)
                task.add_done_callback(ended)
                await blocks.put(task)
                await arrived.wait()
                if not assembly.is_complete:
                    return
        except asyncio.CancelledError:
            await _cancel(tasks)
            raise

    async def _receive(
        self,
        block: BlockAssembly,
        requests: AsyncIterator[pb.PutRequest],
        arrived: asyncio.Event,
    ) -> pb.PutReply:
        """Receive and commit one block; sets ``arrived`` when it reads no more requests."""
        with self._workload.receiving(), self._store.arrivals.writing(block.key):
            async with self._budget.reserved(block.num_bytes):
                try:
                    while not block.is_complete:
                        block.add((await self._next_part(requests)).data)
                finally:
                    arrived.set()
                self._store.counters.add(names.RECEIVED_BYTES, block.num_bytes)
                result = await self._store.put(block.key, block.frames)
        return pb.PutReply(
            key=key_message(block.key),
            outcome=result.outcome,  # type: ignore[arg-type]
            reason=result.reason,
            tiers=result.tiers,
        )

    async def _next_part(self, requests: AsyncIterator[pb.PutRequest]) -> pb.PutRequest:
        try:
            async with asyncio.timeout(self._limits.put_idle_s):
                request = await anext(requests)
        except StopAsyncIteration:
            raise InvalidRequestError(
                "the stream ended inside a block", "send every declared byte before closing"
            ) from None
        except TimeoutError:
            raise DeadlineError(
                f"no byte of the open block for {self._limits.put_idle_s} s", "put it again"
            ) from None
        if request.WhichOneof("part") != "data":
            raise MalformedMessageError("a block was opened inside another one")
        return request

    async def Get(  # noqa: N802
        self, request: pb.GetRequest, context: Any
    ) -> AsyncIterator[GetPiece]:
        """Stream the wanted strata in request order, reading a few blocks ahead."""
        keys = parse_hashes(request.scope, request.block_hashes, self._limits.max_hashes)
        strata = parse_strata(request.strata)
        layers = _layer_range(request)
        with self._workload.call():
            wait_s = min(request.wait_ms, self._limits.max_wait_ms) / 1000
            wait_until = asyncio.get_running_loop().time() + wait_s if wait_s else 0.0
            reads = self._read_ahead(keys, strata, wait_until)
            async with contextlib.aclosing(reads):
                index = 0
                async for read in reads:
                    for stratum in strata:
                        for piece in _replies(index, stratum, read, layers):
                            self._store.counters.add(names.SENT_BYTES, len(piece[1]))
                            yield piece
                    index += 1

    async def _read_ahead(
        self, keys: list[BlockKey], strata: list[int], wait_until: float
    ) -> AsyncGenerator[Read, None]:
        ahead: deque[asyncio.Task[Read]] = deque()
        upcoming = iter(keys)
        try:
            while True:
                while len(ahead) < _READ_AHEAD_BLOCKS and (key := next(upcoming, None)) is not None:
                    ahead.append(asyncio.create_task(self._store.get(key, strata, wait_until)))
                if not ahead:
                    return
                yield await ahead[0]
                ahead.popleft()
        finally:
            await _cancel(ahead)

    async def Pin(self, request: pb.PinRequest, context: Any) -> pb.PinReply:  # noqa: N802
        """Exempt blocks from eviction for a while."""
        keys = parse_keys(request.keys, self._limits.max_hashes)
        ttl_ms = min(request.ttl_ms, self._limits.max_pin_ttl_ms)
        if not ttl_ms:
            raise InvalidRequestError("ttl_ms must be positive", "say for how long to pin")
        with self._workload.call():
            missing = await self._store.pin(keys, ttl_ms / 1000)
        return pb.PinReply(missing=map(key_message, missing))

    async def Unpin(self, request: pb.UnpinRequest, context: Any) -> pb.UnpinReply:  # noqa: N802
        """End pins early."""
        await self._store.unpin(parse_keys(request.keys, self._limits.max_hashes))
        return pb.UnpinReply()

    async def Delete(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteReply:  # noqa: N802
        """Forget blocks in every tier."""
        keys = parse_keys(request.keys, self._limits.max_hashes)
        with self._workload.call():
            return pb.DeleteReply(deleted=await self._store.delete(keys))


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


def _layer_range(request: pb.GetRequest) -> LayerRange:
    first, last = request.first_layer, request.last_layer
    if first == last == 0:
        return None
    if first >= last:
        raise InvalidRequestError(
            f"[{first}, {last}) is no range of layers",
            "give first_layer < last_layer, or 0, 0 for all",
        )
    return first, last


def _replies(index: int, stratum: int, read: Read, layers: LayerRange) -> Iterator[GetPiece]:
    """Yield the pieces of one stratum, or its miss."""
    found = read[stratum]
    number = stratum_enum(stratum)
    if not isinstance(found, Piece):
        miss = pb.Miss(reason=found)
        yield pb.GetReply(index=index, stratum=number, last=True, miss=miss), b""
        return
    frame = memoryview(found.frame)
    pieces = list(_pieces(_byte_ranges(found.frame, layers)))
    for begin, end in pieces:
        reply = pb.GetReply(
            index=index,
            stratum=number,
            frame_bytes=0 if begin else len(frame),
            offset=begin,
            last=(begin, end) == pieces[-1],
            tier=found.tier,
        )
        yield reply, frame[begin:end]


def _byte_ranges(frame: bytes, layers: LayerRange) -> list[tuple[int, int]]:
    if layers is None:
        return [(0, len(frame))]
    opened = Frame.open(frame)
    begin, end = opened.layer_run(*layers)
    return [(0, opened.head_bytes), (begin, end)] if end > begin else [(0, opened.head_bytes)]


def _pieces(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for begin, end in ranges:
        for first in range(begin, end, CHUNK_BYTES):
            yield first, min(first + CHUNK_BYTES, end)


def _block_info(presence: Presence) -> pb.BlockInfo:
    sizes = {stratum: size for _, held in reversed(presence) for stratum, size in held.items()}
    return pb.BlockInfo(
        strata=map(stratum_enum, sorted(sizes)), bytes=sum(sizes.values()), tier=presence[0][0]
    )
