"""Every call of the store, over a real socket, with messages that were changed.

No answer is a defect of ours, none is late, and afterwards the store holds nothing for anybody.
"""

import asyncio
import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc

from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.lower_reader import Piece
from kvstrata.kvstore_service.server import RunningStore, start_store
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos import admin_pb2, kvstore_pb2, retention_pb2
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import InternalError, KVStrataError, from_rpc_error
from kvstrata.protos.frame import Frame, draft_header, segment_checksum
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import CacheScope
from kvstrata.protos.service import CALL_METADATA, CHANNEL_OPTIONS
from tests.fuzz.campaign import COUNT, ONLY, FuzzError, Target, replay
from tests.fuzz.mutation import mutate, mutate_fields, mutate_messages

BASE, MID = Stratum.STRATUM_BASE, Stratum.STRATUM_MID
SCOPE = CacheScope(b"fuzz" + bytes(12), "float32", "sample/1").digest()
BLOCKS = [sample_block(SCOPE, number, strata={BASE: 800, MID: 400}) for number in range(4)]
KEYS = [pb.BlockKey(scope=key.scope, block_hash=key.block_hash) for key, _ in BLOCKS]
HASHES = b"".join(key.block_hash for key, _ in BLOCKS)
TIMEOUT_S = 60.0
AT_A_TIME = 8
SHARE = 100
CONFIG = StoreConfig(
    dram_bytes=20_000,
    limits=StoreLimits(
        max_block_bytes=8192,
        max_hashes=64,
        max_queries=4,
        max_wait_ms=5,
        max_pin_ttl_ms=20,
        max_lease_ms=20,
        max_in_flight_bytes=1 << 16,
        put_idle_s=0.2,
    ),
)
LEFT_OUT = {"Drain"}  # it ends the store's work, as it should
METHODS = {
    method.name: (service.full_name, method)
    for service in (
        kvstore_pb2.DESCRIPTOR.services_by_name["KVStore"],
        admin_pb2.DESCRIPTOR.services_by_name["Admin"],
    )
    for method in service.methods
    if method.name not in LEFT_OUT
}


def _sizes(number: int) -> list[pb.StratumSize]:
    return [
        pb.StratumSize(stratum=Stratum.ValueType(s), frame_bytes=len(f))
        for s, f in BLOCKS[number][1].items()
    ]


def _put(number: int) -> list[Any]:
    opening = pb.PutOpen(key=KEYS[number], strata=_sizes(number))
    return [
        pb.PutRequest(open=opening, data=BLOCKS[number][1][BASE]),
        pb.PutRequest(data=BLOCKS[number][1][MID]),
    ]


def _write(number: int) -> list[Any]:
    """Return a block as its writer sends it while it is made."""
    frames = {s: Frame.open(f) for s, f in BLOCKS[number][1].items()}
    opening = pb.WriteOpen(
        block=number,
        key=KEYS[number],
        header=draft_header(frames[BASE].header),
        strata=_sizes(number),
    )
    segments = [
        pb.LayerSegment(
            block=number,
            stratum=Stratum.ValueType(stratum),
            layer=layer,
            length=len(data),
            checksum=segment_checksum(data),
            data=bytes(data),
        )
        for stratum, frame in frames.items()
        for layer, data in frame.segments().items()
    ]
    heads = [
        pb.StratumHead(stratum=Stratum.ValueType(s), head=BLOCKS[number][1][s][: frame.head_bytes])
        for s, frame in frames.items()
    ]
    finish = pb.WriteFinish(block=number, heads=heads)
    return [
        pb.WriteRequest(opens=[opening], segments=segments[:3]),
        pb.WriteRequest(segments=segments[3:], progress=True),
        pb.WriteRequest(finishes=[finish]),
        pb.WriteRequest(aborts=[number + 1]),
    ]


HINT = retention_pb2.Retention(
    priority=retention_pb2.PRIORITY_HIGH, keep_ms=9, session="s", account="a"
)
QUERY = pb.RetrieveQuery(layer=0, vector=bytes(32))
CORPUS: dict[str, list[list[Any]]] = {
    "Lookup": [
        [pb.LookupRequest(scope=SCOPE, block_hashes=HASHES, lease_ms=10)],
        [pb.LookupRequest(scope=SCOPE, block_hashes=HASHES, retention=HINT)],
    ],
    "Put": [_put(0) + _put(1), _put(2), _put(3)],
    "Get": [
        [pb.GetRequest(scope=SCOPE, block_hashes=HASHES, strata=[BASE, MID], wait_ms=3)],
        [pb.GetRequest(scope=SCOPE, block_hashes=HASHES[:16], strata=[MID], last_layer=2)],
    ],
    "Write": [_write(0), _write(1)],
    "Attach": [[pb.AttachRequest(scope=SCOPE, block_hashes=HASHES, strata=[BASE], silence_ms=2)]],
    "Pin": [[pb.PinRequest(keys=KEYS, ttl_ms=10)]],
    "Unpin": [[pb.UnpinRequest(keys=KEYS)]],
    "Delete": [[pb.DeleteRequest(keys=KEYS[3:])]],
    "Release": [[retention_pb2.ReleaseRequest(session="s", account="a")]],
    "Retrieve": [
        [
            pb.RetrieveRequest(
                scope=SCOPE,
                block_hashes=HASHES,
                queries=[QUERY],
                top_k=2,
                chunk_blocks=2,
                sink_blocks=1,
                recent_blocks=1,
                similarity=pb.SIMILARITY_COSINE,
            )
        ]
    ],
    "Stats": [[admin_pb2.StatsRequest()]],
    "ListBlocks": [[admin_pb2.ListBlocksRequest(page_size=2, scope=SCOPE)]],
    "Inspect": [[admin_pb2.InspectRequest(key=KEYS[0], tokens=True)]],
    "Evict": [[admin_pb2.EvictRequest(keys=KEYS[:1], tier="dram")]],
    "Explain": [[admin_pb2.ExplainRequest(scope=SCOPE, block_hashes=HASHES)]],
    "Move": [[admin_pb2.MoveRequest(keys=KEYS[:1], source="dram", target="dram")]],
    "Verify": [[admin_pb2.VerifyRequest(tier="dram", repair=True)]],
    "Quota": [[admin_pb2.QuotaRequest(tenant="default")]],
}
ENCODED = {
    name: [[message.SerializeToString() for message in stream] for stream in streams]
    for name, streams in CORPUS.items()
}
PLAIN = [message for streams in ENCODED.values() for stream in streams for message in stream]

Call = tuple[str, list[bytes]]


def make(source: random.Random) -> Call:
    name = source.choice(sorted(METHODS))
    if name in ("Put", "Write", "Get") or source.random() < 0.5:
        name = source.choice(("Put", "Put", "Write", "Write", "Get", "Attach", name))
    which = source.randrange(len(CORPUS[name]))
    if source.random() < 0.6:  # what can be parsed gets further
        messages = [copy.deepcopy(message) for message in CORPUS[name][which]]
        for _ in range(source.choice((1, 1, 2, 3))):
            mutate_fields(source.choice(messages), source, PLAIN)
        sent = [message.SerializeToString() for message in messages]
        if METHODS[name][1].client_streaming and source.random() < 0.2:
            sent = mutate_messages(sent, source, PLAIN)
        return name, sent
    if METHODS[name][1].client_streaming:
        return name, mutate_messages(ENCODED[name][which], source, PLAIN)
    return name, [mutate(ENCODED[name][which][0], source, PLAIN)]


class Caller:
    """Sends raw messages to one store."""

    def __init__(self, running: RunningStore) -> None:
        self._running = running
        self._channel = grpc.aio.insecure_channel(running.address, options=CHANNEL_OPTIONS)
        self.outcomes: Counter[str] = Counter()

    async def call(self, made: Call) -> str:
        """Make one call, and return what came of it."""
        name, messages = made
        service, method = METHODS[name]
        path = f"/{service}/{name}"
        kind = ("stream" if method.client_streaming else "unary") + (
            "_stream" if method.server_streaming else "_unary"
        )
        factory: Callable[..., Any] = getattr(self._channel, kind)
        request: Any = iter(messages) if method.client_streaming else messages[0]
        call = factory(path)(request, metadata=CALL_METADATA, timeout=TIMEOUT_S)
        try:
            async with asyncio.timeout(TIMEOUT_S + 10):
                if method.server_streaming:
                    async for _ in call:
                        pass
                else:
                    await call
        except grpc.RpcError as error:
            return self._refusal(error)
        finally:
            if name == "Quota":  # or what it set would refuse most of what follows
                self._running.tenants.reload()
        return "answered"

    def _refusal(self, error: grpc.RpcError) -> str:
        told: KVStrataError = from_rpc_error(error)
        assert not isinstance(told, InternalError), f"a defect: {error.code()} {error.details()}"
        assert error.code() is not grpc.StatusCode.UNKNOWN, error.details()
        assert told.message, "an error without a word"
        assert "Deadline Exceeded" not in (error.details() or ""), "no answer in time"
        return type(told).__name__

    async def settle(self) -> None:
        """Check that the store is as before: nothing in flight, its blocks whole."""
        running = self._running
        async with asyncio.timeout(60):
            while running.workload.in_flight or running.workload.in_flight_puts:
                await asyncio.sleep(0.01)
        store = running.store
        assert store.arrivals._writers == {}
        assert store.arrivals._waiters == {}
        assert store.arrivals._live == {}
        assert all(usage.in_flight_bytes == 0 for usage in running.quotas._usages.values())
        await store.dram.check_integrity()
        for key, frames in BLOCKS:
            for stratum, found in (await store.read(key, [BASE, MID])).items():
                if isinstance(found, Piece):
                    assert found.frame == frames[stratum], "other bytes were committed"

    async def close(self) -> None:
        await self._channel.close()


async def run(advance: Callable[[int], None] = lambda count: None) -> Counter[str]:
    """Make all calls, a few at a time; return what came of them."""
    target = Target("calls", SHARE, make, lambda made: "")
    only, _, number = ONLY.partition(":")
    if ONLY and only != target.name:
        return Counter()
    numbers = [int(number)] if ONLY else list(range(max(1, COUNT * SHARE // 1000)))
    running = await start_store(CONFIG)
    caller = Caller(running)
    try:
        for first in range(0, len(numbers), AT_A_TIME):
            batch = numbers[first : first + AT_A_TIME]
            results = await asyncio.gather(
                *(caller.call(make(target.source(n))) for n in batch), return_exceptions=True
            )
            for n, result in zip(batch, results, strict=True):
                if isinstance(result, BaseException):
                    raise FuzzError(replay(target, n, result)) from result
                target.outcomes[result] += 1
            if first % (100 * AT_A_TIME) == 0:
                await caller.settle()
            advance(len(batch))
        await caller.settle()
    finally:
        await caller.close()
        await running.stop(0.5)
    return target.outcomes
