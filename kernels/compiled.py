"""Numba kernels whose machine code is kept on disk, and made anew when it is too old.

Numba itself looks at the time stamp of a kernel's own file. But a kernel has code and constants of
other files compiled in, and files that are unpacked or copied may keep their times. So what counts
here is what the kernel's file says, every file of kernels that it imports, and what those import.
"""

# mypy: allow-subclassing-any

import hashlib
import re
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from numba import njit, types
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

# Without reference counts: around every inner call they would spill all vectors. So a function that
# is compiled in gets its memory from the caller.
VECTORS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
_INNER: dict[str, Any] = VECTORS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inlined = njit(nogil=True, forceinline=True, **_INNER)
called = njit(nogil=True, **_INNER)  # called, not copied: where several places need it

_SIGNATURE = types.void(types.int64)
_IMPORT = re.compile(r"^ *from kvstrata\.kernels\.(\w+) import", re.MULTILINE)


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator: compiled at the first call, for other threads to run meanwhile.

    Args:
        options: As of ``numba.njit``.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True, **options)(function)
        dispatcher._cache = _KernelCache(function)
        return dispatcher

    return compiled


class _Stats(NamedTuple):
    """As of a Numba function: how often code came from disk, and how often it was compiled."""

    cache_hits: dict[Any, int]
    cache_misses: dict[Any, int]


class CFunction:
    """A C function ``void f(int64_t)``, compiled when its address is first asked for."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        """Wrap what compiled code can be made of; it must not raise."""
        self._function = function
        self.__module__ = function.__module__
        self.stats = _Stats({}, {})

    @cached_property
    def address(self) -> int:
        """Where it is; it stays there."""
        return int(self._compiled.address)

    @cached_property
    def _compiled(self) -> Any:
        found: Any = CFunc(
            self._function, sigutils.normalize_signature(_SIGNATURE), {}, dict(VECTORS)
        )
        found._cache = _KernelCache(self._function)
        found.compile()
        hits = int(found.cache_hits)
        self.stats = _Stats({_SIGNATURE: hits}, {_SIGNATURE: 1 - hits})
        return found


c_function = CFunction


class _KernelCache(FunctionCache):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _KernelFiles(
            self.cache_path,
            self._impl.filename_base,
            digest_of(Path(function.__code__.co_filename)),
        )


class _KernelFiles(IndexDataCacheFile):
    def _load_index(self) -> dict[Any, Any]:
        """Return what is on disk; nothing, if it names types that another release had."""
        try:
            found: dict[Any, Any] = super()._load_index()
        except (AttributeError, ImportError):
            return {}
        return found


@cache
def digest_of(path: Path) -> str:
    """Return a digest of a file of this room and of what it has compiled in from here."""
    found = hashlib.blake2b(digest_size=16)
    for each in sorted(_sources(path)):
        found.update(each.name.encode() + b"\0" + each.read_bytes())
    return found.hexdigest()


def _sources(path: Path) -> set[Path]:
    """Return a file, the files of kernels that it imports at any remove, and what those import."""
    found: set[Path] = set()
    left = [path]
    while left:
        each = left.pop()
        if each in found or not each.is_file():
            continue
        found.add(each)
        if each.stem.endswith("_numba"):
            names = _IMPORT.findall(each.read_text("utf-8"))
            left += [each.with_name(f"{name}.py") for name in names]
    return found
