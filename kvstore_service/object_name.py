"""The object of a writing: its name says whose it is, which writing, and how long each stratum is.

One object holds all frames of one writing of a block, strata ascending, nothing else, and is never
changed. A block of BASE (4,096 bytes) and MID (2,048), written in process ``9c41d2aa``::

    kvstrata-1/<scope>.<block hash>/17f3a2b4c5d6e7f8.9c41d2aa.1-4096.2-2048

``17f3a2b4c5d6e7f8`` is the writing's number, nanoseconds since 1970 unless that would not be newer
than the writing it replaces. Of several objects of a block, which a crash or two writers at a time
leave, the greatest name is the block; the others are garbage.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvstrata.kvstore_service.tier import StratumSizes
from kvstrata.protos.identity import BlockKey

ROOT = "kvstrata-1"
_MAX_NUMBER = (1 << 63) - 1
_PATH = re.compile(
    rf"{ROOT}/([0-9a-f]{{32}}\.[0-9a-f]{{32}})/([0-9a-f]{{16}})\.([0-9a-f]{{8}})"
    r"((?:\.[1-9]-[1-9][0-9]{0,11})+)",
    re.ASCII,
)


def folder_of(key: BlockKey) -> str:
    """Return the prefix that every writing of the block is under."""
    return f"{ROOT}/{key.encode()}"


@dataclass(frozen=True, slots=True)
class ObjectName:
    """One writing of one block in the bucket.

    Attributes:
        key: The block.
        number: Greater than that of the writing that it replaced.
        writer: 8 hex digits that tell apart writers that chose one number.
        extents: Stratum and size of each frame, in the order of their bytes.
    """

    key: BlockKey
    number: int
    writer: str
    extents: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, key: BlockKey, number: int, writer: str, frames: Mapping[int, bytes]
    ) -> "ObjectName":
        """Return the name for ``frames``."""
        return cls(key, number, writer, tuple((s, len(frames[s])) for s in sorted(frames)))

    @classmethod
    def parse(cls, path: str) -> "ObjectName | None":
        """Return the writing of that path; None if this module would never have made the path."""
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        pairs = [part.split("-") for part in match[4][1:].split(".")]
        extents = tuple((int(stratum), int(size)) for stratum, size in pairs)
        strata = [stratum for stratum, _ in extents]
        number = int(match[2], 16)
        if strata != sorted(set(strata)) or number > _MAX_NUMBER:
            return None
        return cls(BlockKey.decode(match[1]), number, match[3], extents)

    @property
    def path(self) -> str:
        """Its path under the store's prefix."""
        layout = "".join(f".{stratum}-{size}" for stratum, size in self.extents)
        return f"{folder_of(self.key)}/{self.number:016x}.{self.writer}{layout}"

    @property
    def order(self) -> tuple[int, str]:
        """Greater for the writing that is the block."""
        return self.number, self.path

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return sum(size for _, size in self.extents)

    @property
    def sizes(self) -> StratumSizes:
        """The strata it holds."""
        return dict(self.extents)

    def places(self) -> dict[int, tuple[int, int]]:
        """Return where each stratum lies: offset and size."""
        found: dict[int, tuple[int, int]] = {}
        offset = 0
        for stratum, size in self.extents:
            found[stratum] = (offset, size)
            offset += size
        return found
