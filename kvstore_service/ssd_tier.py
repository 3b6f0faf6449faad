"""The tier on a local disk: blocks in files that outlive the process.

``ssd_index`` accounts, ``ssd_folder`` does the input and output in threads, this module orders it:
changes of one block come one after another, reads wait for nothing.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self

from kvstrata.kvstore_service.ancestry import Ancestry
from kvstrata.kvstore_service.block_changes import BlockChanges
from kvstrata.kvstore_service.pin_table import Clock
from kvstrata.kvstore_service.promises import Promises
from kvstrata.kvstore_service.ssd_file import SsdFile
from kvstrata.kvstore_service.ssd_folder import DiskFullError, SsdFolder
from kvstrata.kvstore_service.ssd_index import SsdIndex
from kvstrata.kvstore_service.ssd_trouble import Trouble
from kvstrata.kvstore_service.ssd_worker import SsdWorker
from kvstrata.kvstore_service.tier import OneByOne, StratumSizes, TierUsage
from kvstrata.protos.errors import CapacityError, ConfigurationError
from kvstrata.protos.identity import BlockKey

logger = logging.getLogger(__name__)

_MAX_READS = 4  # of a block that is replaced again and again


class SsdTier(OneByOne):
    """Blocks in one folder of a local file system, which no other process uses; keeps ``Tier``.

    What ``put`` and ``delete`` have returned from is on disk, whatever happens to the process. One
    event loop owns the tier. Bytes are those that files take; the 257 folders (at least 1 MiB, and
    about 150 bytes more a block) come on top, and while a block is replaced, its old file.

    A full disk refuses puts, any other failure refuses everything, until a probe, one every
    ``probe_s``, finds it gone; the folder is then read anew. A file that was cut is read as it is:
    the reader's verification refuses it.

    Args:
        path: The folder: empty, absent, or one that a store has made.
        capacity_bytes: The bound.
        max_stratum_bytes: No larger stratum is written or read.
        allocation_bytes: What the file system rounds sizes up to.
        fsync: Whether blocks survive the loss of power too.
        num_threads: Reads, and as many changes again, that run at a time.
        touch_s: How old the recorded time of a block's last use may be; the order of use is as
            exact after a restart.
        probe_s: Pause between probes.
        timeout_s: A disk that takes longer counts as failed.
        clock: Monotonic seconds, for pins and ``touch_s``.
    """

    name = "ssd"
    resident = False
    shared = False

    def __init__(
        self,
        path: str,
        *,
        capacity_bytes: int,
        max_stratum_bytes: int,
        allocation_bytes: int = 4096,
        fsync: bool = True,
        num_threads: int = 4,
        touch_s: float = 300.0,
        probe_s: float = 1.0,
        timeout_s: float = 30.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self.mended: Counter[str] = Counter()
        self._folder = SsdFolder(path, fsync=fsync, max_stratum_bytes=max_stratum_bytes)
        self._max_stratum_bytes = max_stratum_bytes
        self._capacity_bytes = capacity_bytes
        self._allocation_bytes = allocation_bytes
        self._touch_s = touch_s
        self._clock = clock
        self._promises = Promises(lambda key: self._index.get(key) is not None, clock)
        self._index = SsdIndex(capacity_bytes, allocation_bytes)
        self._evictions = 0
        self._next_number = 0
        self._changes = BlockChanges()
        self._worker = SsdWorker(
            self._folder.path,
            num_threads=num_threads,
            timeout_s=timeout_s,
            probe_s=probe_s,
            probe=self._probe,
        )

    async def open(self) -> Self:
        """Claim the folder, find its blocks, evict down to the capacity, and return the tier.

        Raises:
            FolderInUseError: Another process has the folder.
            ConfigurationError: The folder cannot be used, or is not the tier's.
        """
        try:
            trouble = await self._load(create=True)
        except OSError as error:
            await self.close()
            failure = Trouble.failed(self._folder.path, error)
            raise ConfigurationError(
                f"ssd folder {self._folder.path} cannot be used: {failure.detail}", failure.remedy
            ) from error
        except BaseException:
            await self.close()
            raise
        self._worker.trouble = None
        if trouble is not None:
            self._worker.note(trouble)
        return self

    async def _load(self, *, create: bool) -> Trouble | None:
        """Make the index say what the folder holds; return what is wrong with the disk."""
        run = self._worker.start
        await run(partial(self._folder.claim, create=create))
        files, mended = await run(self._folder.recover)
        index = SsdIndex(self._capacity_bytes, self._allocation_bytes, files)
        excess, fits = index.surplus(self._is_exempt)
        excess = excess if fits else []
        for file in excess:
            index.remove(file.key)
        await run(partial(self._folder.remove, excess))
        self._index = index
        self._next_number = max([self._next_number, *(file.number + 1 for file in files)])
        self._evictions += len(excess)
        self.mended += mended
        told = {"path": str(self._folder.path), "blocks": len(index), "bytes": index.num_bytes}
        told |= {"evicted": len(excess), "mended": dict(mended)}
        logger.info("ssd folder is loaded", extra=told)
        try:
            await run(self._folder.probe)
        except DiskFullError:
            return Trouble.full(self._folder.path, 0)
        return None

    async def _probe(self, trouble: Trouble) -> Trouble | None:
        """Return what is wrong with the disk, given what was."""
        if trouble.is_full:
            try:
                await self._worker.start(partial(self._folder.probe, trouble.needed_bytes))
            except DiskFullError:
                return trouble
            return None
        if self._changes or not self._worker.is_idle:
            return trouble
        return await self._load(create=False)

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return the strata that are here, all of one writing; see ``Tier.get``."""
        frames = await self._read(key, strata, self._index.use)
        file = self._index.get(key)
        if frames and file is not None:
            self._touch(file)
        return frames

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """Return what ``get`` would, unnoticed; see ``Tier.examine``."""
        return await self._read(key, strata, self._index.get)

    async def _read(
        self, key: BlockKey, strata: Sequence[int], find: Callable[[BlockKey], SsdFile | None]
    ) -> dict[int, bytes]:
        self._worker.refuse_if_down()
        for _ in range(_MAX_READS):
            file = find(key)
            if file is None:
                return {}
            frames = await self._worker.read(partial(self._folder.read, file, strata))
            if frames is None or _is_cut(file, frames):
                frames = await self._look_again(file, frames)
            if frames is not None:
                return frames
        return {}

    def _touch(self, file: SsdFile) -> None:
        """Let the order of use outlive the process, once in a while."""
        is_well = self._worker.trouble is None
        if is_well and self._index.is_touch_due(file.key, self._clock(), self._touch_s):
            self._worker.start(partial(self._folder.touch, file))

    async def _look_again(
        self, file: SsdFile, frames: dict[int, bytes] | None
    ) -> dict[int, bytes] | None:
        """Return what is left of a damaged file; None if it is not, but was moved by us."""
        async with self._changes.of(file.key):
            if self._index.get(file.key) is not file:
                return None
            if frames is None:
                await self._worker.read(self._folder.check_held)
                self._index.remove(file.key)
                logger.warning("ssd block is gone", extra={"block_key": file.key.encode()})
            return frames or {}

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """Replace the block; it is on disk when this returns. See ``Tier.put``.

        Raises:
            CapacityError: As for every tier, and when the disk is full; the old block stays.
        """
        assert frames, "a block without strata"
        if max(map(len, frames.values())) > self._max_stratum_bytes:
            raise self._no_room(key, "the limit of one stratum")
        return await self._changes.to_its_end(self._put(key, frames))

    async def _put(self, key: BlockKey, frames: Mapping[int, bytes]) -> list[BlockKey]:
        async with self._changes.of(key):
            file = SsdFile.of(key, self._next_number, frames)
            self._next_number += 1
            num_bytes = self._index.allocated(file)
            victims = await self._choose_victims(key, num_bytes)
            freed_bytes = sum(self._index.allocated(victim) for victim in victims)
            for victim in victims:
                self._index.remove(victim.key)
            self._evictions += len(victims)
            with self._index.reserve(max(num_bytes, freed_bytes)):
                try:
                    write = partial(self._folder.write, file, frames, victims)
                    await self._worker.change(write)
                except DiskFullError:
                    raise self._worker.note(Trouble.full(self._folder.path, num_bytes)) from None
                old = self._index.get(key)
                self._index.add(file, self._clock())
            if old is not None:
                await self._unlink([old])
            return [victim.key for victim in victims]

    async def _choose_victims(self, key: BlockKey, num_bytes: int) -> list[SsdFile]:
        """Return whom to evict for ``num_bytes`` of ``key``, once other changes leave the room."""
        victims = await self._index.victims_for(
            key, num_bytes, self._is_exempt, self._refuse_if_in_trouble
        )
        if victims is None:
            raise self._no_room(key, f"{self._capacity_bytes} bytes")
        return victims

    def _refuse_if_in_trouble(self) -> None:
        if self._worker.trouble is not None:
            raise self._worker.trouble.error()

    def _is_exempt(self, key: BlockKey) -> bool:
        return self._changes.touch(key) or self._promises.hold(key)

    def _no_room(self, key: BlockKey, limit: str) -> CapacityError:
        return CapacityError(
            f"tier ssd has no room for block {key.encode()} within {limit}",
            "raise the store's --ssd, or unpin blocks",
            tier=self.name,
            block_key=key.encode(),
        )

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """Return strata and sizes, without a look at the disk; see ``Tier.contains``."""
        self._worker.refuse_if_down()
        files = map(self._index.get, keys)
        return [None if file is None else file.sizes for file in files]

    async def delete(self, keys: Sequence[BlockKey]) -> int:
        """Forget blocks; they stay away when this has returned. See ``Tier.delete``."""
        self._worker.refuse_if_down()
        self._promises.forget(keys)
        return await self._changes.to_its_end(self._delete(keys))

    async def _delete(self, keys: Sequence[BlockKey]) -> int:
        wanted = dict.fromkeys(keys)
        idle = [key for key in wanted if not self._changes.touch(key)]
        busy = [key for key in wanted if self._changes.touch(key)]
        deleted = await self._forget(idle)
        for key in busy:
            async with self._changes.of(key):
                deleted += await self._forget([key])
        return deleted

    async def _forget(self, keys: Sequence[BlockKey]) -> int:
        files = [file for key in keys if (file := self._index.remove(key)) is not None]
        await self._unlink(files, durably=True)
        return len(files)

    async def _unlink(self, files: Sequence[SsdFile], *, durably: bool = False) -> None:
        if files:
            with self._index.reserve(sum(map(self._index.allocated, files))):
                remove = partial(self._folder.remove, files, durably=durably)
                await self._worker.change(remove)

    async def drop(self, key: BlockKey, stratum: int) -> None:
        """Forget one stratum; its bytes stay taken if others follow it. See ``Tier.drop``."""
        self._worker.refuse_if_down()
        await self._changes.to_its_end(self._drop(key, stratum))

    async def _drop(self, key: BlockKey, stratum: int) -> None:
        async with self._changes.of(key):
            file = self._index.get(key)
            if file is None or stratum not in file.sizes:
                return
            smaller = file.without(stratum)
            if smaller is None:
                await self._forget([key])
                return
            with self._index.reserve(0):
                await self._worker.change(partial(self._folder.shrink, file, smaller))
                self._index.replace(smaller)

    async def keys(self, limit: int) -> list[BlockKey]:
        """Return keys, most recently used first; see ``Tier.keys``."""
        self._worker.refuse_if_down()
        return self._index.keys(limit)

    async def pin(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks from eviction until then or the process's end; see ``Tier.pin``."""
        self._worker.refuse_if_down()
        return self._promises.pin(keys, ttl_s)

    async def unpin(self, keys: Sequence[BlockKey]) -> None:
        """End pins; see ``Tier.unpin``."""
        self._promises.unpin(keys)

    async def lease(self, keys: Sequence[BlockKey], ttl_s: float) -> list[BlockKey]:
        """Exempt blocks until then or the process's end; see ``Tier.lease``."""
        self._worker.refuse_if_down()
        return self._promises.lease(keys, ttl_s)

    async def usage(self) -> TierUsage:
        """Return what files take on disk, and what is wrong with it; see ``Tier.usage``."""
        trouble = self._worker.trouble
        detail = trouble.detail if trouble else ""
        return TierUsage(
            len(self._index),
            self._index.num_bytes,
            self._capacity_bytes,
            self._evictions,
            not detail,
            detail,
        )

    async def check_integrity(self) -> None:
        """Compare the accounting with the folder, while nothing changes it; see ``Tier``."""
        self._worker.refuse_if_down()
        content = await self._worker.read(self._folder.content)
        files = self._index.held()
        named = {file.path: file.num_bytes for file in files}
        assert named == content, f"ssd accounts {named}, holds {content}"
        held = sum(map(self._index.allocated, files))
        assert held == self._index.num_bytes, f"ssd accounts {self._index.num_bytes}, holds {held}"
        assert held <= self._capacity_bytes, f"ssd holds {held} of {self._capacity_bytes} bytes"

    async def close(self) -> None:
        """Wait for what is under way, and let others have the folder. Idempotent."""
        await self._changes.wait()
        await self._worker.stop()
        self._folder.release()


def _is_cut(file: SsdFile, frames: Mapping[int, bytes]) -> bool:
    sizes = file.sizes
    return any(len(frame) < sizes[stratum] for stratum, frame in frames.items())
