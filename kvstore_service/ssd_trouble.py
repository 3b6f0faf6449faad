"""What keeps the ssd tier from working, and what to do about it."""

import errno
import os
from dataclasses import dataclass

from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import CapacityError, KVStrataError

_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_OPEN_FILES = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, slots=True)
class Trouble:
    """A state that lasts until a probe finds it gone.

    Attributes:
        detail: What is wrong.
        remedy: What to do about it.
        is_full: The disk is full: writes find no room, all else works.
        needed_bytes: Room that must be free before the next write is tried.
    """

    detail: str
    remedy: str
    is_full: bool = False
    needed_bytes: int = 0

    @classmethod
    def full(cls, path: str, needed_bytes: int) -> "Trouble":
        """Return that the disk has no room."""
        remedy = f"free space on the disk of {path}, or lower the store's --ssd"
        return cls("the disk is full", remedy, True, needed_bytes)

    @classmethod
    def silent(cls, path: str, timeout_s: float) -> "Trouble":
        """Return that the disk hangs."""
        return cls(f"the disk did not answer within {timeout_s:g} s", f"check the disk of {path}")

    @classmethod
    def failed(cls, path: str, error: Exception) -> "Trouble":
        """Return what ``error`` means."""
        if isinstance(error, KVStrataError):
            return cls(error.message, error.remedy)
        number = error.errno if isinstance(error, OSError) else None
        if number is None:
            return cls(str(error), f"check {path}")
        if number in _ACCESS:
            remedy = f"let the store's user write in {path}"
        elif number in (errno.ENOENT, errno.ENOTDIR):
            remedy = f"bring {path} back, or restart the store to begin a new one"
        elif number in _OPEN_FILES:
            remedy = "raise the limit of open files"
        else:
            remedy = f"check the disk of {path}"
        return cls(os.strerror(number), remedy)

    def error(self) -> TierUnavailableError | CapacityError:
        """Return the error to raise at whoever runs into it."""
        kind = CapacityError if self.is_full else TierUnavailableError
        return kind(f"tier ssd: {self.detail}", self.remedy, tier="ssd")
