"""The Admin service: looking inside a store, and acting on what is there."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from kvstrata.kvstore_service.commit_rule import ALL_STRATA, BASE, BlockRejectedError, open_verified
from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.departures import ADMIN
from kvstrata.kvstore_service.explanation import explain
from kvstrata.kvstore_service.listing import Listing
from kvstrata.kvstore_service.namespace import Namespace
from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.quota_admin import answer_quota
from kvstrata.kvstore_service.relocation import move
from kvstrata.kvstore_service.request_check import parse_hashes, parse_key, parse_keys
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.store_stats import StoreStats, block_listing
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.kvstore_service.verification import verify
from kvstrata.kvstore_service.wire import key_message
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos import kvstore_pb2
from kvstrata.protos.admin_pb2_grpc import AdminServicer
from kvstrata.protos.block_tokens import read_layer_tokens
from kvstrata.protos.errors import (
    BlockNotFoundError,
    CorruptFrameError,
    InvalidRequestError,
    LimitError,
    NotFoundError,
)
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS, HASH_BYTES, BlockKey
from kvstrata.protos.service import metadata_of

_DEFAULT_PAGE_SIZE = 100
_BATCH = 512


class AdminService(AdminServicer):
    """Serves an operator; every guarantee is in ``admin.proto``.

    Args:
        store: What to look into.
        workload: What runs.
        limits: What one request may ask for.
        tenants: Who there is.
        quotas: What each uses.
        stats: What ``Stats`` tells.
        on_drain: Called when draining starts, to tell the health service.
    """

    def __init__(
        self,
        store: BlockStore,
        workload: Workload,
        limits: StoreLimits,
        tenants: Tenants,
        quotas: Quotas,
        stats: StoreStats,
        on_drain: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._workload = workload
        self._limits = limits
        self._tenants = tenants
        self._quotas = quotas
        self._stats = stats
        self._on_drain = on_drain
        self._listing = Listing(store)

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsReply:  # noqa: N802
        """Tell bytes, blocks and counters."""
        return await self._stats.tell()

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
        blocks = [block_listing(self._store, key, presence) for key, presence in page]
        return pb.ListBlocksReply(blocks=blocks, next_page_token=token)

    async def Inspect(  # noqa: N802
        self, request: pb.InspectRequest, context: Any
    ) -> pb.InspectReply:
        """Tell everything about one block except its values."""
        key = parse_key(request.key)
        found, _ = await self._store.locate([key])
        frames = await self._examine(key)
        if not found[0] or not frames:
            raise BlockNotFoundError(
                f"no tier holds block {key.encode()}", "list the blocks to see which exist"
            )
        reply = pb.InspectReply(
            block=block_listing(self._store, key, found[0]),
            headers=[frames[s].header for s in sorted(frames)],
        )
        if request.tokens:
            _add_tokens(reply, frames.get(BASE))
        return reply

    async def _examine(self, key: BlockKey) -> dict[int, Frame]:
        """Return the nearest whole frame of each stratum."""
        frames: dict[int, Frame] = {}
        for tier in self._store.tiers:
            with contextlib.suppress(TierUnavailableError):
                missing = [stratum for stratum in ALL_STRATA if stratum not in frames]
                for stratum, frame in (await tier.examine(key, missing)).items():
                    with contextlib.suppress(BlockRejectedError):
                        open_verified(key, stratum, frame)
                        frames[stratum] = Frame.open(frame)
        return frames

    async def Evict(self, request: pb.EvictRequest, context: Any) -> pb.EvictReply:  # noqa: N802
        """Remove blocks that are not pinned from one tier or from all."""
        self._check_tier(request.tier)
        keys = parse_keys(request.keys, self._limits.max_hashes)
        if not keys:
            keys = await self._listing.all_keys(request.tier)
        loose = [key for key in keys if not self._store.pins.holds(key)]
        evicted = 0
        for batch in _batches(loose):
            evicted += await self._store.delete(batch, request.tier, reason=ADMIN)
        return pb.EvictReply(evicted=evicted, skipped_pinned=len(keys) - len(loose))

    def _check_tier(self, name: str, *, required: bool = False) -> None:
        known = [tier.name for tier in self._store.tiers]
        if name not in known and (name or required):
            raise InvalidRequestError(
                f"no tier {name[:32]!r}",
                f"name one of {', '.join(known)}" + ("" if required else ", or none for all"),
            )

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:  # noqa: N802
        """Stop taking new work and wait for what runs."""
        await self._on_drain()
        drained = await self._workload.drain(request.timeout_ms / 1000)
        return pb.DrainReply(drained=drained, in_flight=self._workload.in_flight)

    async def Explain(  # noqa: N802
        self, request: pb.ExplainRequest, context: Any
    ) -> pb.ExplainReply:
        """Tell what became of the blocks of a prompt."""
        if request.HasField("prompt"):
            raise InvalidRequestError(
                "a store knows no prompts", "ask a gateway, or name scope and block hashes"
            )
        if len(request.token_ids) not in (0, BLOCK_TOKENS):
            raise InvalidRequestError(
                f"{len(request.token_ids)} token ids are no first block",
                f"send {BLOCK_TOKENS}, or none",
            )
        keys = parse_hashes(request.scope, request.block_hashes, self._limits.max_hashes)
        stored = self._namespace(request, context).keys(keys)
        return await explain(self._store, stored, request.token_ids)

    def _namespace(self, request: pb.ExplainRequest, context: Any) -> Namespace:
        if request.own_keys:
            return self._tenants.identify(metadata_of(context)).namespace
        return self._tenants.named(request.tenant).namespace if request.tenant else Namespace()

    async def Pin(  # noqa: N802
        self, request: kvstore_pb2.PinRequest, context: Any
    ) -> kvstore_pb2.PinReply:
        """Exempt blocks from eviction for a while."""
        keys = parse_keys(request.keys, self._limits.max_hashes)
        ttl_ms = min(request.ttl_ms, self._limits.max_pin_ttl_ms)
        if not ttl_ms:
            raise InvalidRequestError("ttl_ms must be positive", "say for how long to pin")
        missing = await self._store.pin(keys, ttl_ms / 1000)
        return kvstore_pb2.PinReply(missing=map(key_message, missing))

    async def Unpin(  # noqa: N802
        self, request: kvstore_pb2.UnpinRequest, context: Any
    ) -> kvstore_pb2.UnpinReply:
        """End pins early."""
        await self._store.unpin(parse_keys(request.keys, self._limits.max_hashes))
        return kvstore_pb2.UnpinReply()

    async def Move(self, request: pb.MoveRequest, context: Any) -> pb.MoveReply:  # noqa: N802
        """Copy blocks into one tier, and take them out of another."""
        self._check_tier(request.source)
        self._check_tier(request.target, required=True)
        if request.source == request.target:
            raise InvalidRequestError(
                f"the blocks are in {request.target} already", "name another tier"
            )
        keys = parse_keys(request.keys, self._limits.max_hashes)
        reply = pb.MoveReply()
        for key, problem in zip(
            keys, await move(self._store, keys, request.source, request.target), strict=True
        ):
            if problem:
                reply.problems.add(key=key_message(key), reason=problem)
            else:
                reply.moved += 1
        return reply

    async def Verify(  # noqa: N802
        self, request: pb.VerifyRequest, context: Any
    ) -> AsyncIterator[pb.VerifyReply]:
        """Check every checksum, and tell how far it is."""
        self._check_tier(request.tier)
        keys = parse_keys(request.keys, self._limits.max_hashes)
        checking = verify(self._store, request.tier, keys, repair=request.repair)
        async with contextlib.aclosing(checking):
            async for reply in checking:
                yield reply

    async def Quota(self, request: pb.QuotaRequest, context: Any) -> pb.QuotaReply:  # noqa: N802
        """Set limits of a tenant, and tell everybody's."""
        return answer_quota(request, self._tenants, self._quotas)


def _batches(keys: Sequence[BlockKey]) -> list[Sequence[BlockKey]]:
    return [keys[first : first + _BATCH] for first in range(0, len(keys), _BATCH)]


def _add_tokens(reply: pb.InspectReply, base: Frame | None) -> None:
    """Add how each layer keeps its tokens, or why that is not known."""
    if base is None:
        reply.tokens_unknown = "the block has no BASE stratum"
        return
    try:
        for layer, segment in base.segments().items():
            tokens = read_layer_tokens(base.header, segment)
            reply.layers.add(
                layer=layer,
                saliency=tokens.saliency,
                escape=tokens.escape,
                mid=tokens.mid,
                dropped=tokens.dropped,
            )
    except (NotFoundError, CorruptFrameError) as error:
        del reply.layers[:]
        reply.tokens_unknown = error.message
