"""What a storage tier promises: the contract that the test suite holds every tier to.

A tier keeps blocks: for each key a few strata, each the bytes of one frame. It looks no further
inside than the header, for the block before.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstrata.kvstore_service.ancestry import Ancestry
from kvstrata.protos.errors import UnavailableError
from kvstrata.protos.identity import BlockKey

StratumSizes = dict[int, int]
Wanted = Sequence[tuple[BlockKey, Sequence[int]]]
"""Blocks, each with the strata that are wanted of it."""
SEALED_MAGIC = b"KVSEALED"
"""How a value begins that is encrypted at rest, see ``seal.py``; no frame begins so."""
SEAL_BYTES = 64
"""What encryption adds to a value."""


class TierUnavailableError(UnavailableError):
    """A tier that does not answer at present; its blocks are misses until it does."""


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier holds, and how it feels.

    Attributes:
        blocks: Blocks held.
        num_bytes: Bytes of their frames; never more than ``capacity_bytes``.
        capacity_bytes: The bound.
        evictions: Blocks this process evicted since its start.
        healthy: Whether the tier answers.
        detail: Why it does not; empty when it does.
    """

    blocks: int
    num_bytes: int
    capacity_bytes: int
    evictions: int
    healthy: bool = True
    detail: str = ""


class Tier(Protocol):
    """A bounded place for blocks, pinned and leased blocks exempt from eviction.

    Among blocks that were used equally often, are of equal size and of which none comes before
    another in a prompt, the least recently used goes first. What else counts, a tier says itself.
    To make room it may also shed FINE and MID of other blocks, never BASE and EXACT.

    Every method but ``usage`` and ``close`` may raise ``TierUnavailableError``; it then did nothing
    that a reader could see, or nothing but losing blocks.
    """

    name: str
    resident: bool
    """Whether bytes cannot change unseen: process memory. Others are verified at each read."""
    shared: bool
    """Whether other store processes read and write the same blocks."""

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return those of ``strata`` that are here and count it as a use of the block.

        Any subset may be missing, at any time, and that is no error.
        """
        ...

    async def get_all(self, wanted: Wanted) -> list[dict[int, bytes]]:
        """Return what ``get`` would of each, in as few round trips as the tier can."""
        ...

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` would, without counting it as a use: for whoever looks at everything.

        A read that waits is no more urgent than any other.
        """
        ...

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """Replace the block by ``frames``, all at once: a reader sees all of them or none.

        Idempotent. Evicts as many other blocks as needed and returns those. Where the block stands
        in its prompt the frames say, or ``standing`` if they are sealed.

        Raises:
            CapacityError: Larger than the tier, or than pinned blocks leave of it; nothing changed.
        """
        ...

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """Return each block's strata and sizes, None for an absent one, in one round trip.

        Reads only: no block becomes more recently used.
        """
        ...

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Forget the blocks, pinned or not, and return how many were here. Idempotent."""
        ...

    async def drop(self, key: BlockKey, stratum: int) -> None:
        """Forget one stratum of a block. Idempotent."""
        ...

    async def keys(self, limit: int) -> list[BlockKey]:
        """Return at most ``limit`` keys, most recently used first."""
        ...

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt the blocks from eviction for ``ttl_s`` from now; never shortens a pin.

        Returns the blocks that are not here, or about to go; nothing is promised of them.
        """
        ...

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins early. Idempotent."""
        ...

    async def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt the blocks from eviction and shedding for ``ttl_s``, as pins do, but to the end.

        Returns the blocks that are not here, or about to go; nothing is promised of them.
        """
        ...

    async def usage(self) -> TierUsage:
        """Return what the tier holds; never raises, an unreachable tier says so."""
        ...

    async def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless the accounting is true and within the capacity."""
        ...

    async def close(self) -> None:
        """Release connections and tasks. Idempotent."""
        ...


class OneByOne:
    """What a tier inherits that reads each block by itself, several at a time."""

    async def get_all(self: Tier, wanted: Wanted) -> list[dict[int, bytes]]:
        """See ``Tier.get_all``."""
        if len(wanted) == 1:
            return [await self.get(*wanted[0])]
        return list(await asyncio.gather(*(self.get(key, strata) for key, strata in wanted)))
