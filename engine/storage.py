"""The folder on disk where converted models and file hashes are remembered.

Everything in it can be deleted at any time; it is then made again.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return ``$KVSTRATA_CACHE``, else ``$XDG_CACHE_HOME/kvstrata``, else ``~/.cache/kvstrata``."""
    if own := os.environ.get("KVSTRATA_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "kvstrata"
    return Path.home() / ".cache" / "kvstrata"


def profile_folder() -> Path:
    """Return the folder in which profiles made on this machine are kept."""
    return cache_folder() / "profiles"


def write_atomically(path: Path, text: str) -> None:
    """Write a small file that readers see whole or not at all; a failure is only logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error)


def build_folder(path: Path, fill: Callable[[Path], None]) -> bool:
    """Make the folder ``path`` by ``fill``, visible only once complete.

    ``fill`` gets a temporary sibling, which is then renamed. If another process was faster, its
    folder stays and ours is dropped.

    Returns:
        Whether ``path`` exists now; False if the disk refused, which is logged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.tmp-"))
        try:
            fill(temporary)
            if not path.exists():
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error)
    return path.is_dir()
