"""Files on disk: profiles, and the files of blocks under a tier that serves from them."""

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.kvstore_service.lower_reader import Piece
from kvstrata.kvstore_service.ssd_tier import SsdTier
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.methods.profile import ProfileError, load_profile
from kvstrata.protos.identity import BlockKey, ScopeDigest
from tests.fuzz.campaign import Target
from tests.fuzz.mutation import mutate
from tests.methods.profiles import make_profile

BASE, MID = 1, 2
SCOPE = ScopeDigest(b"s" * 16)
NUM_BLOCKS = 8


def make_profiles(folder: Path) -> Target:
    """Return the target of profile files, which are written to ``folder``."""
    path = folder / "fuzzed.profile.npz"
    good = make_profile(1, 1, 8, forms=("pre",))
    good.save(path)
    corpus = [path.read_bytes()]

    def check(data: bytes) -> str:
        path.write_bytes(data)
        try:
            profile = load_profile(path)
        except ProfileError:
            return "refused"
        if profile.profile_id == good.profile_id:
            for name, array in good.arrays().items():
                assert np.array_equal(profile.arrays()[name], array), name
            return "unchanged"
        return "another"  # its hash says so: blocks of the real one are never read with it

    return Target(
        "profiles",
        15,
        lambda source: mutate(corpus[0], source, corpus),
        check,
        wanted=["refused", "unchanged"],
    )


class DamagedDisk:
    """A store over an ssd tier whose files are changed under it. Blocks are put again when lost."""

    def __init__(self, loop: asyncio.AbstractEventLoop, folder: Path) -> None:
        self._loop = loop
        self._folder = folder / "ssd"
        self._blocks = [
            sample_block(SCOPE, number, strata={BASE: 600, MID: 300})
            for number in range(NUM_BLOCKS)
        ]
        self._tier = SsdTier(str(self._folder), capacity_bytes=1 << 30, max_stratum_bytes=1 << 20)
        loop.run_until_complete(self._tier.open())
        # So small that nothing stays in dram: every read goes to the disk.
        self.store = BlockStore(DramTier(1), [self._tier])
        for key, frames in self._blocks:
            self._run(self._tier.put(key, frames))

    def _run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    def make(self, source: random.Random) -> tuple[int, int]:
        return source.randrange(NUM_BLOCKS), source.getrandbits(32)

    def check(self, made: tuple[int, int]) -> str:
        """Damage one file, by what the numbers choose, and read its block."""
        number, seed = made
        source = random.Random(seed)
        key, frames = self._blocks[number]
        path = self._file(key)
        if path is None:
            self._run(self._tier.put(key, frames))
            path = self._file(key)
            assert path is not None
        data = path.read_bytes()
        changed = mutate(data, source, [data, *frames.values()])
        path.write_bytes(changed)
        read = self._run(self.store.get(key, [BASE, MID]))
        delivered = 0
        for stratum, found in read.items():
            if isinstance(found, Piece):
                assert found.frame == frames[stratum], "damaged bytes were served"
                delivered += 1
        if delivered < 2:
            self._run(self._tier.delete([key]))
        else:
            path.write_bytes(data)
        if source.random() < 0.05:
            self._run(self._tier.check_integrity())
        return "served" if delivered == 2 else "missed"

    def _file(self, key: BlockKey) -> Path | None:
        found = list(self._folder.glob(f"{key.block_hash[:1].hex()}/{key.encode()}.*"))
        assert len(found) <= 1
        return found[0] if found else None

    def close(self) -> None:
        self._run(self.store.close())


@contextmanager
def damaged_disk(folder: Path) -> Iterator[Target]:
    """Give the target of files of blocks."""
    loop = asyncio.new_event_loop()
    fsync, os.fsync = (
        os.fsync,
        lambda fd: None,
    )  # nothing crashes here
    try:
        disk = DamagedDisk(loop, folder)
        yield Target("disk", 20, disk.make, disk.check, wanted=["served", "missed"])
        disk.close()
    finally:
        os.fsync = fsync
        loop.close()
