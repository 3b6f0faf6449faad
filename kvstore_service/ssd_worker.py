"""The threads of the ssd tier, and whether its disk works at present."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvstrata.kvstore_service.ssd_folder import DiskFullError
from kvstrata.kvstore_service.ssd_trouble import Trouble
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import CapacityError, KVStrataError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[[], T]
Probe = Callable[[Trouble], Awaitable[Trouble | None]]


class SsdWorker:
    """Runs blocking jobs, reads and changes apart, so that no read waits behind an fsync.

    After a failure nothing runs but ``probe``, every ``probe_s``, until it finds nothing wrong. One
    event loop owns it; refused from the start until ``trouble`` is set to None.

    Args:
        path: The folder, for messages.
        num_threads: Reads, and as many changes again, that run at a time.
        timeout_s: A job that takes longer, queue included, counts as a failure; it runs on.
        probe_s: Pause between probes.
        probe: Returns what is wrong after all, given what was wrong.
    """

    def __init__(
        self, path: str, *, num_threads: int, timeout_s: float, probe_s: float, probe: Probe
    ) -> None:
        self.trouble: Trouble | None = Trouble("not open", "open it first")
        self._path = path
        self._timeout_s = timeout_s
        self._probe_s = probe_s
        self._probe = probe
        self._healing: asyncio.Task[None] | None = None
        self._readers = ThreadPoolExecutor(num_threads, "ssd-read")
        self._changers = ThreadPoolExecutor(num_threads, "ssd-change")
        self._jobs: set[asyncio.Future[Any]] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no job runs, not even one that nobody awaits any more."""
        return not self._jobs

    async def read(self, job: Job[T]) -> T:
        """Run a job that changes nothing.

        Raises:
            TierUnavailableError: The disk does not work, or this job found out that it does not.
        """
        return await self._run(self._readers, job)

    async def change(self, job: Job[T]) -> T:
        """Run a job that changes the folder; errors as for ``read``, and ``DiskFullError``."""
        return await self._run(self._changers, job)

    def start(self, job: Job[T]) -> "asyncio.Future[T]":
        """Run a job whatever the state; it tells its failures to whoever awaits it."""
        return asyncio.shield(self._submit(self._changers, job))

    async def _run(self, pool: ThreadPoolExecutor, job: Job[T]) -> T:
        self.refuse_if_down()
        try:
            submitted = asyncio.shield(self._submit(pool, job))
            return await asyncio.wait_for(submitted, self._timeout_s)
        except DiskFullError:
            raise
        except TimeoutError:
            raise self.note(Trouble.silent(self._path, self._timeout_s)) from None
        except OSError as error:
            raise self.note(Trouble.failed(self._path, error)) from error

    def _submit(self, pool: ThreadPoolExecutor, job: Job[T]) -> "asyncio.Future[T]":
        future = asyncio.get_running_loop().run_in_executor(pool, job)
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)
        return future

    def refuse_if_down(self) -> None:
        """Raise ``TierUnavailableError`` if the disk does not work; a full one does."""
        if self.trouble is not None and not self.trouble.is_full:
            raise self.trouble.error()

    def note(self, trouble: Trouble) -> TierUnavailableError | CapacityError:
        """Refuse from now on what ``trouble`` prevents, and return the error to raise."""
        if self.trouble is None or (self.trouble.is_full and not trouble.is_full):
            self.trouble = trouble
            extra = {"path": str(self._path), "reason": trouble.detail}
            logger.warning("ssd tier fails", extra=extra)
        if self._healing is None or self._healing.done():
            self._healing = asyncio.create_task(self._probe_until_healthy())
        return trouble.error()

    async def _probe_until_healthy(self) -> None:
        while self.trouble is not None:
            await asyncio.sleep(self._probe_s)
            trouble = self.trouble
            try:
                found = await self._probe(trouble)
            except (OSError, KVStrataError) as error:
                found = Trouble.failed(self._path, error)
            if self.trouble is trouble:
                self.trouble = found
        logger.warning("ssd tier works again", extra={"path": str(self._path)})

    async def stop(self) -> None:
        """Refuse everything and wait for what runs, a disk that hangs excepted. Idempotent."""
        self.trouble = Trouble("closed", "open it again")
        if self._healing is not None:
            self._healing.cancel()
            await asyncio.gather(self._healing, return_exceptions=True)
        if self._jobs:
            await asyncio.wait(set(self._jobs), timeout=self._timeout_s)
        for pool in (self._readers, self._changers):
            pool.shutdown(wait=self.is_idle, cancel_futures=True)
