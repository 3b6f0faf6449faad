"""The Admin service: looking inside a store."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from kvstrata.kvstore_service.commit_rule import ALL_STRATA
from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.counters import HITS
from kvstrata.kvstore_service.listing import Listing
from kvstrata.kvstore_service.lower_reader import Piece
from kvstrata.kvstore_service.request_check import parse_key, parse_keys
from kvstrata.kvstore_service.store import BlockStore, Presence
from kvstrata.kvstore_service.tier import TierUsage
from kvstrata.kvstore_service.wire import key_message, size_messages
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos.admin_pb2_grpc import AdminServicer
from kvstrata.protos.errors import BlockNotFoundError, InvalidRequestError, LimitError
from kvstrata.protos.frame import open_head
from kvstrata.protos.identity import HASH_BYTES, BlockKey

_DEFAULT_PAGE_SIZE = 100
_EVICT_BATCH = 512
_MAX_EVICTED = 1 << 30


class AdminService(AdminServicer):
    """Serves an operator; every guarantee is in ``admin.proto``.

    Args:
        store: What to look into.
        workload: What runs.
        limits: What one request may ask for.
        on_drain: Called when draining starts, to tell the health service.
    """

    def __init__(
        self,
        store: BlockStore,
        workload: Workload,
        limits: StoreLimits,
        on_drain: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._workload = workload
        self._limits = limits
        self._on_drain = on_drain
        self._listing = Listing(store)
        self._started = time.monotonic()

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:  # noqa: N802
        """Tell bytes, blocks and counters."""
        usages = [(tier.name, await tier.usage()) for tier in self._store.tiers]
        pinned_blocks, pinned_bytes = self._store.pins.usage()
        return pb.StatsReply(
            tiers=[self._tier_stats(name, usage) for name, usage in usages],
            counters=self._store.counters.messages(),
            pinned_blocks=pinned_blocks,
            pinned_bytes=pinned_bytes,
            in_flight_puts=self._workload.in_flight_puts,
            uptime_s=time.monotonic() - self._started,
            health=self._health(usages),
        )

    def _tier_stats(self, name: str, usage: TierUsage) -> pb.TierStats:
        return pb.TierStats(
            tier=name,
            healthy=usage.healthy,
            detail=usage.detail,
            blocks=usage.blocks,
            bytes=usage.num_bytes,
            capacity_bytes=usage.capacity_bytes,
            hits=self._store.counters.get(HITS, tier=name),
            evictions=usage.evictions,
        )

    def _health(self, usages: list[tuple[str, TierUsage]]) -> str:
        if self._workload.is_draining:
            return "draining"
        down = [f"{name}: {usage.detail}" for name, usage in usages if not usage.healthy]
        return f"degraded: {'; '.join(down)}" if down else "ok"

    async def ListBlocks(  # noqa: N802
        self, request: pb.ListBlocksRequest, context: Any
    ) -> pb.ListBlocksReply:
        """List committed blocks, most recently used first, a page at a time."""
        if request.page_size > self._limits.max_page_size:
            raise LimitError(
                f"page_size {request.page_size} exceeds the limit of {self._limits.max_page_size}",
                "ask for smaller pages",
            )
        if len(request.scope) not in (0, HASH_BYTES):
            raise InvalidRequestError(f"scope must be {HASH_BYTES} bytes, got {len(request.scope)}")
        page, token = await self._listing.page(
            request.page_size or _DEFAULT_PAGE_SIZE, request.page_token, request.scope
        )
        blocks = [self._block_listing(key, presence) for key, presence in page]
        return pb.ListBlocksReply(blocks=blocks, next_page_token=token)

    def _block_listing(self, key: BlockKey, presence: Presence) -> pb.BlockListing:
        sizes = {stratum: size for _, held in reversed(presence) for stratum, size in held.items()}
        return pb.BlockListing(
            key=key_message(key),
            strata=size_messages(dict(sorted(sizes.items()))),
            tiers=[name for name, _ in presence],
            pinned=self._store.pins.holds(key),
        )

    async def Inspect(  # noqa: N802
        self, request: pb.InspectRequest, context: Any
    ) -> pb.InspectReply:
        """Tell everything about one block except its values."""
        key = parse_key(request.key)
        found, _ = await self._store.locate([key])
        if not found[0]:
            raise BlockNotFoundError(
                f"no tier holds block {key.encode()}", "list the blocks to see which exist"
            )
        read = await self._store.get(key, ALL_STRATA)
        pieces = [read[s] for s in ALL_STRATA]
        headers = [open_head(piece.frame)[0] for piece in pieces if isinstance(piece, Piece)]
        return pb.InspectReply(block=self._block_listing(key, found[0]), headers=headers)

    async def Evict(self, request: pb.EvictRequest, context: Any) -> pb.EvictReply:  # noqa: N802
        """Remove blocks that are not pinned from one tier or from all."""
        known = [tier.name for tier in self._store.tiers]
        if request.tier and request.tier not in known:
            raise InvalidRequestError(
                f"no tier {request.tier[:32]!r}", f"name one of {', '.join(known)}, or none for all"
            )
        keys = parse_keys(request.keys, self._limits.max_hashes)
        if not keys:
            keys = await self._listing.all_keys(request.tier)
        loose = [key for key in keys if not self._store.pins.holds(key)]
        evicted = 0
        for first in range(0, len(loose), _EVICT_BATCH):
            evicted += await self._store.delete(loose[first : first + _EVICT_BATCH], request.tier)
        return pb.EvictReply(evicted=evicted, skipped_pinned=len(keys) - len(loose))

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:  # noqa: N802
        """Stop taking new work and wait for what runs."""
        await self._on_drain()
        drained = await self._workload.drain(request.timeout_ms / 1000)
        return pb.DrainReply(drained=drained, in_flight=self._workload.in_flight)
