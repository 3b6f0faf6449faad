"""What runs in the server now, and whether it takes more."""

import asyncio
import contextlib
from collections.abc import Iterator

from kvstrata.protos.errors import DrainingError


class Workload:
    """Counts running calls; while draining, new ones are refused."""

    def __init__(self) -> None:
        self.is_draining = False
        self.in_flight = 0
        self.in_flight_puts = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse_if_draining(self) -> None:
        """Raise ``DrainingError`` while draining."""
        if self.is_draining:
            raise DrainingError("the store is draining", "use another store")

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count one call while it runs; refuses it while draining."""
        self.refuse_if_draining()
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """Count one block while it is being received and committed."""
        self.in_flight_puts += 1
        try:
            yield
        finally:
            self.in_flight_puts -= 1

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls, wait for the running ones, and return whether all finished in time."""
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
