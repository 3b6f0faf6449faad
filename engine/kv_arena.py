"""The memory of running sequences' KV: one piece of fixed size, and who holds which part of it.

Extents, of any size, grow from the bottom; pages, all of one size, from the top. Example with pages
of 4 KiB and 64 KiB in all::

    | block A | free | block B |          free          | free page | page 14 | page 15 |
    0         9k     12k       20k                      52k                            64k

A free page at the lower end goes back to the middle at once. When no gap takes an extent although
the free bytes would, movable extents are pushed together (``compact``).
"""

import bisect
import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch

from kvstrata.engine.staging import Staging
from kvstrata.kernels.huge_memory import empty_huge

ALIGNMENT = 64
_SYSTEM_PAGE = 4096

PageIds = npt.NDArray[np.int32]
Fill = Callable[[npt.NDArray[np.uint8]], None]


class ArenaFullError(Exception):
    """No room; never leaves the node: the scheduler waits, parks a sequence or recomputes."""


@dataclass(eq=False)
class Extent:
    """A run of bytes.

    Attributes:
        offset: First byte in the arena's memory.
        num_bytes: Its size, a multiple of ``ALIGNMENT``.
        on_move: Called with the distance after the bytes have been moved; None: they stay.
    """

    offset: int
    num_bytes: int
    on_move: Callable[[int], None] | None = None

    @property
    def stop(self) -> int:
        """The byte behind the last."""
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class Source:
    """Host memory that holds what was written to extents: the arena itself, or a copy.

    Attributes:
        memory: uint8, one dimension.
        starts: Where each extent's bytes begin in it, multiples of ``ALIGNMENT``.
    """

    memory: torch.Tensor
    starts: list[int]


class KVArena:
    """Hands out extents and pages. Not thread-safe: one thread runs the model.

    Attributes:
        memory: uint8, (capacity_bytes,).
        page_bytes: Size of a page.
    """

    def __init__(
        self,
        capacity_bytes: int,
        page_bytes: int,
        device: torch.device | str = "cpu",
        staging: Staging | None = None,
    ) -> None:
        """Reserve the memory; the system maps it when it is first written.

        Args:
            capacity_bytes: How much, down to whole pages.
            page_bytes: Of a page.
            device: Where it is.
            staging: How bytes get there.

        Raises:
            ValueError: A page is no multiple of ``ALIGNMENT`` bytes, or the arena holds no page.
        """
        if page_bytes < 1 or page_bytes % ALIGNMENT:
            raise ValueError(f"a page must be a multiple of {ALIGNMENT} bytes, not {page_bytes}")
        if capacity_bytes < page_bytes:
            raise ValueError(f"{capacity_bytes} bytes hold no page of {page_bytes}")
        self.page_bytes = page_bytes
        self._staging = staging
        self._num_pages = capacity_bytes // page_bytes
        self.memory = empty_huge((self._num_pages * page_bytes,), torch.uint8, device)
        self._extents: list[Extent] = []  # ascending
        self._is_page_used = np.zeros(self._num_pages, np.bool_)
        self._free_pages: list[int] = []  # a heap of negative ids
        self._floor = self._num_pages  # the first page of the pages' part
        self._extent_bytes = 0
        self._num_pages_used = 0
        self._num_still = 0

    @property
    def capacity_bytes(self) -> int:
        """Bytes in all."""
        return self.memory.numel()

    @property
    def used_bytes(self) -> int:
        """Bytes handed out."""
        return self._extent_bytes + self._num_pages_used * self.page_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that are not handed out; an extent may need ``compact`` to get them."""
        return self.capacity_bytes - self.used_bytes

    def touch(self, num_bytes: int) -> None:
        """Have the system map the first and the last bytes, where extents and pages begin.

        What is written for the first time costs the system .3 ms per 2 MiB, and 5 ms in a virtual
        machine whose host has to find the memory, too: more than decoding into it.

        Args:
            num_bytes: At each end, as far as there are so many. Nothing may be held yet.
        """
        assert not self.used_bytes, "bytes are held"
        if self.memory.device.type == "cpu":
            size = min(num_bytes, self.capacity_bytes // 2)
            self.memory[:size:_SYSTEM_PAGE] = 0
            self.memory[self.capacity_bytes - size :: _SYSTEM_PAGE] = 0

    def allocate(self, num_bytes: int, on_move: Callable[[int], None] | None = None) -> Extent:
        """Return an extent of at least ``num_bytes``, in the smallest gap that takes it.

        Raises:
            ArenaFullError: There is no such gap, not even after ``compact``; nothing has changed
                but that.
        """
        size = max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT
        index = self._gap_for(size)
        if index is None and size <= self._floor * self.page_bytes - self._extent_bytes:
            self.compact()
            index = self._gap_for(size)
        if index is None:
            raise ArenaFullError(f"no room for {size} of {self.free_bytes} free bytes")
        extent = Extent(self._end_before(index), size, on_move)
        self._extents.insert(index, extent)
        self._extent_bytes += size
        return extent

    def release(self, extent: Extent) -> None:
        """Take an extent back.

        Raises:
            ValueError: It is not held.
        """
        index = bisect.bisect_left(self._extents, extent.offset, key=lambda e: e.offset)
        if index == len(self._extents) or self._extents[index] is not extent:
            raise ValueError("an extent can be released once, by its holder")
        del self._extents[index]
        self._extent_bytes -= extent.num_bytes

    def shrink(self, extent: Extent, num_bytes: int) -> None:
        """Take an extent's last bytes back, so that it holds at least ``num_bytes``.

        Raises:
            ValueError: It holds fewer, or would hold none.
        """
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if not 0 < size <= extent.num_bytes:
            raise ValueError(f"an extent of {extent.num_bytes} bytes cannot shrink to {num_bytes}")
        self._extent_bytes -= extent.num_bytes - size
        extent.num_bytes = size

    def view(self, extent: Extent) -> torch.Tensor:
        """Return an extent's bytes."""
        return self.memory[extent.offset : extent.stop]

    def fill(self, extents: Sequence[Extent], fills: Sequence[Fill]) -> Source:
        """Write extents, each by a function that is given its bytes, and return who has them.

        On a device the bytes are put together on the host and sent, without waiting for it.

        Raises:
            StagingLateError: The device did not take them in time; the extents mean nothing.
        """
        if self._staging is None and self.memory.device.type == "cpu":
            for extent, fill in zip(extents, fills, strict=True):
                fill(self.view(extent).numpy())
            return Source(self.memory, [extent.offset for extent in extents])
        ends = [0, *accumulate(extent.num_bytes for extent in extents)]
        staged = torch.empty(ends[-1], dtype=torch.uint8)
        targets = [self.view(extent) for extent in extents]

        def sources() -> Iterator[torch.Tensor]:
            for fill, (first, stop) in zip(fills, pairwise(ends), strict=True):
                fill(staged[first:stop].numpy())
                yield staged[first:stop]

        if self._staging is not None:
            deque(self._staging.write(targets, sources()), 0)
        else:
            for target, source in zip(targets, sources(), strict=True):
                target.copy_(source, non_blocking=True)
        return Source(staged, ends[:-1])

    def take_pages(self, count: int) -> PageIds:
        """Return ``count`` pages; page i is bytes i * page_bytes and on.

        Raises:
            ArenaFullError: There are fewer; nothing has changed but that extents may have moved.
        """
        missing = count - len(self._free_pages)
        if missing > 0:
            if missing > self._floor - self._least_floor():
                if missing * self.page_bytes > self._floor * self.page_bytes - self._extent_bytes:
                    raise ArenaFullError(f"no room for {count} pages")
                self.compact()
            if missing > self._floor - self._least_floor():
                raise ArenaFullError(f"no room for {count} pages")
        last = self._floor - max(missing, 0)
        fresh = np.arange(self._floor - 1, last - 1, -1, dtype=np.int32)
        self._floor = last
        freed = [-heapq.heappop(self._free_pages) for _ in range(count - len(fresh))]
        ids = np.concatenate([np.array(freed, np.int32), fresh])
        self._is_page_used[ids] = True
        self._num_pages_used += count
        return ids

    def can_replace(self, extent: Extent, count: int) -> bool:
        """Tell whether ``count`` pages can take the place of an extent, part by part."""
        missing = count - len(self._free_pages)
        if self._num_still:
            return missing <= self._floor - self._least_floor()
        end = 0
        for other in self._extents:
            if other is not extent:
                end = (other.offset if other.on_move is None else end) + other.num_bytes
        return missing <= self._floor - -(-end // self.page_bytes)

    def release_pages(self, ids: PageIds) -> None:
        """Take pages back.

        Raises:
            ValueError: One of them is not held, or comes twice.
        """
        ids = np.asarray(ids, np.int32).ravel()
        if not self._is_page_used[ids].all() or len(np.unique(ids)) < len(ids):
            raise ValueError("a page can be released once, by its holder")
        self._is_page_used[ids] = False
        self._num_pages_used -= len(ids)
        for page in ids.tolist():
            heapq.heappush(self._free_pages, -page)
        if self._floor < self._num_pages and not self._is_page_used[self._floor]:
            self._raise_floor()

    def hold_still(self) -> None:
        """Move nothing until ``let_move``: another thread reads. Room may be found too small."""
        self._num_still += 1

    def let_move(self) -> None:
        """End one ``hold_still``."""
        assert self._num_still, "nothing is held still"
        self._num_still -= 1

    def compact(self) -> int:
        """Push movable extents down, in order; return how many moved."""
        moved, end = 0, 0
        if self._num_still:
            return 0
        for extent in self._extents:
            if extent.on_move is not None and extent.offset > end:
                distance = end - extent.offset
                source = self.view(extent)
                if -distance < extent.num_bytes:
                    source = source.clone()
                extent.offset = end
                self.view(extent).copy_(source)
                extent.on_move(distance)
                moved += 1
            end = extent.stop
        return moved

    def check_integrity(self) -> None:
        """Raise AssertionError unless every byte is held once or free."""
        end = 0
        for extent in self._extents:
            assert extent.num_bytes > 0, "an extent is empty"
            assert extent.offset >= end, "extents overlap"
            assert extent.offset % ALIGNMENT == 0, "an extent is not aligned"
            end = extent.stop
        assert end <= self._floor * self.page_bytes, "extents reach into pages"
        assert self._extent_bytes == sum(e.num_bytes for e in self._extents), "bytes miscounted"
        used = np.flatnonzero(self._is_page_used)
        assert len(used) == self._num_pages_used, "pages miscounted"
        assert not len(used) or used[0] >= self._floor, "a page lies below the pages' part"
        free = sorted(-page for page in self._free_pages)
        both = sorted([*free, *used.tolist()])
        assert both == list(range(self._floor, self._num_pages)), "a page is lost or doubled"

    def _gap_for(self, size: int) -> int | None:
        """Return before which extent the smallest gap of at least ``size`` bytes is."""
        best, best_size = None, self.capacity_bytes + 1
        end = 0
        for index in range(len(self._extents) + 1):
            is_last = index == len(self._extents)
            start = self._floor * self.page_bytes if is_last else self._extents[index].offset
            # The middle is taken last, so that pages find room there.
            gap = start - end
            if size <= gap < best_size and not (is_last and best is not None):
                best, best_size = index, gap
            end = start if is_last else self._extents[index].stop
        return best

    def _end_before(self, index: int) -> int:
        return self._extents[index - 1].stop if index else 0

    def _least_floor(self) -> int:
        return -(-self._end_before(len(self._extents)) // self.page_bytes)

    def _raise_floor(self) -> None:
        """Give the free pages at the lower end back to the middle."""
        later = np.flatnonzero(self._is_page_used[self._floor :])
        self._floor = self._floor + int(later[0]) if len(later) else self._num_pages
        self._free_pages = [page for page in self._free_pages if -page >= self._floor]
        heapq.heapify(self._free_pages)
