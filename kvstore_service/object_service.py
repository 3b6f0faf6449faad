"""The way to the object store: requests bounded in time; a breaker so that a dead one is cheap."""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypedDict, cast

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, ObjectStore, from_url

from kvstrata.kvstore_service.object_folder import remove_staged
from kvstrata.kvstore_service.object_name import ROOT
from kvstrata.kvstore_service.object_url import allows_http, check_url, folder_of_url
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import CapacityError, ConfigurationError

logger = logging.getLogger(__name__)

PROBE_PATH = f"{ROOT}.probe"
_FAILURES = (BaseError, OSError, ValueError)
_REFUSALS = (PermissionDeniedError, UnauthenticatedError, PermissionError)
_CALM = 10  # so many times rarer are probes for leave to write
_BULK = 1000
_STAGED_AGE_S = 3600.0  # longer than any write takes
_MIN_BYTES_PER_S = 4 << 20


class Listed(TypedDict):
    """What a listing says about one object, as far as it is used here."""

    path: str
    size: int


class ObjectService:
    """Requests that end within ``timeout_s``, or at once while the service is down.

    Transfers get a second more for each 4 MiB. After a failure nothing is sent but a probe every
    ``probe_s``, which writes and lists; recovery needs nobody's help. One event loop owns it.

    Args:
        url: ``s3://``, ``gs://``, ``az://``, ``file://`` or ``memory://``; credentials are the
            environment's, and reach no message and no log.
        timeout_s: Time limit of one request, the library's retries included.
        max_requests: How many run at a time; further ones queue.
        probe_s: Pause between probes while the service is down.

    Attributes:
        url: Where it is.
        detail: Why the service is taken for down; empty when it is not.
        read_only: Why nothing is written, while reads go on; empty when all is well.
        is_up: Set while requests are let through.
        went_down: Set at each failure, for whoever clears it.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 10.0,
        max_requests: int = 16,
        probe_s: float = 1.0,
    ) -> None:
        self.url = check_url(url)
        self.detail = ""
        self.read_only = ""
        self.is_up = asyncio.Event()
        self.is_up.set()
        self.went_down = asyncio.Event()
        self._timeout_s = timeout_s
        self._probe_s = probe_s
        self._slots = asyncio.Semaphore(max_requests)
        self._healing: asyncio.Task[None] | None = None
        self._folder = folder_of_url(self.url)
        try:
            self._store = _open(self.url, self._folder, timeout_s)
        except _FAILURES as error:
            raise self._unusable(error) from None

    async def check(self) -> None:
        """Raise ``ConfigurationError`` unless the service lists objects now.

        One that takes none is used all the same, for reading.
        """
        try:
            await self._probe()
        except _FAILURES as error:
            raise self._unusable(error) from None
        if self.read_only:
            self._heal()

    def _unusable(self, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"object store {self.url} cannot be used: {_reason(error)}",
            "check that it exists, and endpoint, region and credentials in the environment",
        )

    async def read(self, path: str, places: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Return the bytes at each offset and size; shorter if it ends before, None if not there.

        A failure that may be the object's fault does not count as the service's.

        Raises:
            ReadFailedError: The read failed otherwise.
            TierUnavailableError: The service is down, or was silent.
        """
        runs = _runs(places)
        async with self._request(sum(end - start for start, end in runs)):
            # get_ranges, which would do this by itself, panics on an object that was cut
            get = self._store.get_range_async
            try:
                found = await asyncio.gather(*(get(path, start=a, end=b) for a, b in runs))
            except FileNotFoundError:
                return None
            except BaseError as error:
                raise ReadFailedError(_reason(error)) from None
        parts: dict[tuple[int, int], bytes] = {}
        for (start, end), run in zip(runs, found, strict=True):
            content = memoryview(run)
            for offset, size in places:
                if start <= offset < end:
                    parts[offset, size] = bytes(content[offset - start :][:size])
        return [parts[place] for place in places]

    async def write(self, path: str, content: bytes) -> None:
        """Store an object; it is there whole or not at all, after a failure perhaps later.

        Raises:
            CapacityError: The service takes no objects from us.
            TierUnavailableError: It is down.
        """
        self.refuse_if_read_only()
        async with self._request(len(content)):
            try:
                await self._store.put_async(path, content, use_multipart=False)
            except _REFUSALS as error:
                self._note_read_only(error)
        self.refuse_if_read_only()

    async def remove(self, paths: Sequence[str]) -> None:
        """Delete objects; absent ones are no error.

        Raises:
            ReadOnlyError: The service lets us delete nothing.
            TierUnavailableError: It is down.
        """
        if self.read_only:
            raise self._read_only_error()
        for first in range(0, len(paths), _BULK):
            chunk = list(paths[first : first + _BULK])
            async with self._request():
                try:
                    with contextlib.suppress(FileNotFoundError):
                        await self._store.delete_async(chunk)
                        continue
                except _REFUSALS as error:
                    self._note_read_only(error)
                    raise self._read_only_error() from None
            await asyncio.gather(*map(self._remove_one, chunk))

    async def _remove_one(self, path: str) -> None:
        async with self._request():
            with contextlib.suppress(FileNotFoundError):
                await self._store.delete_async(path)

    async def remove_staged(self) -> int:
        """Remove what crashed writers left half-written; return how many. Folders only."""
        if self._folder is None or self.read_only:
            return 0
        return await asyncio.to_thread(remove_staged, self._folder, _STAGED_AGE_S)

    async def list(self, folder: str) -> AsyncGenerator[list[Listed], None]:
        """Yield what is under ``folder``, page by page; each page is a request."""
        pages = self._store.list(folder, chunk_size=_BULK).__aiter__()
        while True:
            async with self._request():
                try:
                    page = await anext(pages)
                except StopAsyncIteration:
                    return
            yield cast("list[Listed]", page)

    @contextlib.asynccontextmanager
    async def _request(self, num_bytes: int = 0) -> AsyncIterator[None]:
        self.refuse_if_down()
        async with self._slots:
            self.refuse_if_down()
            try:
                async with asyncio.timeout(self._timeout_s + num_bytes / _MIN_BYTES_PER_S):
                    yield
            except _FAILURES as error:
                raise self.mark_down(_reason(error)) from None

    def refuse_if_read_only(self) -> None:
        """Raise ``CapacityError`` while the service takes no objects from us."""
        if self.read_only:
            raise CapacityError(
                f"object store takes no objects: {self.read_only}",
                f"allow writing and deleting at {self.url}",
                tier="object",
            )

    def _read_only_error(self) -> "ReadOnlyError":
        return ReadOnlyError(
            f"object store lets nothing be deleted: {self.read_only}",
            f"allow writing and deleting at {self.url}",
            tier="object",
        )

    def _note_read_only(self, error: Exception) -> None:
        if not self.read_only:
            extra = {"url": self.url, "reason": _reason(error)}
            logger.warning("object store is read-only", extra=extra)
        self.read_only = _reason(error)
        self._heal()

    def _heal(self) -> None:
        if self._healing is None or self._healing.done():
            self._healing = asyncio.create_task(self._probe_until_up())

    def refuse_if_down(self) -> None:
        """Raise ``TierUnavailableError`` while the service is down."""
        if self.detail:
            raise self._down_error()

    def _down_error(self) -> TierUnavailableError:
        return TierUnavailableError(
            f"object store does not answer: {self.detail}", f"check {self.url}", tier="object"
        )

    def mark_down(self, reason: str) -> TierUnavailableError:
        """Refuse everything until a probe succeeds, and return the error to raise."""
        if not self.detail:
            extra = {"url": self.url, "reason": reason}
            logger.warning("object store is down", extra=extra)
        self.detail = reason
        self.is_up.clear()
        self.went_down.set()
        self._heal()
        return self._down_error()

    async def _probe_until_up(self) -> None:
        """Probe until the service is up and takes objects; reads go on once it is up."""
        while self.detail or self.read_only:
            await asyncio.sleep(self._probe_s if self.detail else self._probe_s * _CALM)
            was_down, was_read_only = bool(self.detail), bool(self.read_only)
            try:
                await self._probe()
            except _FAILURES as error:
                if was_down:
                    self.detail = _reason(error)
                continue
            self.detail = ""
            if was_down:
                self._tell_up()
            if was_read_only and not self.read_only:
                logger.warning("object store takes objects again", extra={"url": self.url})

    def _tell_up(self) -> None:
        self.is_up.set()
        logger.warning("object store is up again", extra={"url": self.url})

    async def _probe(self) -> None:
        """Write and list; that writing is refused is noted and no failure."""
        async with asyncio.timeout(self._timeout_s):
            refusal: Exception | None = None
            try:
                await self._store.put_async(PROBE_PATH, b"kvstrata", use_multipart=False)
            except _REFUSALS as error:
                refusal = error
            async for _ in self._store.list(PROBE_PATH):
                break
            self.read_only = _reason(refusal) if refusal else ""

    async def close(self) -> None:
        """Refuse everything from now on. Idempotent."""
        self.detail = "closed"
        if self._healing is not None:
            self._healing.cancel()
            await asyncio.gather(self._healing, return_exceptions=True)


class ReadOnlyError(TierUnavailableError):
    """What was to be deleted is still there: the service lets us only read."""


class ReadFailedError(Exception):
    """A read that failed although the service answered: its object may be cut."""


def _runs(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return start and end of each run of bytes without a gap that ``places`` cover."""
    runs: list[tuple[int, int]] = []
    for offset, size in sorted(places):
        if runs and runs[-1][1] == offset:
            runs[-1] = (runs[-1][0], offset + size)
        else:
            runs.append((offset, offset + size))
    return runs


def _open(url: str, folder: Path | None, timeout_s: float) -> ObjectStore:
    if folder is not None:
        return LocalStore(folder, mkdir=True, automatic_cleanup=True)
    if url.startswith("memory://"):
        return from_url(url)
    return from_url(
        url,
        client_options={
            **({"allow_http": True} if allows_http() else {}),
            "connect_timeout": timedelta(seconds=timeout_s / 2),
            "timeout": timedelta(hours=1),  # the request's own limit comes first
        },
        retry_config={
            "max_retries": 3,
            "retry_timeout": timedelta(seconds=timeout_s),
            "backoff": {
                "init_backoff": timedelta(milliseconds=50),
                "max_backoff": timedelta(seconds=1),
            },
        },
    )


def _reason(error: Exception) -> str:
    """Return the kind of failure and nothing that could quote a secret."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    status = re.search(r"status code: (\d{3}[A-Za-z ]{0,32})", str(error))
    kind = type(error).__name__
    return f"{kind}: {status[1].strip()}" if status else kind
