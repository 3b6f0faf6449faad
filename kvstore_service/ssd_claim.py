"""Whose folder it is: the mark that makes a folder the ssd tier's, and the lock of one process.

Only in a folder with ``KVSTRATA_SSD`` in it does the tier remove anything.
"""

import fcntl
import os
from collections.abc import Sequence

from kvstrata.protos.errors import ConfigurationError

MARKER = "KVSTRATA_SSD"
LOST_AND_FOUND = "lost+found"  # at the root of a file system of its own
_MARKER_TEXT = b"kvstrata ssd tier, format 1\n"
_NEW_MARKER = f"{MARKER}.new"


class FolderInUseError(ConfigurationError):
    """A folder that another running store holds."""


class SsdClaim:
    """One process's hold on the folder at ``path``; the system ends it with the process."""

    def __init__(self, path: str, *, fsync: bool) -> None:
        self._path = path
        self._fsync = fsync
        self._fd = -1

    def take(self, *, create: bool) -> None:
        """Take the folder until ``release``. Idempotent.

        Args:
            create: Whether an absent or empty folder becomes the tier's.

        Raises:
            FolderInUseError: Another process has it.
            ConfigurationError: It is not the tier's, or of another format.
            OSError: It cannot be opened, made or locked.
        """
        if create and not os.path.isdir(self._path):
            os.makedirs(self._path, mode=0o700)
            sync_folder(os.path.dirname(self._path), fsync=self._fsync)
        if not self.is_held():
            self.release()
            self._lock()
        self._check_marker(create)

    def is_held(self) -> bool:
        """Return whether the folder that was taken is still at the path."""
        if self._fd < 0:
            return False
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def release(self) -> None:
        """Let others have the folder. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise FolderInUseError(
                f"ssd folder {self._path} is in use by another store",
                "stop that store, or give each store a folder of its own",
            ) from None
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def _check_marker(self, create: bool) -> None:
        try:
            fd = os.open(f"{self._path}/{MARKER}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            self._mark(create)
            return
        try:
            text = os.read(fd, 2 * len(_MARKER_TEXT))
        finally:
            os.close(fd)
        if text != _MARKER_TEXT:
            raise ConfigurationError(
                f"ssd folder {self._path} says {text!r}, not {_MARKER_TEXT!r}",
                "use the release that made it, or an empty folder",
            )

    def _mark(self, create: bool) -> None:
        if not create or not set(os.listdir(self._path)) <= {_NEW_MARKER, LOST_AND_FOUND}:
            raise ConfigurationError(
                f"folder {self._path} is no ssd tier's: there is no {MARKER} in it",
                "name an empty folder, or one that a store has made",
            )
        new = f"{self._path}/{_NEW_MARKER}"
        create_file(new, [_MARKER_TEXT], fsync=self._fsync)
        os.rename(new, f"{self._path}/{MARKER}")
        sync_folder(self._path, fsync=self._fsync)


def create_file(path: str, parts: Sequence[bytes], *, fsync: bool) -> None:
    """Write a file that only this user may read; a failure may leave part of it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(fd, rest) :]
        if fsync:
            os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: str, *, fsync: bool) -> None:
    """Return when the names in the folder are on disk, if ``fsync``."""
    if not fsync:
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
