"""The folder of the ssd tier: files of blocks, written so that a crash tears none.

Blocks are in 256 sub-folders, see ``ssd_file``; whose folder it is says ``ssd_claim``. Every method
blocks and may be called from any thread.
"""

import contextlib
import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from kvstrata.kvstore_service.ssd_claim import (
    LOST_AND_FOUND,
    MARKER,
    SsdClaim,
    create_file,
    sync_folder,
)
from kvstrata.kvstore_service.ssd_file import SUB_FOLDERS, SsdFile
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.identity import BlockKey

_TEMPORARY = "new."
_PROBE_BYTES = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ELOOP)


class DiskFullError(OSError):
    """A write that found no room; nothing of it is left."""


class SsdFolder:
    """Files of blocks under ``path``. Errors of the file system are ``OSError``.

    Args:
        path: The folder; made if it is not there.
        fsync: Whether what is written survives the loss of power, not only the end of the process.
        max_stratum_bytes: A name that claims more for a stratum is taken for a foreign one.
    """

    def __init__(self, path: str, *, fsync: bool, max_stratum_bytes: int) -> None:
        self.path = os.path.abspath(path)
        self._fsync = fsync
        self._max_stratum_bytes = max_stratum_bytes
        self._claim = SsdClaim(self.path, fsync=fsync)

    def claim(self, *, create: bool) -> None:
        """Take the folder for this process; see ``SsdClaim.take``."""
        self._claim.take(create=create)

    def check_held(self) -> None:
        """Raise ``FileNotFoundError`` unless the folder that was claimed is still at ``path``."""
        if not self._claim.is_held():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)

    def release(self) -> None:
        """Let others have the folder. Idempotent."""
        self._claim.release()

    def recover(self) -> tuple[list[SsdFile], Counter[str]]:
        """Return every block's file, least recently used first, and how many files were mended.

        No file is opened. Removed are ``temporary`` files of a crash, ``superseded`` writings,
        files of a ``wrong_size`` and ``foreign`` ones; ``cut`` are those that lost their last
        stratum, but not yet its bytes, when a crash came.

        Raises:
            ConfigurationError: A folder is here that the tier never makes.
        """
        mended: Counter[str] = Counter()
        for entry in self._entries(""):
            if entry.name == MARKER or self._is_folder_of_ours(entry):
                continue
            self._refuse_folder(entry)
            os.unlink(entry.path)
            mended["foreign"] += 1
        newest: dict[BlockKey, tuple[int, SsdFile]] = {}
        for name in SUB_FOLDERS:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._at(name), 0o700)
            for used_ns, file in self._recover_sub_folder(name, mended):
                other = newest.get(file.key)
                if other is not None:
                    mended["superseded"] += 1
                    self.remove([min(file, other[1], key=_number)])
                if other is None or other[1].number < file.number:
                    newest[file.key] = used_ns, file
        self._sync_folder(self.path)
        return [file for _, file in sorted(newest.values(), key=_age)], mended

    def _recover_sub_folder(
        self, sub_folder: str, mended: Counter[str]
    ) -> Iterator[tuple[int, SsdFile]]:
        for entry in self._entries(sub_folder):
            self._refuse_folder(entry)
            status = entry.stat(follow_symlinks=False)
            file = SsdFile.parse(entry.name)
            if file is None or not self._is_acceptable(file, sub_folder, status.st_mode):
                problem = "temporary" if entry.name.startswith(_TEMPORARY) else "foreign"
            elif status.st_size < file.num_bytes:
                problem = "wrong_size"
            else:
                if status.st_size > file.num_bytes:
                    mended["cut"] += 1
                    _cut(entry.path, file.num_bytes)
                yield status.st_mtime_ns, file
                continue
            mended[problem] += 1
            os.unlink(entry.path)

    def _is_acceptable(self, file: SsdFile, sub_folder: str, mode: int) -> bool:
        return (
            stat.S_ISREG(mode)
            and file.sub_folder == sub_folder
            and max(size for _, size in file.extents) <= self._max_stratum_bytes
        )

    def _is_folder_of_ours(self, entry: os.DirEntry[str]) -> bool:
        known = entry.name in SUB_FOLDERS or entry.name == LOST_AND_FOUND
        return known and entry.is_dir(follow_symlinks=False)

    def _refuse_folder(self, entry: os.DirEntry[str]) -> None:
        if entry.is_dir(follow_symlinks=False):
            raise ConfigurationError(
                f"{entry.path!r} is no folder of the ssd tier",
                "move it away: what is in it may be dear to somebody",
            )

    def _entries(self, sub_folder: str) -> list[os.DirEntry[str]]:
        with os.scandir(self._at(sub_folder)) as entries:
            return list(entries)

    def content(self) -> dict[str, int]:
        """Return path and length of every file but the marker."""
        found: dict[str, int] = {}
        for sub_folder in ("", *SUB_FOLDERS):
            for entry in self._entries(sub_folder):
                if entry.name != MARKER and not self._is_folder_of_ours(entry):
                    path = os.path.join(sub_folder, entry.name)
                    found[path] = entry.stat(follow_symlinks=False).st_size
        return found

    def read(self, file: SsdFile, strata: Sequence[int]) -> dict[int, bytes] | None:
        """Return those of ``strata`` that the file should hold; None if the file is gone.

        Bytes are cut where the file is. A file that cannot be read is removed if that can be done.
        """
        try:
            fd = os.open(self._at(file.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(file, error)
            raise
        try:
            places = file.places()
            wanted = {stratum: places[stratum] for stratum in strata if stratum in places}
            return {stratum: os.pread(fd, size, at) for stratum, (at, size) in wanted.items()}
        except OSError as error:
            self._give_up(file, error)
            raise
        finally:
            os.close(fd)

    def _give_up(self, file: SsdFile, error: OSError) -> None:
        if error.errno in _UNREADABLE:
            with contextlib.suppress(OSError):
                os.unlink(self._at(file.path))

    def write(
        self, file: SsdFile, frames: Mapping[int, bytes], victims: Sequence[SsdFile] = ()
    ) -> None:
        """Remove ``victims``, then let ``file`` appear, whole and on disk.

        Raises:
            DiskFullError: No room.
        """
        self.remove(victims)
        temporary = self._at(f"{file.sub_folder}/{_TEMPORARY}{file.number:x}")
        try:
            self._create(temporary, [frames[stratum] for stratum in sorted(frames)])
            os.rename(temporary, self._at(file.path))
            self._sync_folder(self._at(file.sub_folder))
        except BaseException as error:
            for path in (temporary, self._at(file.path)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            _raise_if_full(error)
            raise

    def shrink(self, file: SsdFile, smaller: SsdFile) -> None:
        """Turn ``file`` into ``smaller``, one of its strata less.

        The name first: a file longer than its name says is cut after a crash, but nothing tells a
        shorter one from a torn one.
        """
        path = self._at(smaller.path)
        os.rename(self._at(file.path), path)
        self._sync_folder(self._at(file.sub_folder))
        if smaller.num_bytes < file.num_bytes:
            _cut(path, smaller.num_bytes)

    def remove(self, files: Sequence[SsdFile], *, durably: bool = False) -> None:
        """Unlink ``files``; those that are gone already are no error."""
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._at(file.path))
        for name in {file.sub_folder for file in files} if durably else ():
            self._sync_folder(self._at(name))

    def touch(self, file: SsdFile) -> None:
        """Set the time of the last use, if that can be done."""
        now_ns = time.time_ns()
        with contextlib.suppress(OSError):
            os.utime(self._at(file.path), ns=(now_ns, now_ns))

    def probe(self, num_bytes: int = 0) -> None:
        """Raise ``OSError`` unless ``num_bytes`` are free and a small file can be written.

        Raises:
            DiskFullError: No room.
        """
        room = os.statvfs(self.path)
        if room.f_bavail * room.f_frsize < num_bytes:
            raise DiskFullError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path = self._at(f"{SUB_FOLDERS[0]}/{_TEMPORARY}probe")
        try:
            self._create(path, [bytes(_PROBE_BYTES)])
        except OSError as error:
            _raise_if_full(error)
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _at(self, path: str) -> str:
        return f"{self.path}/{path}"

    def _create(self, path: str, parts: Sequence[bytes]) -> None:
        create_file(path, parts, fsync=self._fsync)

    def _sync_folder(self, path: str) -> None:
        sync_folder(path, fsync=self._fsync)


def _raise_if_full(error: BaseException) -> None:
    if isinstance(error, OSError) and error.errno in _FULL:
        raise DiskFullError(*error.args) from error


def _cut(path: str, num_bytes: int) -> None:
    """Cut a file and leave its time of use alone."""
    used_ns = os.lstat(path).st_mtime_ns
    os.truncate(path, num_bytes)
    os.utime(path, ns=(used_ns, used_ns))


def _number(file: SsdFile) -> int:
    return file.number


def _age(found: tuple[int, SsdFile]) -> tuple[int, int]:
    return found[0], found[1].number
