"""What a crash leaves in a folder besides objects: files that were being written."""

import re
import time
from pathlib import Path

from kvstrata.kvstore_service.object_name import ROOT, ObjectName

_STAGED = re.compile(r"(.+)#[0-9]{1,9}", re.ASCII)


def remove_staged(folder: Path, min_age_s: float) -> int:
    """Remove half-written files of ours that nobody wrote to for ``min_age_s``; return how many.

    The library writes an object to its name, ``#`` and a number, and renames it then; it lists no
    such file, so nobody else would find it.
    """
    removed = 0
    for path in folder.glob(f"{ROOT}/*/*#*"):
        match = _STAGED.fullmatch(path.relative_to(folder).as_posix())
        if match is None or ObjectName.parse(match[1]) is None:
            continue
        try:
            if path.is_symlink() or time.time() - path.stat().st_mtime < min_age_s:
                continue
            path.unlink()
            removed += 1
        except OSError:
            continue  # finished meanwhile, or not ours to remove
    return removed
