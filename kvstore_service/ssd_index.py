"""Which blocks are on disk, in order of use, and how many bytes they take there."""

import math
from collections.abc import Iterable

from kvstrata.kvstore_service.held_blocks import HeldBlocks
from kvstrata.kvstore_service.ssd_file import SsdFile
from kvstrata.protos.identity import BlockKey


class SsdIndex(HeldBlocks[SsdFile]):
    """The accounting of the ssd tier.

    Args:
        capacity_bytes: Bound on what the files take, reservations included.
        allocation_bytes: What the file system rounds sizes up to.
        files: What is there, least recently used first.
    """

    def __init__(
        self, capacity_bytes: int, allocation_bytes: int, files: Iterable[SsdFile] = ()
    ) -> None:
        super().__init__(capacity_bytes, self.allocated)
        self._allocation_bytes = allocation_bytes
        self._touched: dict[BlockKey, float] = {}
        for file in files:
            self.add(file)

    def add(self, file: SsdFile, touched_s: float = -math.inf) -> None:
        """Hold ``file``, mtime of ``touched_s``, as its block's only one, most recently used."""
        self.remove(file.key)
        self.replace(file)
        self._touched[file.key] = touched_s

    def remove(self, key: BlockKey) -> SsdFile | None:
        """Forget the block and return the file that it had."""
        self._touched.pop(key, None)
        return super().remove(key)

    def allocated(self, file: SsdFile) -> int:
        """Return what the file takes on disk."""
        return -(-file.num_bytes // self._allocation_bytes) * self._allocation_bytes

    def is_touch_due(self, key: BlockKey, now_s: float, every_s: float) -> bool:
        """Return whether the file's mtime is ``every_s`` old; the caller renews it then."""
        touched_s = self._touched.get(key)
        if touched_s is None or now_s - touched_s < every_s:
            return False
        self._touched[key] = now_s
        return True
