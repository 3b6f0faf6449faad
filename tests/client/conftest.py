# ruff: noqa: N802 - gRPC gives the handlers their names
"""A test double of the gateway: the real contract over a real socket, scripted by attributes."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvstrata.client import Client
from kvstrata.protos import (
    admin_pb2,
    admin_pb2_grpc,
    frame_pb2,
    inference_pb2,
    inference_pb2_grpc,
    kvstore_pb2,
    retention_pb2,
)
from kvstrata.protos.credentials import ServerTls
from kvstrata.protos.errors import BlockNotFoundError, KVStrataError, UnknownPresetError
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.service import SERVER_OPTIONS, ContractInterceptor, bind

PRESETS = ("balanced", "exact", "near-lossless", "small")
SCOPE = bytes(range(16))


def words_of(request: inference_pb2.GenerateRequest) -> list[str]:
    if request.WhichOneof("prompt") == "token_ids":
        return [str(i) for i in request.token_ids.ids]
    if request.WhichOneof("prompt") == "messages":
        return " ".join(m.content for m in request.messages.messages).split()
    return request.text.split()


class Gateway(inference_pb2_grpc.InferenceServicer, admin_pb2_grpc.AdminServicer):
    """Echoes the prompt's words, one token each, and reports a hit for a prompt seen before."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.seen: list[list[str]] = []
        self.released: list[str] = []
        self.delay_s = 0.0
        self.error: KVStrataError | None = None
        self.error_after = 0
        self.without_end = False
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.started = threading.Event()
        self.freed = threading.Event()
        self.health = "ok"
        self.loop: asyncio.AbstractEventLoop
        self.tier_down = ""
        self.in_flight = 0
        self.blocks = {bytes([i]) * 16: self._headers(bytes([i]) * 16) for i in range(5)}
        self.pinned = {bytes([1]) * 16}
        self.placeholder = ""

    async def serve(self, tls: ServerTls | None = None) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[ContractInterceptor()], options=SERVER_OPTIONS)
        inference_pb2_grpc.add_InferenceServicer_to_server(self, server)
        admin_pb2_grpc.add_AdminServicer_to_server(self, server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self.address = f"127.0.0.1:{bind(server, '127.0.0.1:0', tls)}"
        await server.start()
        return server

    def set_serving(self, status: int) -> None:
        asyncio.run_coroutine_threadsafe(self._health.set("", status), self.loop).result(10)

    async def Generate(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if request.preset and request.preset not in PRESETS:
            raise UnknownPresetError(f"no preset {request.preset!r}", f"use one of {PRESETS}")
        words = words_of(request)
        limit = request.sampling.max_tokens or 256
        try:
            for i, word in enumerate(words[:limit]):
                if self.error is not None and i == self.error_after:
                    raise self.error
                if self.status is not None and i == self.error_after:
                    await context.abort(*self.status)
                yield inference_pb2.GenerateReply(token_ids=[i + 1], text=(" " if i else "") + word)
                self.started.set()
                await asyncio.sleep(self.delay_s)
            if not self.without_end:
                yield self._last(request, words, limit)
        finally:
            self.freed.set()

    def _last(self, request, words, limit):
        shareable = len(words) // BLOCK_TOKENS * BLOCK_TOKENS
        hit = any(words[:shareable] == old[:shareable] for old in self.seen) and shareable
        self.seen.append(words)
        stopped = len(words) <= limit
        return inference_pb2.GenerateReply(
            finish_reason=inference_pb2.FINISH_REASON_STOP
            if stopped
            else inference_pb2.FINISH_REASON_LENGTH,
            usage=inference_pb2.Usage(
                prompt_tokens=len(words), completion_tokens=min(len(words), limit)
            ),
            cache=inference_pb2.CacheReport(
                prompt_tokens=len(words),
                shareable_tokens=shareable,
                cached_tokens=shareable if hit else 0,
                bytes_fetched=shareable * 10 if hit else 0,
                tier="redis" if hit else "",
                precision="base+mid" if hit else "",
                codec="fallback",
                stages=[inference_pb2.StageTime(stage="prefill", node="p0", seconds=0.5)],
                recomputes=[inference_pb2.Recompute(reason="corrupt", tokens=64)] if hit else [],
                committed_blocks=0 if hit else shareable // BLOCK_TOKENS,
                replays=1,
            ),
        )

    async def GetModel(self, request, context):
        self.metadata.append(dict(context.invocation_metadata()))
        if self.error is not None:
            raise self.error
        await asyncio.sleep(self.delay_s)
        return inference_pb2.GetModelReply(
            name="smollm2",
            fingerprint=SCOPE,
            max_positions=8192,
            vocab_size=49152,
            presets=PRESETS,
            block_tokens=BLOCK_TOKENS,
            kv_bytes_per_token_bf16=23040,
            placeholder=self.placeholder,
        )

    async def Release(self, request, context):
        if self.error is not None:
            raise self.error
        self.released.append(request.session)
        return retention_pb2.ReleaseReply(blocks=3)

    async def Stats(self, request, context):
        if self.error is not None:
            raise self.error
        down = self.tier_down
        return admin_pb2.StatsReply(
            tiers=[
                admin_pb2.TierStats(
                    tier="dram", healthy=True, blocks=5, bytes=500, capacity_bytes=1 << 20, hits=7
                ),
                admin_pb2.TierStats(
                    tier="redis", healthy=not down, detail=down, hits=3, evictions=2
                ),
            ],
            counters=[
                admin_pb2.Counter(name="misses_total", labels={"reason": "absent"}, value=4),
                admin_pb2.Counter(name="misses_total", labels={"reason": "corrupt"}, value=1),
                admin_pb2.Counter(name="hits_total", labels={"tier": "dram"}, value=7),
                admin_pb2.Counter(name="puts_total", value=11),
            ],
            pinned_blocks=1,
            pinned_bytes=100,
            in_flight_puts=2,
            uptime_s=12.5,
            health=self.health,
        )

    async def ListBlocks(self, request, context):
        names = sorted(self.blocks) if request.scope in (b"", SCOPE) else []
        first = int(request.page_token or 0)
        last = first + min(request.page_size or 100, 2)
        return admin_pb2.ListBlocksReply(
            blocks=[self._listing(name) for name in names[first:last]],
            next_page_token=str(last) if last < len(names) else "",
        )

    async def Inspect(self, request, context):
        name = request.key.block_hash
        if name not in self.blocks:
            raise BlockNotFoundError("no tier holds this block", "list blocks with `kvctl ls`")
        return admin_pb2.InspectReply(block=self._listing(name), headers=self.blocks[name])

    async def Evict(self, request, context):
        names = [key.block_hash for key in request.keys] or list(self.blocks)
        kept = [name for name in names if name in self.pinned]
        gone = [name for name in names if name in self.blocks and name not in self.pinned]
        for name in gone:
            del self.blocks[name]
        return admin_pb2.EvictReply(evicted=len(gone), skipped_pinned=len(kept))

    async def Drain(self, request, context):
        return admin_pb2.DrainReply(drained=self.in_flight == 0, in_flight=self.in_flight)

    def _listing(self, name):
        return admin_pb2.BlockListing(
            key=kvstore_pb2.BlockKey(scope=SCOPE, block_hash=name),
            strata=[
                kvstore_pb2.StratumSize(stratum=header.stratum, frame_bytes=100 * header.stratum)
                for header in self.blocks[name]
            ],
            tiers=["dram", "redis"],
            pinned=name in self.pinned,
        )

    @staticmethod
    def _headers(name):
        return [
            frame_pb2.FrameHeader(
                scope=SCOPE,
                block_hash=name,
                parent_hash=SCOPE,
                stratum=stratum,
                encoding_id=b"\xab" * 16,
                codec="fallback",
                codec_version=1,
                rope=frame_pb2.ROPE_FORM_FRAME,
                kv_dtype="bfloat16",
                num_layers=2,
                num_kv_heads=3,
                head_dim=64,
                token_ids=range(BLOCK_TOKENS),
                segments=[frame_pb2.Segment(layer=i, offset=64 * i, length=40) for i in range(2)],
                attachments=[frame_pb2.Attachment(name="rekv[b]", length=9)],
            )
            for stratum in (frame_pb2.STRATUM_BASE, frame_pb2.STRATUM_MID)
        ]


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """The double in a thread of its own, for blocking callers."""
    double = Gateway()
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        server = await double.serve()
        ready.set()
        await stop.wait()
        await server.stop(None)

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert ready.wait(10)
    double.loop = loop
    yield double
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.fixture
async def gateway_here() -> AsyncIterator[Gateway]:
    """The double on the test's own event loop, for asyncio callers."""
    double = Gateway()
    server = await double.serve()
    yield double
    await server.stop(None)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.address, timeout_s=20) as client:
        yield client


@pytest.fixture
def no_server() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
