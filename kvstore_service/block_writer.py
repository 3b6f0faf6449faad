"""The writer's side of a Write stream: blocks that are published while they are made."""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from kvstrata.kvstore_service.wire import key_message, key_of, size_messages, stratum_enum
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import KVStrataError, UnavailableError, from_rpc_error
from kvstrata.protos.frame import Buffer, Frame, segment_checksum
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from kvstrata.protos.service import CHUNK_BYTES

KEEPALIVE_S = 5.0


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """What became of one block.

    Attributes:
        key: The block.
        outcome: "committed", "exists", "rejected", or "kept": readable, but not in the tier that
            was to hold it. Of an opening also "open": write it, or "pending": somebody else does.
        reason: Why it was rejected or only kept, or which tier it did not reach.
        tiers: Tiers that hold it now.
    """

    key: BlockKey
    outcome: str
    reason: str = ""
    tiers: tuple[str, ...] = ()


def outcome_of(reply: pb.PutReply) -> PutOutcome:
    """Return the outcome in a message."""
    name = pb.PutOutcome.Name(reply.outcome).removeprefix("PUT_OUTCOME_").lower()
    return PutOutcome(key_of(reply.key), name, reply.reason, tuple(reply.tiers))


class BlockWriter:
    """Blocks on one Write stream, from ``StoreClient.write``; leaving it gives up the unfinished.

    Opening a block announces it: until it ends, others wait for it instead of making it too. Every
    method but ``abandon`` raises ``KVStrataError`` once the stream is broken, and what is not
    committed then is lost. While it is open the stream is kept alive.

    Args:
        call: The stream.
        deadline: Loop time at which it ends.
        peer: For messages.
    """

    def __init__(self, call: Any, deadline: float, peer: str) -> None:
        self._call = call
        self._deadline = deadline
        self._peer = peer
        self._keys: dict[int, BlockKey] = {}
        self._sent: dict[int, set[tuple[int, int]]] = {}
        self._opened: dict[int, asyncio.Future[PutOutcome]] = {}
        self._ended: dict[int, asyncio.Future[PutOutcome]] = {}
        self._numbers: dict[BlockKey, int] = {}  # the last opening of each
        self._writing = asyncio.Lock()
        self._wrote_at = 0.0
        self._failure: KVStrataError | None = None
        self._tasks = [
            asyncio.create_task(self._read_replies()),
            asyncio.create_task(self._keep_alive()),
        ]

    async def open(
        self,
        drafts: Sequence[FrameHeader],
        sizes: Mapping[int, int],
        *,
        durability: str = "",
    ) -> list[PutOutcome]:
        """Announce blocks; return one outcome each: "open" says that this writer makes it.

        Args:
            drafts: What the headers of the blocks' frames will say: identity, codec and shape.
            sizes: Most bytes that a frame of each stratum will take; they are reserved.
            durability: See ``StoreClient.put``.
        """
        request = pb.WriteRequest()
        numbers = []
        for draft in drafts:
            number = len(self._keys)
            key = BlockKey(ScopeDigest(draft.scope), BlockHash(draft.block_hash))
            self._keys[number] = key
            self._numbers[key] = number
            self._sent[number] = set()
            loop = asyncio.get_running_loop()
            self._opened[number], self._ended[number] = loop.create_future(), loop.create_future()
            numbers.append(number)
            request.opens.add(
                block=number,
                key=key_message(key),
                header=draft,
                strata=size_messages(sizes),
                durability=durability,
            )
        await self._write(request)
        return [await self._await(self._opened[number]) for number in numbers]

    async def send(self, segments: Iterable[tuple[BlockKey, int, int, Buffer]]) -> None:
        """Send segments: the block, stratum, layer and bytes of each; ascending layers a stratum.

        Those of a block that has ended are left out: its outcome says why.
        """
        await self._send(
            (number, stratum, layer, data)
            for key, stratum, layer, data in segments
            if not self._ended[number := self._numbers[key]].done()
        )

    async def _send(self, segments: Iterable[tuple[int, int, int, Buffer]]) -> None:
        request, size = pb.WriteRequest(progress=True), 0
        for number, stratum, layer, data in segments:
            self._sent[number].add((stratum, layer))
            checksum = segment_checksum(data)
            view = memoryview(data)
            for first in range(0, max(1, len(data)), CHUNK_BYTES):
                part = bytes(view[first : first + CHUNK_BYTES])
                if size and size + len(part) > CHUNK_BYTES:
                    await self._write(request)
                    request, size = pb.WriteRequest(progress=True), 0
                size += len(part)
                request.segments.add(
                    block=number,
                    stratum=stratum_enum(stratum),
                    layer=layer,
                    length=len(data),
                    checksum=checksum,
                    data=part,
                )
        if size or request.segments:
            await self._write(request)

    async def finish(self, blocks: Mapping[BlockKey, Mapping[int, Buffer]]) -> list[PutOutcome]:
        """Send what is missing of opened blocks, given their frames; return what became of them.

        Segments that were sent before must be those of the frames.
        """
        numbers = [self._numbers[key] for key in blocks]
        for number, frames in zip(numbers, blocks.values(), strict=True):
            if self._ended[number].done():
                continue
            opened = {s: Frame.open(frame) for s, frame in frames.items()}
            sent = self._sent[number]
            await self._send(
                (number, stratum, entry.layer, _bytes_of(frame, entry))
                for stratum, frame in opened.items()
                for entry in frame.header.segments
                if (stratum, entry.layer) not in sent
            )
            request = pb.WriteRequest(progress=True)
            finish = request.finishes.add(block=number)
            for stratum, frame in opened.items():
                finish.heads.add(
                    stratum=stratum_enum(stratum),
                    head=bytes(frame.payload[: frame.head_bytes]),
                    attachments=[_bytes_of(frame, entry) for entry in frame.header.attachments],
                )
            await self._write(request)
        return [await self._await(self._ended[number]) for number in numbers]

    async def progress(self) -> None:
        """Let those who wait for the open blocks know that the work goes on."""
        await self._write(pb.WriteRequest(progress=True))

    async def abandon(self) -> None:
        """Give up every block that has not ended, and close the stream. Idempotent."""
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(UnavailableError("the stream is closed", "open another one"))

    async def _write(self, request: pb.WriteRequest) -> None:
        if self._failure is not None:
            raise self._failure
        async with self._writing:
            self._wrote_at = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout_at(self._deadline):
                    await self._call.write(request)
            except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError) as error:
                raise await self._why(error) from error

    async def _why(self, error: BaseException) -> KVStrataError:
        """Return what broke the stream: its status says more than a write that failed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.wait([self._tasks[0]])
        self._fail(UnavailableError(f"{self._peer}: the stream broke: {error!r}", "write it again"))
        assert self._failure is not None
        return self._failure

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(KVStrataError):  # the next call of a method raises it
            while True:
                await asyncio.sleep(KEEPALIVE_S / 2)
                if loop.time() - self._wrote_at >= KEEPALIVE_S / 2:
                    await self._write(pb.WriteRequest())

    async def _read_replies(self) -> None:
        try:
            async for reply in self._call:
                for status in reply.statuses:
                    self._told(status)
            self._fail(UnavailableError(f"{self._peer}: the stream ended", "write it again"))
        except grpc.RpcError as error:
            self._fail(from_rpc_error(error, self._peer))

    def _told(self, status: pb.WriteStatus) -> None:
        key = self._keys.get(status.block)
        if key is None:
            return
        if status.state == pb.WRITE_STATE_OPEN:
            self._opened[status.block].set_result(PutOutcome(key, "open"))
            return
        pending = status.state == pb.WRITE_STATE_PENDING
        outcome = PutOutcome(key, "pending") if pending else outcome_of(status.result)
        for future in (self._opened[status.block], self._ended[status.block]):
            if not future.done():
                future.set_result(outcome)

    async def _await(self, future: asyncio.Future[PutOutcome]) -> PutOutcome:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await asyncio.shield(future)
        except TimeoutError as error:
            raise await self._why(error) from error

    def _fail(self, error: KVStrataError) -> None:
        self._failure = self._failure or error
        for future in (*self._opened.values(), *self._ended.values()):
            if not future.done():
                future.set_exception(self._failure)
                future.exception()  # seen, should nobody wait for it


def _bytes_of(frame: Frame, entry: Any) -> bytes:
    return bytes(frame.payload[entry.offset : entry.offset + entry.length])
