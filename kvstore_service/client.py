"""The store's asynchronous client: how prefill and decode nodes publish and fetch blocks."""

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import DecodeError

from kvstrata.kvstore_service.attachment import AttachedBlock, AttachedSegment, Attachment
from kvstrata.kvstore_service.block_writer import BlockWriter, PutOutcome, outcome_of
from kvstrata.kvstore_service.data_codec import PutPart, decode_get_reply, encode_put_request
from kvstrata.kvstore_service.found import (
    FetchedStratum,
    FoundBlock,
    FoundBlocks,
    GetAssembly,
    LookupResult,
)
from kvstrata.kvstore_service.put_parts import AsyncBlocks, Blocks, iterate, put_parts
from kvstrata.kvstore_service.retrieved import Retrieved, retrieve_request, retrieved
from kvstrata.kvstore_service.wire import key_message, key_of, stratum_enum
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos import retention_pb2, tracing
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials
from kvstrata.protos.errors import MalformedMessageError, UnavailableError, from_rpc_error
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from kvstrata.protos.kvstore_pb2_grpc import KVStoreStub
from kvstrata.protos.retention import Retention
from kvstrata.protos.service import (
    call_metadata,
    open_channel,
)

__all__ = [
    "AttachedBlock",
    "AttachedSegment",
    "BlockWriter",
    "FetchedStratum",
    "FoundBlock",
    "LookupResult",
    "PutOutcome",
    "StoreClient",
]

THROTTLED = "throttled: "


class StoreClient:
    """A connection to one store. Every call has a deadline and raises only ``KVStrataError``.

    Belongs to the event loop in which it is made.

    Args:
        address: ``host:port``.
        timeout_s: Deadline of each call; ``put`` and ``get`` take their own.
        max_frame_bytes: A frame announced larger than this is refused before anything is allocated.
        credentials: How the store is known, and what is shown to it; plaintext without any.

    Attributes:
        dropped_puts: Blocks that the store refused for the present; nothing else came of it.

    Raises:
        ConfigurationError: A file of ``credentials`` is bad.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float = 10.0,
        *,
        max_frame_bytes: int = 256 << 20,
        credentials: ClientCredentials = ANONYMOUS,
    ) -> None:
        self.address = address
        self.dropped_puts = 0
        self._timeout_s = timeout_s
        self._max_frame_bytes = max_frame_bytes
        self._metadata = call_metadata(credentials)
        self._channel = open_channel(address, credentials)
        self._stub: Any = KVStoreStub(self._channel)  # type: ignore[no-untyped-call]
        self._put: Any = self._channel.stream_stream(
            "/kvstrata.v1.KVStore/Put",
            request_serializer=encode_put_request,
            response_deserializer=pb.PutReply.FromString,
        )
        self._get: Any = self._channel.unary_stream(
            "/kvstrata.v1.KVStore/Get",
            request_serializer=pb.GetRequest.SerializeToString,
            response_deserializer=decode_get_reply,
        )

    def _headers(self) -> tuple[tuple[str, str], ...]:
        """Return the headers of a call that is made now."""
        return (*self._metadata, *tracing.headers())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Idempotent."""
        await self._channel.close()

    async def lookup(
        self,
        scope: ScopeDigest,
        hashes: Sequence[BlockHash],
        *,
        lease_s: float = 0.0,
        retention: Retention | None = None,
    ) -> LookupResult:
        """Return the longest run of committed blocks from the first hash on.

        Args:
            scope: Whose blocks.
            hashes: Which blocks.
            lease_s: How long what is told stays, or for the store's limit.
            retention: A hint for all of the blocks, also for those that are made later.
        """
        request = pb.LookupRequest(
            scope=scope, block_hashes=b"".join(hashes), lease_ms=int(lease_s * 1000)
        )
        if retention is not None:
            request.retention.CopyFrom(retention.message())
        reply = await self._call(self._stub.Lookup, request)
        return LookupResult(FoundBlocks(reply), reply.degraded, reply.pending)

    async def put(
        self,
        blocks: Blocks | AsyncBlocks,
        *,
        durability: str = "",
        retention: Retention | None = None,
        timeout_s: float | None = None,
    ) -> list[PutOutcome]:
        """Publish blocks on one stream, without waiting for one before sending the next.

        Returns one outcome a block, in order. If it raises, blocks may have been committed: putting
        them again is harmless. An error of ``blocks`` itself ends the stream and is raised.

        A store that refuses more for the present raises nothing: what it did not commit is
        "rejected" as "throttled" and counted in ``dropped_puts``; so is the rest of ``blocks``,
        but of an asynchronous iterable no more is taken.

        Args:
            blocks: Keys and frames.
            durability: The tier that must hold a block before it counts as committed: "dram",
                "redis", "ssd" or "object". Tiers below it get the block afterwards.
            retention: A hint for the blocks.
            timeout_s: Deadline of the whole call.
        """
        failures: list[Exception] = []
        sent: list[BlockKey] = []
        source = iter(blocks) if isinstance(blocks, Iterable) else blocks

        async def requests() -> AsyncIterator[PutPart]:
            try:
                async for key, frames in iterate(source):
                    sent.append(key)
                    for request in put_parts(key, frames, durability, retention):
                        yield request
            except Exception as error:
                failures.append(error)
                call.cancel()

        call = self._put(requests(), timeout=timeout_s or self._timeout_s, metadata=self._headers())
        outcomes: list[PutOutcome] = []
        async with contextlib.aclosing(self._replies(call, failures)) as replies:
            async for reply in replies:
                outcomes.append(outcome_of(reply))
                if outcomes[-1].reason.startswith(THROTTLED):
                    break
        if outcomes and outcomes[-1].reason.startswith(THROTTLED):
            rest = source if isinstance(source, Iterator) else ()
            unsent = [*sent[len(outcomes) :], *(key for key, _ in rest)]
            self.dropped_puts += 1 + len(unsent)
            return outcomes + [replace(outcomes[-1], key=key) for key in unsent]
        if failures:
            raise failures[0]
        if len(outcomes) != len(sent):
            raise UnavailableError(
                f"{self.address} answered {len(outcomes)} of {len(sent)} blocks", "put them again"
            )
        return outcomes

    async def get(
        self,
        scope: ScopeDigest,
        hashes: Sequence[BlockHash],
        strata: Sequence[int],
        *,
        layers: tuple[int, int] | None = None,
        wait_ms: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[FetchedStratum, None]:
        """Yield every wanted stratum of every block, in request order, as it arrives.

        Close the iterator early (``contextlib.aclosing``) to stop the transfer.

        Args:
            scope: Whose blocks.
            hashes: Which blocks.
            strata: Which strata, in the order to receive them.
            layers: Half-open range of layers; all without it.
            wait_ms: How long the store may hold the answer for a block that is not committed yet.
            timeout_s: Deadline of the whole call, ``wait_ms`` comes on top.
        """
        first_layer, last_layer = layers or (0, 0)
        request = pb.GetRequest(
            scope=scope,
            block_hashes=b"".join(hashes),
            strata=map(stratum_enum, strata),
            first_layer=first_layer,
            last_layer=last_layer,
            wait_ms=wait_ms,
        )
        deadline_s = (timeout_s or self._timeout_s) + wait_ms / 1000
        call = self._get(request, timeout=deadline_s, metadata=self._headers())
        assembly = GetAssembly(scope, hashes, self._max_frame_bytes)
        async with contextlib.aclosing(self._replies(call)) as replies:
            async for part in replies:
                for fetched in assembly.add(part):
                    yield fetched

    async def retrieve(
        self,
        scope: ScopeDigest,
        hashes: Sequence[BlockHash],
        queries: Sequence[tuple[int, Sequence[float]]],
        *,
        top_k: int,
        chunk: int = 1,
        sinks: int = 0,
        recent: int = 0,
        cosine: bool = False,
        timeout_s: float | None = None,
    ) -> Retrieved:
        """Return the blocks that answer each query best, by their stored mean keys (ReKV).

        Args:
            scope: Whose blocks.
            hashes: Which blocks, in order of time; all of the scope, by position, without any.
            queries: Layer, and a vector of (query heads * head_dim,) before RoPE.
            top_k: Blocks wanted for each query, a multiple of ``chunk``.
            chunk: So many neighbours are taken or left together.
            sinks: First blocks, always taken, on top of ``top_k``.
            recent: Last blocks, likewise.
            cosine: Compare directions, not dot products.
            timeout_s: Deadline; reading many representatives for the first time takes a while.
        """
        request = retrieve_request(scope, hashes, queries, cosine=cosine)
        request.top_k, request.chunk_blocks = top_k, chunk
        request.sink_blocks, request.recent_blocks = sinks, recent
        return retrieved(await self._call(self._stub.Retrieve, request, timeout_s), hashes)

    @contextlib.asynccontextmanager
    async def write(self, *, timeout_s: float) -> AsyncIterator[BlockWriter]:
        """Give a writer of blocks that are published while they are made.

        Args:
            timeout_s: Deadline of the whole stream.
        """
        call = self._stub.Write(timeout=timeout_s, metadata=self._headers())
        deadline = asyncio.get_running_loop().time() + timeout_s
        writer = BlockWriter(call, deadline, self.address)
        try:
            yield writer
        finally:
            await writer.abandon()

    async def attach(
        self,
        scope: ScopeDigest,
        hashes: Sequence[BlockHash],
        strata: Sequence[int],
        *,
        silence_s: float,
        pending_only: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[AttachedSegment | AttachedBlock, None]:
        """Yield segments of blocks as they are made, or as they are, and each block's end.

        A segment is provisional: whatever was made of it must be thrown away unless its block ends
        with no ``reason``. Every block ends, if the call does not raise. Within a block and stratum
        layers ascend; blocks that are made together come side by side.

        Args:
            scope: Whose blocks.
            hashes: Which blocks.
            strata: Which strata.
            silence_s: How long the store may hear nothing of any wanted block before those that are
                not done end as "wait_expired"; with 0 what is not committed is absent.
            pending_only: End blocks that are neither committed nor being written at once, as
                "writer_gone", instead of waiting for somebody to write them.
            timeout_s: Deadline of the whole call.
        """
        request = pb.AttachRequest(
            scope=scope,
            block_hashes=b"".join(hashes),
            strata=map(stratum_enum, strata),
            silence_ms=int(silence_s * 1000),
            pending_only=pending_only,
        )
        deadline_s = timeout_s or self._timeout_s + silence_s
        call = self._stub.Attach(request, timeout=deadline_s, metadata=self._headers())
        keys = [BlockKey(scope, block_hash) for block_hash in hashes]
        attachment = Attachment(keys, strata, self._max_frame_bytes)
        async with contextlib.aclosing(self._replies(call)) as replies:
            async for reply in replies:
                for found in attachment.take(reply):
                    yield found
        for found in attachment.unfinished():
            yield found

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks from eviction for ``ttl_s`` or the store's limit; return the absent."""
        request = pb.PinRequest(keys=map(key_message, keys), ttl_ms=int(ttl_s * 1000))
        reply = await self._call(self._stub.Pin, request)
        return [key_of(message) for message in reply.missing]

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins early. Idempotent."""
        await self._call(self._stub.Unpin, pb.UnpinRequest(keys=map(key_message, keys)))

    async def release(self, session: str, *, account: str = "") -> int:
        """Let what a session alone used go first; return how many blocks it has. Idempotent."""
        request = retention_pb2.ReleaseRequest(session=session, account=account)
        return int((await self._call(self._stub.Release, request)).blocks)

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Forget blocks in every tier, pinned or not; return how many there were. Idempotent."""
        reply = await self._call(self._stub.Delete, pb.DeleteRequest(keys=map(key_message, keys)))
        return int(reply.deleted)

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        timeout_s = timeout_s or self._timeout_s
        try:
            return await method(request, timeout=timeout_s, metadata=self._headers())
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    async def _replies(
        self, call: Any, failures: Sequence[Exception] = ()
    ) -> AsyncGenerator[Any, None]:
        try:
            async for reply in call:
                yield reply
        except grpc.RpcError as error:
            if not failures:
                raise from_rpc_error(error, self.address) from error
        except DecodeError as error:
            raise MalformedMessageError(f"unreadable reply of {self.address}: {error}") from error
        except asyncio.CancelledError:
            if not failures:  # else it was the call that we cancelled, not our caller us
                raise
        finally:
            call.cancel()
