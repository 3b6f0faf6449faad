"""The file of a block: its name says whose it is, which writing, and where each stratum lies.

One file holds all frames of a block, strata ascending, nothing else. A block of BASE (4,096 bytes)
and MID (2,048) whose hash begins with ``5f`` is::

    5f/<scope>.<block hash>.000000000000002a.1-4096.2-2048

``2a`` is the writing's number: of two files of one block, which only a crash leaves, the greater is
the newer. Without MID the name ends in ``.1-4096`` and the file is cut; without BASE it ends in
``.0-4096.2-2048``: stratum 0 is a gap that nobody reads.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvstrata.kvstore_service.tier import StratumSizes
from kvstrata.protos.identity import BlockKey

SUB_FOLDERS = tuple(f"{first:02x}" for first in range(256))
_GAP = 0
_MAX_NUMBER = 1 << 56
_NAME = re.compile(
    r"([0-9a-f]{32}\.[0-9a-f]{32})\.([0-9a-f]{16})((?:\.[0-9]-[0-9]{1,12})+)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class SsdFile:
    """One writing of one block on disk.

    Attributes:
        key: The block.
        number: Greater than that of any earlier writing in the folder.
        extents: Stratum and size of each run of bytes, in file order; stratum 0 is a gap.
    """

    key: BlockKey
    number: int
    extents: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, key: BlockKey, number: int, frames: Mapping[int, bytes]) -> "SsdFile":
        """Return the file that holds ``frames``."""
        return cls(key, number, tuple((s, len(frames[s])) for s in sorted(frames)))

    @classmethod
    def parse(cls, name: str) -> "SsdFile | None":
        """Return the file of that name; None if this module would never have made the name."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        pairs = [part.split("-") for part in match[3][1:].split(".")]
        extents = tuple((int(stratum), int(size)) for stratum, size in pairs)
        found = cls(BlockKey.decode(match[1]), int(match[2], 16), extents)
        strata = list(found.sizes)
        is_ours = (
            found.name == name
            and found.number < _MAX_NUMBER
            and extents[-1][0] != _GAP
            and strata == sorted(strata)
            and len(strata) == sum(stratum != _GAP for stratum, _ in extents)
        )
        return found if is_ours else None

    @property
    def name(self) -> str:
        """Its name within its sub-folder."""
        layout = "".join(f".{stratum}-{size}" for stratum, size in self.extents)
        return f"{self.key.encode()}.{self.number:016x}{layout}"

    @property
    def sub_folder(self) -> str:
        """The one of ``SUB_FOLDERS`` that it is in."""
        return self.key.block_hash[:1].hex()

    @property
    def path(self) -> str:
        """Its path within the tier's folder."""
        return f"{self.sub_folder}/{self.name}"

    @property
    def num_bytes(self) -> int:
        """Its length, gaps included."""
        return sum(size for _, size in self.extents)

    @property
    def sizes(self) -> StratumSizes:
        """The strata it holds."""
        return {stratum: size for stratum, size in self.extents if stratum != _GAP}

    def places(self) -> dict[int, tuple[int, int]]:
        """Return where each stratum lies: offset and size."""
        found: dict[int, tuple[int, int]] = {}
        offset = 0
        for stratum, size in self.extents:
            if stratum != _GAP:
                found[stratum] = (offset, size)
            offset += size
        return found

    def without(self, stratum: int) -> "SsdFile | None":
        """Return the file with a gap for ``stratum``, or cut before it; None if none is left."""
        extents = [(_GAP if s == stratum else s, size) for s, size in self.extents]
        while extents and extents[-1][0] == _GAP:
            extents.pop()
        return SsdFile(self.key, self.number, tuple(extents)) if extents else None
