"""Which blocks are on disk, in order of use, and how many bytes they take there."""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from kvstrata.kvstore_service.ssd_file import SsdFile
from kvstrata.protos.identity import BlockKey


class SsdIndex:
    """The accounting of the ssd tier. One event loop owns it; no method awaits.

    Args:
        capacity_bytes: Bound on what the files take, reservations included.
        allocation_bytes: What the file system rounds sizes up to.
        files: What is there, least recently used first.
    """

    def __init__(
        self, capacity_bytes: int, allocation_bytes: int, files: Iterable[SsdFile] = ()
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self.num_reservations = 0
        self._allocation_bytes = allocation_bytes
        self._reserved_bytes = 0
        self._files: OrderedDict[BlockKey, SsdFile] = OrderedDict()
        self._touched: dict[BlockKey, float] = {}
        for file in files:
            self.add(file)

    def __len__(self) -> int:
        return len(self._files)

    def files(self) -> list[SsdFile]:
        """Return every file, least recently used first."""
        return list(self._files.values())

    def keys(self, limit: int) -> list[BlockKey]:
        """Return at most ``limit`` keys, most recently used first."""
        return list(islice(reversed(self._files), limit))

    def get(self, key: BlockKey) -> SsdFile | None:
        """Return the block's file."""
        return self._files.get(key)

    def use(self, key: BlockKey) -> SsdFile | None:
        """Return the block's file and make it the most recently used."""
        if key in self._files:
            self._files.move_to_end(key)
        return self._files.get(key)

    def add(self, file: SsdFile, touched_s: float = -math.inf) -> None:
        """Hold ``file``, mtime of ``touched_s``, as its block's only one, most recently used."""
        self.remove(file.key)
        self._files[file.key] = file
        self._touched[file.key] = touched_s
        self.num_bytes += self.allocated(file)

    def replace(self, file: SsdFile) -> None:
        """Hold ``file`` in the place of its block's present one, its order of use unchanged."""
        self.num_bytes += self.allocated(file) - self.allocated(self._files[file.key])
        self._files[file.key] = file

    def remove(self, key: BlockKey) -> SsdFile | None:
        """Forget the block and return the file that it had."""
        file = self._files.pop(key, None)
        self._touched.pop(key, None)
        self.num_bytes -= self.allocated(file)
        return file

    def allocated(self, file: SsdFile | None) -> int:
        """Return what the file takes on disk; no file takes nothing."""
        if file is None:
            return 0
        return -(-file.num_bytes // self._allocation_bytes) * self._allocation_bytes

    def victims(
        self, extra_bytes: int, is_exempt: Callable[[BlockKey], bool]
    ) -> list[SsdFile] | None:
        """Return whom to remove so that ``extra_bytes`` more fit; None if they cannot fit now."""
        excess = self.num_bytes + self._reserved_bytes + extra_bytes - self.capacity_bytes
        victims: list[SsdFile] = []
        for key, file in self._files.items():
            if excess <= 0:
                break
            if not is_exempt(key):
                victims.append(file)
                excess -= self.allocated(file)
        return victims if excess <= 0 else None

    @contextlib.contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Count ``num_bytes`` as taken while a change of the folder is under way."""
        self._reserved_bytes += num_bytes
        self.num_reservations += 1
        try:
            yield
        finally:
            self._reserved_bytes -= num_bytes
            self.num_reservations -= 1

    def is_touch_due(self, key: BlockKey, now_s: float, every_s: float) -> bool:
        """Return whether the file's mtime is ``every_s`` old; the caller renews it then."""
        touched_s = self._touched.get(key)
        if touched_s is None or now_s - touched_s < every_s:
            return False
        self._touched[key] = now_s
        return True
