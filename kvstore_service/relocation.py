"""Moving blocks from tier to tier, because somebody said so."""

from collections.abc import Sequence

from kvstrata.kvstore_service.commit_rule import (
    ALL_STRATA,
    BASE,
    EXACT,
    BlockRejectedError,
    open_verified,
)
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tier import Tier, TierUnavailableError
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey


async def move(store: BlockStore, keys: Sequence[BlockKey], source: str, target: str) -> list[str]:
    """Copy each block into tier ``target``, then take it out of tier ``source``.

    A block is readable all the while. All its strata are those of one writing.

    Args:
        store: The tiers.
        keys: The blocks.
        source: Where to read and whence to remove; without it the nearest tier that has the block,
            and nothing is removed.
        target: Where to.

    Returns:
        Why each block was not moved; empty for one that was.
    """
    tiers = {tier.name: tier for tier in store.tiers}
    sources = [tiers[source]] if source else [t for t in store.tiers if t.name != target]
    return [await _move_one(store, key, sources, tiers[target], bool(source)) for key in keys]


async def _move_one(
    store: BlockStore, key: BlockKey, sources: Sequence[Tier], target: Tier, remove: bool
) -> str:
    try:
        for tier in sources:
            frames = _of_one_writing(key, await tier.examine(key, ALL_STRATA))
            if frames:
                store.evicted(target, await target.put(key, frames))
                break
        else:
            return "absent"
        if remove and store.pins.holds(key):
            return "pinned: copied, and kept where it was"
        if remove:
            await store.delete([key], sources[0].name, reason="moved")
    except TierUnavailableError as error:
        return f"tier_unavailable: {error.message}"
    except CapacityError as error:
        return f"no_room: {error.message}"
    return ""


def _of_one_writing(key: BlockKey, frames: dict[int, bytes]) -> dict[int, bytes]:
    """Return the strata that are whole and belong together; nothing if none can be read alone."""
    headers = {}
    for stratum, frame in frames.items():
        try:
            headers[stratum] = open_verified(key, stratum, frame)
        except BlockRejectedError:
            continue
    anchor = headers.get(EXACT) or headers.get(BASE)
    if anchor is None:
        return {}
    return {s: frames[s] for s, h in headers.items() if h.encoding_id == anchor.encoding_id}
