"""One Attach stream on the server: blocks that are here, and blocks that are being made."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.live_block import LiveBlock
from kvstrata.kvstore_service.lower_reader import Piece, Read
from kvstrata.kvstore_service.quota import Usage
from kvstrata.kvstore_service.read_ahead import cancel
from kvstrata.kvstore_service.segment_assembly import StoredSegment
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tenants import Tenant
from kvstrata.kvstore_service.wire import stratum_enum
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.frame import Frame, draft_header
from kvstrata.protos.identity import BlockKey, ScopeDigest
from kvstrata.protos.service import CHUNK_BYTES

_READS = 4  # committed blocks held at once
_QUEUED = 16  # events that wait to be sent, at most CHUNK_BYTES each
LIVE = "live"

Event = pb.AttachOpened | pb.LayerSegment | pb.AttachDone | pb.AttachMiss


class AttachStream:
    """Keeps what ``Attach`` promises in ``kvstore.proto`` for one call. One event loop owns it.

    A task follows each block; what they find is sent in the order in which they find it.

    Args:
        store: Where the blocks are.
        tenant: Whose blocks.
        usage: Of the tenant; bytes that are read and not yet sent count as in flight.
        scope: As the tenant knows it.
        keys: Stored keys of the wanted blocks.
        strata: Wanted.
        pending_only: Whether blocks that nobody writes end at once.
        silence_s: How long nothing may be heard; with 0 what is not committed is absent.
    """

    def __init__(
        self,
        store: BlockStore,
        tenant: Tenant,
        usage: Usage,
        scope: ScopeDigest,
        keys: Sequence[BlockKey],
        strata: Sequence[int],
        silence_s: float,
        pending_only: bool,
    ) -> None:
        self._store = store
        self._tenant = tenant
        self._usage = usage
        self._scope = scope
        self._keys = keys
        self._strata = strata
        self._silence_s = silence_s
        self._pending_only = pending_only
        self._events: asyncio.Queue[tuple[Event, int] | None] = asyncio.Queue(_QUEUED)
        self._reading = asyncio.Semaphore(_READS)
        self._unfinished = set(range(len(keys)))
        store.counters.add(names.WANTED, len(keys) * len(strata))
        self._followed: dict[int, LiveBlock] = {}
        self._heard_at = self._now()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def replies(self) -> AsyncGenerator[pb.AttachReply]:
        """Yield the replies, several events in each where they are small."""
        following = asyncio.create_task(self._follow_all())
        try:
            is_over = False
            while not is_over:
                reply, size = pb.AttachReply(), 0
                event = await self._events.get()
                while event is not None:
                    size += event[1]
                    _add(reply, event[0])
                    if size >= CHUNK_BYTES or self._events.empty():
                        break
                    event = self._events.get_nowait()
                is_over = event is None
                if reply.ByteSize():
                    yield reply
            await following
        finally:
            await cancel([following])
            if self._unfinished:
                self._count("cancelled", len(self._unfinished))
                num_strata = len(self._unfinished) * len(self._strata)
                self._store.counters.add(names.ABANDONED, num_strata)

    async def _follow_all(self) -> None:
        """Follow every block to its end, or until nothing was heard for too long."""
        tasks = [
            asyncio.create_task(self._follow(index, key)) for index, key in enumerate(self._keys)
        ]
        try:
            running = set(tasks)
            while running:
                done, running = await asyncio.wait(
                    running, timeout=self._patience(), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
                if running and self._patience() == 0:
                    await cancel(running)
                    for index in sorted(self._unfinished):
                        await self._miss(index, "wait_expired")
                    break
        except asyncio.CancelledError:
            await cancel(tasks)
            raise
        except Exception:
            await cancel(tasks)
            await self._events.put(None)
            raise
        await self._events.put(None)

    def _patience(self) -> float | None:
        """Return the seconds for which more silence is borne; a reader that is slow makes none."""
        if not self._silence_s:
            return None
        if not self._events.empty():
            return self._silence_s
        heard_at = max(self._heard_at, *(live.heard_at for live in self._followed.values()), 0.0)
        return max(0.0, heard_at + self._silence_s - self._now())

    async def _follow(self, index: int, key: BlockKey) -> None:
        while True:
            live = self._store.arrivals.live(key)
            if live is not None and self._silence_s:
                await self._follow_live(index, live)
                return
            async with self._reading:
                read = await self._store.read(key, self._strata)
                if not self._silence_s or _is_served(read):
                    await self._send_read(index, read)
                    return
            if self._pending_only and not self._store.arrivals.num_pending([key]):
                await self._miss(index, "writer_gone")
                return
            news = await self._store.waits.news(key)
            self._heard_at = self._now()
            if news == "committed":  # with or without the wanted strata: nothing more to wait for
                async with self._reading:
                    await self._send_read(index, await self._store.read(key, self._strata))
                return
            if news != "opened":
                await self._miss(index, news)
                return

    async def _follow_live(self, index: int, live: LiveBlock) -> None:
        """Send what a writer has sent and sends, to the block's end."""
        self._followed[index] = live
        await self._send(pb.AttachOpened(block=index, header=live.header))
        sent = 0
        while live.ending is None:
            news = live.news
            while sent < len(live.segments) and live.ending is None:
                await self._send_segment(index, live.segments[sent])
                sent += 1
            if live.ending is None:
                await news.wait()
        del self._followed[index]
        self._heard_at = self._now()
        if live.ending.reason:
            await self._miss(index, live.ending.reason)
            return
        behind = live.segments[sent:]  # only this reader keeps them now
        with self._usage.in_flight(sum(len(segment.data) for segment in behind)):
            for segment in behind:
                await self._send_segment(index, segment)
        await self._done(index, live.ending.heads, {}, LIVE)

    async def _send_read(self, index: int, read: Read) -> None:
        """Send a block that was read, or why there is none."""
        found = {s: piece for s, piece in read.items() if isinstance(piece, Piece)}
        missing = {s: reason for s, reason in read.items() if isinstance(reason, str)}
        if not found:
            await self._miss(index, next(iter(missing.values())))
            return
        size = sum(len(piece.frame) for piece in found.values())
        with self._usage.in_flight(size):
            self._usage.touch(self._keys[index])
            frames = {s: self._opened(piece.frame) for s, piece in found.items()}
            header = next(iter(frames.values())).header
            await self._send(pb.AttachOpened(block=index, header=draft_header(header)))
            for stratum, frame in frames.items():
                for entry in frame.header.segments:
                    data = bytes(frame.payload[entry.offset : entry.offset + entry.length])
                    segment = StoredSegment(stratum, entry.layer, entry.checksum, data)
                    await self._send_segment(index, segment)
            heads = {stratum: _head(stratum, frame) for stratum, frame in frames.items()}
            await self._done(index, heads, missing, next(iter(found.values())).tier)

    def _opened(self, frame: bytes) -> Frame:
        return Frame.open(self._tenant.namespace.shown(self._scope, frame))

    async def _send_segment(self, index: int, segment: StoredSegment) -> None:
        if segment.stratum not in self._strata:
            return
        for first in range(0, max(1, len(segment.data)), CHUNK_BYTES):
            part = pb.LayerSegment(
                block=index,
                stratum=stratum_enum(segment.stratum),
                layer=segment.layer,
                length=len(segment.data),
                checksum=segment.checksum,
                data=segment.data[first : first + CHUNK_BYTES],
            )
            await self._send(part)
            self._store.counters.add(names.SENT_BYTES, len(part.data))

    async def _done(
        self,
        index: int,
        heads: Mapping[int, pb.StratumHead],
        missing: Mapping[int, str],
        tier: str,
    ) -> None:
        lost = {s: missing.get(s, "absent") for s in self._strata if s not in heads}
        done = pb.AttachDone(
            block=index,
            heads=[heads[s] for s in self._strata if s in heads],
            missing=[
                pb.StratumMiss(stratum=stratum_enum(s), miss=pb.Miss(reason=reason))
                for s, reason in lost.items()
            ],
            tier=tier,
        )
        await self._send(done)
        self._store.counters.add(names.SENT_BYTES, _heads_size(done.heads))
        self._store.counters.add(names.HITS, len(done.heads), tier=tier)
        self._finished(index, "committed", lost.values())

    async def _miss(self, index: int, reason: str) -> None:
        await self._send(pb.AttachMiss(block=index, miss=pb.Miss(reason=reason)))
        self._finished(index, reason, [reason] * len(self._strata))

    def _finished(self, index: int, outcome: str, misses: Iterable[str]) -> None:
        self._unfinished.discard(index)
        self._count(outcome)
        for reason in misses:
            self._store.counters.add(names.MISSES, reason=reason)

    def _count(self, outcome: str, amount: int = 1) -> None:
        self._store.counters.add(names.ATTACHED, amount, outcome=outcome)

    async def _send(self, event: Event) -> None:
        await self._events.put((event, event.ByteSize()))
        self._heard_at = self._now()


def _is_served(read: Read) -> bool:
    """Whether waiting is pointless: something was found, or what is there cannot be used."""
    return any(isinstance(f, Piece) or f not in ("absent", "evicted") for f in read.values())


def _heads_size(heads: Iterable[pb.StratumHead]) -> int:
    return sum(len(head.head) + sum(map(len, head.attachments)) for head in heads)


def _head(stratum: int, frame: Frame) -> pb.StratumHead:
    payload = frame.payload
    return pb.StratumHead(
        stratum=stratum_enum(stratum),
        head=bytes(payload[: frame.head_bytes]),
        attachments=[
            bytes(payload[entry.offset : entry.offset + entry.length])
            for entry in frame.header.attachments
        ],
    )


def _add(reply: pb.AttachReply, event: Event) -> None:
    if isinstance(event, pb.AttachOpened):
        reply.opened.append(event)
    elif isinstance(event, pb.LayerSegment):
        reply.segments.append(event)
    elif isinstance(event, pb.AttachDone):
        reply.done.append(event)
    else:
        reply.misses.append(event)
