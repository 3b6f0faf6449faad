"""The frames of blocks, by slot and stratum, and what a look at many blocks at once tells."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstrata.kvstore_service.commit_rule import ALL_STRATA
from kvstrata.kvstore_service.slots import NONE, Slots
from kvstrata.kvstore_service.tier import StratumSizes

_PARTIAL = 1
_BITS = {stratum: 1 << stratum for stratum in ALL_STRATA}


def strata_mask(strata: Iterable[int]) -> int:
    """Return ``strata`` as a number: bit s for stratum s. At most 255."""
    return sum(_BITS[stratum] for stratum in set(strata))


def strata_of(mask: int) -> tuple[int, ...]:
    """Return the strata of a mask, ascending."""
    return tuple(stratum for stratum, bit in _BITS.items() if mask & bit)


class Held(NamedTuple):
    """What is held of each of some blocks.

    Attributes:
        strata: uint8, ``strata_mask``; 0 for an absent block.
        num_bytes: int64.
        is_partial: Whether a tier below may hold more strata.
    """

    strata: npt.NDArray[np.uint8]
    num_bytes: npt.NDArray[np.int64]
    is_partial: npt.NDArray[np.bool_]


class HeldFrames:
    """Frames of blocks: a column a stratum, so that no block has an object of its own.

    Attributes:
        num_blocks: Blocks of which something is held.
        num_bytes: Of all frames.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._mask = slots.column("B")
        self._sizes = slots.column("I")
        self._columns: dict[int, list[bytes | None]] = {}
        self.num_blocks = 0
        self.num_bytes = 0

    def holds(self, slot: int) -> bool:
        """Return whether anything is held of the block; for ``NONE`` nothing is."""
        return slot != NONE and self._mask[slot] > _PARTIAL

    def holds_all(self, slot: int, strata: Iterable[int]) -> bool:
        """Return whether all of ``strata`` are held."""
        mask = self._mask[slot]
        return all(mask & _BITS[stratum] for stratum in strata)

    def size(self, slot: int) -> int:
        """Return the bytes held of the block."""
        return int(self._sizes[slot]) if self.holds(slot) else 0

    def strata(self, slot: int) -> tuple[int, ...]:
        """Return the strata held, ascending."""
        return strata_of(self._mask[slot])

    def sizes(self, slot: int) -> StratumSizes:
        """Return the strata held and their sizes."""
        return {stratum: len(self.frame(slot, stratum)) for stratum in self.strata(slot)}

    def frame(self, slot: int, stratum: int) -> bytes:
        """Return a frame that is held."""
        frame = self._columns[stratum][slot]
        assert frame is not None
        return frame

    def frames(self, slot: int, strata: Sequence[int]) -> dict[int, bytes]:
        """Return those of ``strata`` that are held."""
        mask = self._mask[slot]
        return {s: self.frame(slot, s) for s in strata if mask & _BITS[s]}

    def put(self, slot: int, frames: Mapping[int, bytes]) -> None:
        """Hold ``frames`` of the block and nothing else; not partial."""
        self.drop(slot)
        for stratum, frame in frames.items():
            self.add(slot, stratum, frame)

    def add(self, slot: int, stratum: int, frame: bytes) -> None:
        """Hold a frame more of the block."""
        column = self._columns.get(stratum)
        if column is None:
            column = self._columns[stratum] = self._slots.object_column()
        self.num_blocks += not self.holds(slot)
        column[slot] = frame
        self._mask[slot] |= _BITS[stratum]
        self._sizes[slot] += len(frame)
        self.num_bytes += len(frame)

    def pop(self, slot: int, stratum: int) -> bytes:
        """Hold a frame no longer, and return it."""
        frame = self.frame(slot, stratum)
        self._columns[stratum][slot] = None
        self._mask[slot] &= ~_BITS[stratum]
        self._sizes[slot] -= len(frame)
        self.num_bytes -= len(frame)
        self.num_blocks -= not self.holds(slot)
        return frame

    def drop(self, slot: int) -> None:
        """Hold nothing of the block; not partial."""
        for stratum in self.strata(slot):
            self.pop(slot, stratum)
        self._mask[slot] = 0

    def is_partial(self, slot: int) -> bool:
        """Return whether a tier below may hold more strata of the block."""
        return bool(self._mask[slot] & _PARTIAL)

    def set_partial(self, slot: int, is_partial: bool) -> None:
        """Know whether a tier below may hold more."""
        self._mask[slot] = self._mask[slot] & ~_PARTIAL | is_partial

    def slots(self) -> npt.NDArray[np.int64]:
        """Return the slots of all blocks of which something is held."""
        return np.flatnonzero(np.frombuffer(self._mask, np.uint8) > _PARTIAL)

    def look(self, slots: npt.NDArray[np.int32]) -> Held:
        """Return what is held in ``slots``, some of which may be ``NONE``."""
        if not len(self._mask):
            nothing = np.zeros(len(slots), np.uint8)
            return Held(nothing, nothing.astype(np.int64), nothing > 0)
        known = slots != NONE
        mask = np.where(known, np.frombuffer(self._mask, np.uint8)[slots], 0)
        size = np.where(known, np.frombuffer(self._sizes, np.uint32)[slots], 0)
        strata = (mask & ~np.uint8(_PARTIAL)).astype(np.uint8)
        is_partial = (mask & _PARTIAL) > 0
        return Held(strata, size.astype(np.int64), is_partial)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless sizes, masks and sums agree with the frames."""
        num_blocks = num_bytes = 0
        for slot, mask in enumerate(self._mask):
            held = {s: column[slot] for s, column in self._columns.items()}
            frames = {s: frame for s, frame in held.items() if frame is not None}
            assert strata_mask(frames) == mask & ~_PARTIAL, f"slot {slot} holds other strata"
            size = sum(map(len, frames.values()))
            assert size == self._sizes[slot], f"slot {slot} accounts {self._sizes[slot]} bytes"
            num_blocks += bool(frames)
            num_bytes += size
        assert num_blocks == self.num_blocks, f"{num_blocks} blocks, not {self.num_blocks}"
        assert num_bytes == self.num_bytes, f"{num_bytes} bytes, not {self.num_bytes}"
