"""Checking everything that is stored: every checksum of every stratum in every tier."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

from kvstrata.kvstore_service.commit_rule import (
    ALL_STRATA,
    UNDECRYPTABLE,
    BlockRejectedError,
    open_verified,
)
from kvstrata.kvstore_service.counters import CORRUPT
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tier import Tier, TierUnavailableError
from kvstrata.kvstore_service.wire import key_message, stratum_enum
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos.identity import BlockKey, block_hash

REPORT_S = 0.5
_MAX_KEYS = 1 << 30
_MAX_DAMAGED = 1000  # told in one reply


async def verify(
    store: BlockStore,
    tier_name: str = "",
    keys: Sequence[BlockKey] = (),
    *,
    repair: bool = False,
) -> AsyncGenerator[pb.VerifyReply, None]:
    """Yield what was checked so far, at least every second, and at last ``done``.

    One stratum after another, from the least recently used block on, so that it takes no more of
    the tiers than one reader. What vanishes meanwhile is not counted.

    Args:
        store: What to check.
        tier_name: The only tier to check; all without it.
        keys: The only blocks to check; all without them.
        repair: Delete damaged strata, so that the next Put heals them.
    """
    found = pb.VerifyReply()
    told_s = time.monotonic()
    tiers = [tier for tier in store.tiers if tier_name in ("", tier.name)]
    wanted: list[tuple[Tier, list[BlockKey]]] = []
    for tier in tiers:
        try:
            held = list(keys) or await tier.keys(_MAX_KEYS)
        except TierUnavailableError:
            found.unavailable.append(tier.name)
            continue
        wanted.append((tier, held[::-1]))
        found.total_blocks += len(held)
    for tier, held in wanted:
        for key in held:
            try:
                await _verify_block(store, tier, key, found, repair=repair)
            except TierUnavailableError:
                found.unavailable.append(tier.name)
                break
            if time.monotonic() - told_s > REPORT_S or len(found.damaged) >= _MAX_DAMAGED:
                told_s = time.monotonic()
                yield found
                del found.damaged[:]
            await asyncio.sleep(0)
    found.done = True
    yield found


async def _verify_block(
    store: BlockStore, tier: Tier, key: BlockKey, found: pb.VerifyReply, *, repair: bool
) -> None:
    frames = await tier.examine(key, ALL_STRATA)
    for stratum, frame in frames.items():
        found.checked_strata += 1
        found.checked_bytes += len(frame)
        try:
            header = open_verified(key, stratum, frame)
            if block_hash(header.parent_hash, header.token_ids) != key.block_hash:
                raise BlockRejectedError("tokens", "the block hash is not that of the tokens")
        except BlockRejectedError as error:
            if error.kind == UNDECRYPTABLE:
                found.num_undecryptable += 1
                continue
            found.num_damaged += 1
            found.damaged.add(
                key=key_message(key),
                stratum=stratum_enum(stratum),
                tier=tier.name,
                what=error.message,
            )
            if repair:
                store.counters.add(CORRUPT, tier=tier.name)
                store.departures.note([key], tier.name, "corrupt")
                await tier.drop(key, stratum)
    found.checked_blocks += bool(frames)
