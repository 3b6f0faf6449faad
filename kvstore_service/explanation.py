"""Why a prompt hits or misses: what became of its blocks, and where else its tokens are stored."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from kvstrata.kvstore_service.commit_rule import ALL_STRATA
from kvstrata.kvstore_service.store import BlockStore, is_present
from kvstrata.kvstore_service.store_stats import block_listing
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import open_head
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockKey

MAX_SEARCHED = 16_384  # blocks of dram that are looked through for the same tokens
MAX_OTHERS = 32
_SLICE = 64


async def explain(
    store: BlockStore, keys: Sequence[BlockKey], token_ids: Sequence[int]
) -> pb.ExplainReply:
    """Return where each block is or what became of it. Reads only; counts no use.

    Args:
        store: Where to look.
        keys: Stored keys of a prompt's blocks, in its order.
        token_ids: Of the first block; those that are stored under other scopes are told.
    """
    found, degraded = await store.locate(keys)
    reply = pb.ExplainReply(
        run=next((i for i, p in enumerate(found) if not is_present(p)), len(keys)),
        remembers_since_unix_s=store.departures.since_unix_s,
        degraded=degraded,
    )
    for key, presence in zip(keys, found, strict=True):
        state = reply.blocks.add(listing=block_listing(store, key, presence))
        for departure in store.departures.of(key):
            state.departures.add(
                tier=departure.tier, reason=departure.reason, unix_s=departure.unix_s
            )
    if token_ids:
        own = keys[0].scope if keys else b""
        async for scope, header in _first_blocks(store, list(token_ids)):
            if scope != own and len(reply.others) < MAX_OTHERS:
                reply.others.add(scope=scope, header=header)
    return reply


async def _first_blocks(
    store: BlockStore, token_ids: list[int]
) -> AsyncIterator[tuple[bytes, FrameHeader]]:
    """Yield each scope, with a bare header, under which dram has these first tokens."""
    seen: set[bytes] = set()
    for count, key in enumerate(await store.dram.keys(MAX_SEARCHED)):
        if count % _SLICE == 0:
            await asyncio.sleep(0)
        if key.scope in seen:
            continue
        frames = await store.dram.examine(key, ALL_STRATA)
        try:
            header = open_head(next(iter(frames.values()), b""))[0]
        except CorruptFrameError:
            continue
        if not header.first_position and list(header.token_ids) == token_ids:
            seen.add(key.scope)
            for table in ("token_ids", "segments", "attachments"):
                header.ClearField(table)
            yield key.scope, header
