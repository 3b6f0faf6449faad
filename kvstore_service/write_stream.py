"""One Write stream on the server: the blocks that are open on it, from opening to commit."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.commit_rule import (
    BlockRejectedError,
    check_draft,
    check_finished,
)
from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.live_block import Ending, LiveBlock
from kvstrata.kvstore_service.put_stream import ByteBudget, declared_sizes
from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.read_ahead import cancel
from kvstrata.kvstore_service.request_check import parse_key
from kvstrata.kvstore_service.segment_assembly import SegmentAssembly
from kvstrata.kvstore_service.store import BlockStore, Presence, PutResult
from kvstrata.kvstore_service.tenants import Tenant
from kvstrata.kvstore_service.wire import key_message
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import (
    CorruptFrameError,
    DeadlineError,
    LimitError,
    MalformedMessageError,
    ThrottledError,
)
from kvstrata.protos.frame import assemble_frame
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockKey

MAX_HEADER_BYTES = 4096
"""Of an opening's header, which is kept outside every budget; real ones take about 400 bytes, since
the tables of segments and attachments come last, with the head."""
MAX_STATUSES = 1024
"""That wait for a client to read them; beyond, its stream is read no further."""

_UNFINISHED = ("abandoned", "writer_gone")
OPEN, PENDING, DONE = pb.WRITE_STATE_OPEN, pb.WRITE_STATE_PENDING, pb.WRITE_STATE_DONE


@dataclass(slots=True)
class OpenBlock:
    """One block of the stream.

    Attributes:
        number: The writer's.
        key: As the writer knows it.
        durability: See ``PutOpen``.
        sizes: Most bytes of each stratum's frame.
        live: What readers follow.
        assemblies: Where the segments of each stratum come together.
        held: Everything that is given back when the block ends.
        held_bytes: Reserved for its segments.
    """

    number: int
    key: BlockKey
    durability: str
    sizes: dict[int, int]
    live: LiveBlock
    assemblies: dict[int, SegmentAssembly]
    held: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    held_bytes: int = 0


class WriteStream:
    """Keeps what ``Write`` promises in ``kvstore.proto`` for one stream. One event loop owns it."""

    def __init__(
        self,
        store: BlockStore,
        workload: Workload,
        limits: StoreLimits,
        tenant: Tenant,
        quotas: Quotas,
        budget: ByteBudget,
    ) -> None:
        self._store = store
        self._workload = workload
        self._limits = limits
        self._tenant = tenant
        self._quotas = quotas
        self._budget = budget
        self._open: dict[int, OpenBlock] = {}
        self._last_number = -1
        self._commits: set[asyncio.Task[None]] = set()
        self._statuses: asyncio.Queue[pb.WriteStatus | None] = asyncio.Queue(MAX_STATUSES)
        self._has_ended = False

    async def serve(
        self, requests: AsyncIterator[pb.WriteRequest]
    ) -> AsyncGenerator[pb.WriteReply]:
        """Yield the replies to ``requests``; raises what breaks the stream."""
        receiving = asyncio.create_task(self._receive(requests))
        try:
            while statuses := await self._told():
                yield pb.WriteReply(statuses=statuses)
            await receiving
        finally:
            await cancel([receiving])
            if self._commits:  # they have arrived whole
                unread = asyncio.create_task(self._discard_statuses())
                await asyncio.wait(set(self._commits))
                await cancel([unread])

    async def _discard_statuses(self) -> None:
        while True:
            await self._statuses.get()

    async def _told(self) -> list[pb.WriteStatus]:
        """Return what there is to tell, waiting for it; nothing once all has been told."""
        if self._statuses.empty() and self._has_ended:
            return []
        status = await self._statuses.get()
        told = [] if status is None else [status]
        while not self._statuses.empty():
            status = self._statuses.get_nowait()
            told += [] if status is None else [status]
        return told

    async def _receive(self, requests: AsyncIterator[pb.WriteRequest]) -> None:
        """Handle every request; its end, however it comes, ends what is not finished."""
        try:
            while (request := await self._next(requests)) is not None:
                await self._handle(request)
            for block in list(self._open.values()):
                await self._reject(block, "writer_gone", "the stream ended before the block")
            if self._commits:
                await asyncio.wait(set(self._commits))
        finally:
            for block in list(self._open.values()):
                await self._end(block, "writer_gone")
            self._has_ended = True
            if not self._statuses.full():  # else there is something to wake up for
                self._statuses.put_nowait(None)

    async def _next(self, requests: AsyncIterator[pb.WriteRequest]) -> pb.WriteRequest | None:
        idle_s = self._limits.put_idle_s
        try:
            async with asyncio.timeout(idle_s if self._open else None):
                return await anext(requests)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise DeadlineError(
                f"no message for {idle_s} s while {len(self._open)} blocks are open",
                "send empty requests while the work goes on",
            ) from None

    async def _handle(self, request: pb.WriteRequest) -> None:
        if request.opens:
            await self._open_all(request.opens)
        for segment in request.segments:
            block = self._find(segment.block)
            if block is not None:
                await self._take(block, segment)
        for finish in request.finishes:
            block = self._find(finish.block)
            if block is not None:
                await self._finish(block, finish)
        for number in request.aborts:
            block = self._find(number)
            if block is not None:
                await self._reject(block, "abandoned", "by its writer")
        if request.progress:
            for block in self._open.values():
                block.live.touch()

    def _find(self, number: int) -> OpenBlock | None:
        """Return the open block of that number; None if it has ended already."""
        if number > self._last_number:
            raise MalformedMessageError(f"block {number} was never opened", "open it first")
        return self._open.get(number)

    async def _open_all(self, opens: Sequence[pb.WriteOpen]) -> None:
        """Answer every opening: write it, somebody else does, or it is done."""
        most = self._limits.max_hashes
        if len(self._open) + len(opens) > most:
            raise LimitError(f"more than {most} open blocks", "finish some before opening others")
        checked = [self._check(opening) for opening in opens]
        stored = self._tenant.namespace.keys([key for key, _ in checked])
        found, _ = await self._store.locate(stored)
        for opening, (key, sizes), stored_key, presence in zip(
            opens, checked, stored, found, strict=True
        ):
            await self._open_one(opening, key, sizes, stored_key, presence)

    def _check(self, opening: pb.WriteOpen) -> tuple[BlockKey, dict[int, int]]:
        """Return key and sizes of an opening; raises for one that breaks the contract."""
        if opening.block <= self._last_number:
            raise MalformedMessageError(
                f"block {opening.block} was opened before", "number blocks in ascending order"
            )
        self._last_number = opening.block
        key = parse_key(opening.key)
        header_bytes = opening.header.ByteSize()
        if header_bytes > MAX_HEADER_BYTES:
            raise LimitError(
                f"a header of {header_bytes} bytes exceeds the limit of {MAX_HEADER_BYTES}",
                "open the block with what the codec's draft header says, and nothing more",
                block_key=key.encode(),
            )
        sizes = declared_sizes(key, opening.strata, self._limits)
        self._store.check_durability(opening.durability)
        return key, sizes

    async def _open_one(
        self,
        opening: pb.WriteOpen,
        key: BlockKey,
        sizes: dict[int, int],
        stored_key: BlockKey,
        presence: Presence,
    ) -> None:
        number = opening.block
        try:
            check_draft(key, opening.header, sizes)
        except BlockRejectedError as error:
            self._count_rejected(error.kind)
            await self._tell(number, key, pb.PUT_OUTCOME_REJECTED, error.message)
            return
        here = {stratum for _, held in presence for stratum in held}
        if here >= sizes.keys():
            self._count_open("exists")
            tiers = [name for name, _ in presence]
            await self._tell(number, key, pb.PUT_OUTCOME_EXISTS, "", tiers)
            return
        if self._store.arrivals.num_pending([stored_key]):
            self._count_open("pending")
            await self._say(pb.WriteStatus(block=number, state=PENDING))
            return
        header = FrameHeader()
        header.CopyFrom(opening.header)  # a part of a message keeps all of it in memory
        block = OpenBlock(
            number,
            key,
            opening.durability,
            sizes,
            LiveBlock(stored_key, header),
            {stratum: SegmentAssembly(size) for stratum, size in sizes.items()},
        )
        try:
            if self._workload.is_draining:
                raise ThrottledError("draining: the store is draining", "use another store")
            self._quotas.count_request(self._tenant)
        except ThrottledError as error:
            self._count_open("throttled")
            await self._tell(number, key, pb.PUT_OUTCOME_REJECTED, f"throttled: {error.message}")
            return
        block.held.enter_context(self._workload.receiving())
        block.held.enter_context(self._store.arrivals.following(block.live))
        block.held.callback(self._give_back, block)
        self._open[number] = block
        self._count_open("open")
        await self._say(pb.WriteStatus(block=number, state=OPEN))

    def _reserve(self, block: OpenBlock, num_bytes: int) -> None:
        """Hold what the block's next segment needs, until the block ends.

        Raises:
            ThrottledError: There is too little now. Nobody waits for more while holding something:
                two writers could wait for each other.
        """
        self._quotas.check_in_flight(self._tenant, num_bytes)
        self._budget.take(num_bytes)
        self._quotas.of(self._tenant).in_flight_bytes += num_bytes
        block.held_bytes += num_bytes

    def _give_back(self, block: OpenBlock) -> None:
        self._budget.give_back(block.held_bytes)
        self._quotas.of(self._tenant).in_flight_bytes -= block.held_bytes
        block.held_bytes = 0

    async def _take(self, block: OpenBlock, part: pb.LayerSegment) -> None:
        assembly = block.assemblies.get(int(part.stratum))
        if assembly is None:
            raise MalformedMessageError(
                f"block {block.number} was opened without stratum {int(part.stratum)}"
            )
        try:
            if assembly.is_between_segments:
                self._reserve(block, min(part.length, block.sizes[int(part.stratum)]))
            segment = assembly.add(part)
        except ThrottledError as error:
            await self._reject(block, "throttled", error.message)
        except CorruptFrameError as error:
            await self._reject(block, "corrupt", error.message)
        except LimitError as error:
            await self._reject(block, "limit", error.message)
        else:
            if segment is not None:
                block.live.add(segment)

    async def _finish(self, block: OpenBlock, finish: pb.WriteFinish) -> None:
        """Check what came, and commit it without holding up the stream."""
        heads = {int(head.stratum): head for head in finish.heads}
        try:
            frames = {
                stratum: self._assemble(block, stratum, heads.get(stratum))
                for stratum in block.sizes
            }
        except (BlockRejectedError, CorruptFrameError) as error:
            kind = error.kind if isinstance(error, BlockRejectedError) else "corrupt"
            await self._reject(block, kind, error.message.removeprefix(f"{kind}: "))
            return
        del self._open[block.number]
        task = asyncio.create_task(self._commit(block, frames, heads))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)

    def _assemble(self, block: OpenBlock, stratum: int, head: pb.StratumHead | None) -> bytes:
        if head is None or not block.assemblies[stratum].is_between_segments:
            raise CorruptFrameError(f"stratum {stratum} was finished before it was whole")
        segments = [s for s in block.live.segments if s.stratum == stratum]
        check_finished(block.live.header, head.head, segments)
        parts = [*(segment.data for segment in segments), *head.attachments]
        return assemble_frame(head.head, parts, block.sizes[stratum])

    async def _commit(
        self, block: OpenBlock, frames: dict[int, bytes], heads: dict[int, pb.StratumHead]
    ) -> None:
        key, size = block.live.key, sum(map(len, frames.values()))
        self._store.counters.add(names.RECEIVED_BYTES, size)
        reason = "writer_gone"
        try:
            async with self._quotas.room(self._tenant, key, size, self._store) as room:
                room.kept = True
                stored = self._tenant.namespace.stored(block.key, frames)
                result = await self._store.put(key, stored, block.durability)
                room.kept = result.outcome != pb.PUT_OUTCOME_REJECTED
            reason = "" if room.kept else "rejected"
        except ThrottledError as error:
            reason = "rejected"
            self._count_rejected("throttled")
            result = PutResult(pb.PUT_OUTCOME_REJECTED, f"throttled: {error.message}")
        finally:  # before it is told: the client may read that late
            block.live.end(Ending(reason, {} if reason else heads))
            await block.held.aclose()
        told = result.outcome, result.reason, result.tiers
        await self._statuses.put(_done(block.number, block.key, *told))

    async def _reject(self, block: OpenBlock, kind: str, what: str) -> None:
        """End a block that will not be committed, and tell writer and readers."""
        if kind not in _UNFINISHED:
            self._count_rejected(kind)
        await self._end(block, kind if kind in ("corrupt", *_UNFINISHED) else "rejected")
        await self._tell(block.number, block.key, pb.PUT_OUTCOME_REJECTED, f"{kind}: {what}")

    def _count_rejected(self, kind: str) -> None:
        self._store.counters.add(names.PUTS, outcome="rejected", reason=kind)

    async def _end(self, block: OpenBlock, reason: str) -> None:
        self._open.pop(block.number, None)
        if reason in _UNFINISHED:
            self._store.counters.add(names.UNFINISHED, reason=reason)
        block.live.end(Ending(reason))
        await block.held.aclose()

    def _count_open(self, state: str) -> None:
        self._store.counters.add(names.OPENED, state=state)

    async def _tell(
        self, number: int, key: BlockKey, outcome: Any, reason: str, tiers: Iterable[str] = ()
    ) -> None:
        await self._say(_done(number, key, outcome, reason, tiers))

    async def _say(self, status: pb.WriteStatus) -> None:
        """Queue a status; waits while the client reads none, no longer than it may be silent.

        Raises:
            DeadlineError: It read none for so long.
        """
        idle_s = self._limits.put_idle_s
        try:
            async with asyncio.timeout(idle_s):
                await self._statuses.put(status)
        except TimeoutError:
            raise DeadlineError(
                f"no status was read for {idle_s} s while {MAX_STATUSES} wait", "read the replies"
            ) from None


def _done(
    number: int, key: BlockKey, outcome: Any, reason: str, tiers: Iterable[str]
) -> pb.WriteStatus:
    result = pb.PutReply(key=key_message(key), outcome=outcome, reason=reason, tiers=tiers)
    return pb.WriteStatus(block=number, state=DONE, result=result)
