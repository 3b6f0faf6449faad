"""The last tier: blocks in a cloud's object store or a folder, shared by several processes.

``object_index`` accounts, ``object_listing`` keeps the index up to date, ``object_service`` sends
requests; this module orders them: changes of one block come one after another.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from kvstrata.kvstore_service.ancestry import Ancestry
from kvstrata.kvstore_service.block_changes import BlockChanges
from kvstrata.kvstore_service.object_index import ObjectIndex
from kvstrata.kvstore_service.object_listing import ObjectListing
from kvstrata.kvstore_service.object_name import ROOT, ObjectName
from kvstrata.kvstore_service.object_service import ObjectService, ReadFailedError
from kvstrata.kvstore_service.pin_table import Clock
from kvstrata.kvstore_service.promises import Promises
from kvstrata.kvstore_service.tier import OneByOne, StratumSizes, TierUnavailableError, TierUsage
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey

logger = logging.getLogger(__name__)

_MAX_READS = 4  # of a block that is replaced again and again


class ObjectTier(OneByOne):
    """Blocks in one bucket and prefix, or one folder; keeps ``Tier``. One event loop owns it.

    What ``put`` has returned from is as durable as the service makes it. The index is a cache of
    the listing: other processes' blocks are found by a listing every ``relist_s`` and, before that,
    by a request for a block that is asked for; their deletions are misses. So the bound holds for
    what this process knew at its last put or listing; what others wrote since, and a block's old
    object while it is replaced, come on top. The order of use and pins are this process's own;
    after a start, blocks count as last used when they were written.

    Args:
        service: The way to the objects; the tier closes it.
        capacity_bytes: The bound; give every process that shares the prefix the same.
        max_stratum_bytes: No larger stratum is written or read.
        relist_s: Pause between listings.
        absent_s: How long a block that was not found is not asked for again.
        max_probes: Unknown blocks that one ``contains`` asks the service for.
        find_s: How long ``contains`` waits for those answers.
        clock: Monotonic seconds, for pins and ``absent_s``.
    """

    name = "object"
    resident = False
    shared = True

    def __init__(
        self,
        service: ObjectService,
        *,
        capacity_bytes: int,
        max_stratum_bytes: int,
        relist_s: float = 300.0,
        absent_s: float = 5.0,
        max_probes: int = 32,
        find_s: float = 1.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self._service = service
        self._capacity_bytes = capacity_bytes
        self._max_stratum_bytes = max_stratum_bytes
        self._max_probes = max_probes
        self._find_s = find_s
        self._writer = secrets.token_hex(4)
        self._evictions = 0
        self._promises = Promises(lambda key: self._index.get(key) is not None, clock)
        self._index = ObjectIndex(capacity_bytes, absent_s, clock)
        self._listing = ObjectListing(
            service,
            self._index,
            max_stratum_bytes=max_stratum_bytes,
            relist_s=relist_s,
            evict=self._evict_surplus,
        )
        self._lister: asyncio.Task[None] | None = None
        self._changes = BlockChanges()

    async def open(self) -> Self:
        """Check that the service can be used, begin to list it, and return the tier.

        Raises:
            ConfigurationError: It does not answer, or does not let itself be written and listed.
        """
        try:
            await self._service.check()
        except BaseException:
            await self.close()
            raise
        self._lister = asyncio.create_task(self._listing.run())
        return self

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return the strata that are here, all of one writing; see ``Tier.get``.

        An unknown block is asked for, once in ``absent_s``.
        """
        return await self._find(key, strata, self._index.use)

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` would, unnoticed; see ``Tier.examine``."""
        return await self._find(key, strata, self._index.get)

    async def _find(
        self, key: BlockKey, strata: Sequence[int], place: Callable[[BlockKey], ObjectName | None]
    ) -> dict[int, bytes]:
        self._service.refuse_if_down()
        if not self._index.knows(key):
            await self._changes.to_its_end(self._look(key))
        for _ in range(_MAX_READS):
            found = place(key)
            if found is None:
                return {}
            frames = await self._read(found, strata)
            if frames is not None:
                return frames
        return {}

    async def _read(self, found: ObjectName, strata: Sequence[int]) -> dict[int, bytes] | None:
        """Return the strata of a writing; None if it is not what the index now says."""
        places = {s: place for s, place in found.places().items() if s in strata}
        if not places:
            return {}
        failure = ""
        parts: list[bytes] | None = None
        try:
            parts = await self._service.read(found.path, list(places.values()))
        except ReadFailedError as error:
            failure = str(error)
        frames = dict(zip(places, parts or (), strict=False))
        if parts is not None and all(len(frames[s]) == size for s, (_, size) in places.items()):
            return frames
        now = await self._changes.to_its_end(self._look(found.key, instead_of=found))
        if now == found and failure:
            raise self._service.mark_down(failure)
        return None

    async def _look(self, key: BlockKey, instead_of: ObjectName | None = None) -> ObjectName | None:
        """Ask the service for the block unless the index has learned of it; return the object."""
        async with self._changes.of(key):
            held = self._index.get(key)
            if held != instead_of or (instead_of is None and self._index.knows(key)):
                return held
            return await self._listing.find(key)

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """Replace the block; the service has it when this returns. See ``Tier.put``."""
        assert frames, "a block without strata"
        self._service.refuse_if_down()
        self._service.refuse_if_read_only()
        if max(map(len, frames.values())) > self._max_stratum_bytes:
            raise self._no_room(key, "the limit of one stratum")
        return await self._changes.to_its_end(self._put(key, dict(frames)))

    async def _put(self, key: BlockKey, frames: Mapping[int, bytes]) -> list[BlockKey]:
        async with self._changes.of(key):
            if not self._index.knows(key):
                await self._listing.find(key)
            victims = await self._write(key, frames, time.time_ns())
            return [victim.key for victim in victims]

    async def _write(
        self, key: BlockKey, frames: Mapping[int, bytes], number: int
    ) -> list[ObjectName]:
        """Write an object that supersedes the block's present one; return whom it evicted."""
        old = self._index.get(key)
        number = max(number, old.number + 1 if old else 0)
        new = ObjectName.of(key, number, self._writer, frames)
        victims = await self._choose_victims(key, new.num_bytes)
        for victim in victims:
            self._index.remove(victim.key)
        freed_bytes = sum(victim.num_bytes for victim in victims)
        with self._index.reserve(max(new.num_bytes, freed_bytes)):
            await self._service.remove([victim.path for victim in victims])
            self._evictions += len(victims)
            content = b"".join(frames[stratum] for stratum, _ in new.extents)
            await self._service.write(new.path, content)
            self._index.add(new)
        if old is not None:
            await self._remove_superseded(old)
        return victims

    async def _remove_superseded(self, old: ObjectName) -> None:
        """Remove what a reader no longer sees; the next listing does it if this cannot."""
        with contextlib.suppress(TierUnavailableError):
            await self._service.remove([old.path])

    async def _choose_victims(self, key: BlockKey, num_bytes: int) -> list[ObjectName]:
        """Return whom to evict for ``num_bytes`` of ``key``, once other changes leave the room."""
        victims = await self._index.victims_for(
            key, num_bytes, self._is_exempt, self._service.refuse_if_down
        )
        if victims is None:
            raise self._no_room(key, f"{self._capacity_bytes} bytes")
        return victims

    async def _evict_surplus(self) -> None:
        """Give up what a listing found beyond the bound."""
        if self._service.read_only:
            return
        surplus, _ = self._index.surplus(self._is_exempt)
        for victim in surplus:
            self._index.remove(victim.key)
        with self._index.reserve(0):
            await self._service.remove([victim.path for victim in surplus])
        self._evictions += len(surplus)

    def _is_exempt(self, key: BlockKey) -> bool:
        return self._changes.touch(key) or self._promises.hold(key)

    def _no_room(self, key: BlockKey, limit: str) -> CapacityError:
        return CapacityError(
            f"tier object has no room for block {key.encode()} within {limit}",
            "raise the store's --object, or unpin blocks",
            tier=self.name,
            block_key=key.encode(),
        )

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """Return strata and sizes, from the index; see ``Tier.contains``.

        The first ``max_probes`` blocks that the index does not know are asked for, and count as
        absent if the answer takes longer than ``find_s``; further unknown ones count as absent.
        """
        self._service.refuse_if_down()
        found = [self._index.get(key) for key in keys]
        missing = [key for key, name in zip(keys, found, strict=True) if name is None]
        unknown = [key for key in missing if not self._index.knows(key)]
        if unknown:
            asked = list(dict.fromkeys(unknown))[: self._max_probes]
            looks = [self._changes.start(self._look(key)) for key in asked]
            await asyncio.wait(looks, timeout=self._find_s)
            self._service.refuse_if_down()
            found = [self._index.get(key) for key in keys]
        return [None if name is None else name.sizes for name in found]

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Forget blocks, every writing of them, at a request or two each. See ``Tier.delete``."""
        self._service.refuse_if_down()
        self._promises.forget(keys)
        deletions = [self._changes.start(self._delete(key)) for key in dict.fromkeys(keys)]
        return sum(await asyncio.gather(*map(asyncio.shield, deletions)))

    async def _delete(self, key: BlockKey) -> bool:
        async with self._changes.of(key):
            paths = await self._listing.writings(key)
            await self._service.remove(paths)
            was_here = self._index.get(key) is not None or bool(paths)
            self._index.note_absent(key)
            return was_here

    async def drop(self, key: BlockKey, stratum: int) -> None:
        """Forget one stratum, by writing the others anew; see ``Tier.drop``.

        A newer writing of another process stays what it is.
        """
        self._service.refuse_if_down()
        await self._changes.to_its_end(self._drop(key, stratum))

    async def _drop(self, key: BlockKey, stratum: int) -> None:
        async with self._changes.of(key):
            old = self._index.get(key)
            if old is None or stratum not in old.sizes:
                return
            places = {s: place for s, place in old.places().items() if s != stratum}
            kept: dict[int, bytes] = {}
            if places:
                with contextlib.suppress(ReadFailedError):
                    parts = await self._service.read(old.path, list(places.values()))
                    kept = dict(zip(places, parts or (), strict=False))
            kept = {s: frame for s, frame in kept.items() if len(frame) == places[s][1]}
            if kept:
                await self._write(key, kept, old.number + 1)
                return
            await self._service.remove([old.path])
            self._index.note_absent(key)

    async def keys(self, limit: int) -> list[BlockKey]:
        """Return keys, most recently used first; see ``Tier.keys``."""
        self._service.refuse_if_down()
        return self._index.keys(limit)

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks from eviction by this process; see ``Tier.pin``."""
        self._service.refuse_if_down()
        return self._promises.pin(keys, ttl_s)

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins; see ``Tier.unpin``."""
        self._promises.unpin(keys)

    async def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks until then or the process's end; see ``Tier.lease``."""
        self._service.refuse_if_down()
        return self._promises.lease(keys, ttl_s)

    async def usage(self) -> TierUsage:
        """Return what is known to be held; the detail also says that a listing runs."""
        detail = self._service.detail
        if not detail and self._service.read_only:
            detail = f"read-only: {self._service.read_only}"
        healthy = not detail
        if healthy and self._listing.num_listed is not None:
            detail = f"listing, {self._listing.num_listed} blocks so far"
        held_bytes = self._index.num_bytes
        return TierUsage(
            *(len(self._index), held_bytes, self._capacity_bytes, self._evictions),
            *(healthy, detail),
        )

    async def check_integrity(self) -> None:
        """Compare the index with the bucket, while nobody changes it; see ``Tier``."""
        content: dict[str, int] = {}
        async for page in self._service.list(ROOT):
            content |= {item["path"]: item["size"] for item in page}
        objects = self._index.held()
        named = {found.path: found.num_bytes for found in objects}
        ours = {path: size for path, size in content.items() if ObjectName.parse(path)}
        assert named == ours, f"object tier accounts {named}, holds {ours}"
        held = sum(named.values())
        assert held == self._index.num_bytes, f"object tier accounts {self._index.num_bytes} bytes"
        assert held <= self._capacity_bytes, f"object tier holds {held} of {self._capacity_bytes}"

    async def close(self) -> None:
        """Wait for changes that are under way, each within its limit. Idempotent."""
        if self._lister is not None:
            self._lister.cancel()
            await asyncio.gather(self._lister, return_exceptions=True)
        await self._changes.wait()
        await self._service.close()
