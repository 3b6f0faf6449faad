"""The blocks of a soak: which there are, and what their bytes must be, from numbers alone."""

import functools
import hashlib
from dataclasses import dataclass

from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos.identity import BlockHash, BlockKey, CacheScope

BASE, MID = 1, 2
STRATA = {BASE: 24_000, MID: 8_000}
SCOPE = CacheScope(b"soak" + bytes(12), "bfloat16", "sample/1").digest()
STREAM_BLOCKS = 8
FIRST_CHURN_STREAM = 10_000  # streams before it are written again and again, these only once

Frames = dict[int, bytes]


@dataclass(frozen=True, order=True)
class Name:
    """One block: which stream, and where in it. Printed and read as ``17.3``."""

    stream: int
    number: int

    def __str__(self) -> str:
        return f"{self.stream}.{self.number}"

    @classmethod
    def parse(cls, text: str) -> "Name":
        """Return the name that was printed."""
        stream, number = text.split(".")
        return cls(int(stream), int(number))


@functools.lru_cache(maxsize=4096)
def key_of(name: Name) -> BlockKey:
    return make(name, 0)[0]


def make(name: Name, version: int) -> tuple[BlockKey, Frames]:
    """Return one writing of a block: the same for the same numbers, in every process."""
    before = key_of(Name(name.stream, name.number - 1)).block_hash if name.number else None
    return sample_block(
        SCOPE,
        name.stream * STREAM_BLOCKS + name.number,
        strata=STRATA,
        parent=before,
        seed=version,
        first_position=64 * name.number,
    )


def stream_hashes(stream: int) -> list[BlockHash]:
    return [key_of(Name(stream, number)).block_hash for number in range(STREAM_BLOCKS)]


def digest(frame: bytes | memoryview) -> str:
    return hashlib.blake2b(frame, digest_size=8).hexdigest()


@functools.lru_cache(maxsize=65_536)
def digests(name: Name, version: int) -> dict[int, str]:
    """Return what the strata of a writing must hash to."""
    return {stratum: digest(frame) for stratum, frame in make(name, version)[1].items()}
