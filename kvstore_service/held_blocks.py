"""What a tier outside this process's memory holds, in order of use, within a bound."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, Protocol, TypeVar

from kvstrata.protos.identity import BlockKey


class Held(Protocol):
    """How one block is held: a file, an object."""

    @property
    def key(self) -> BlockKey:
        """The block."""
        ...


H = TypeVar("H", bound=Held)


class HeldBlocks(Generic[H]):
    """The accounting of a tier. One event loop owns it.

    A reservation counts bytes as taken while a change is under way, so that changes that run at the
    same time keep the bound together.

    Args:
        capacity_bytes: The bound, reservations included.
        size: Bytes that a block takes.
    """

    def __init__(self, capacity_bytes: int, size: Callable[[H], int]) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self._size = size
        self._held: OrderedDict[BlockKey, H] = OrderedDict()
        self._reserved_bytes = 0
        self._num_reservations = 0
        self._freed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._held)

    def held(self) -> list[H]:
        """Return how every block is held, least recently used first."""
        return list(self._held.values())

    def keys(self, limit: int) -> list[BlockKey]:
        """Return at most ``limit`` keys, most recently used first."""
        return list(islice(reversed(self._held), limit))

    def get(self, key: BlockKey) -> H | None:
        """Return how the block is held."""
        return self._held.get(key)

    def size_of(self, key: BlockKey) -> int:
        """Return the bytes that the block takes; 0 for an absent one."""
        found = self._held.get(key)
        return self._size(found) if found is not None else 0

    def use(self, key: BlockKey) -> H | None:
        """Return how the block is held and make it the most recently used."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def replace(self, found: H) -> None:
        """Hold a block like this from now on; a present one keeps its place in the order."""
        self.num_bytes += self._size(found) - self.size_of(found.key)
        self._held[found.key] = found
        self._freed.set()

    def remove(self, key: BlockKey) -> H | None:
        """Forget the block and return how it was held."""
        self.num_bytes -= self.size_of(key)
        self._freed.set()
        return self._held.pop(key, None)

    def surplus(
        self, is_exempt: Callable[[BlockKey], bool], extra_bytes: int = 0
    ) -> tuple[list[H], bool]:
        """Return whom to remove, and whether ``extra_bytes`` more then keep the bound."""
        excess = self.num_bytes + self._reserved_bytes + extra_bytes - self.capacity_bytes
        victims: list[H] = []
        for key, found in self._held.items():
            if excess <= 0:
                break
            if not is_exempt(key):
                victims.append(found)
                excess -= self._size(found)
        return victims, excess <= 0

    async def victims_for(
        self,
        key: BlockKey,
        num_bytes: int,
        is_exempt: Callable[[BlockKey], bool],
        check: Callable[[], None],
    ) -> list[H] | None:
        """Return whom to remove so that the block may take ``num_bytes``; None if it cannot.

        Waits for changes that are under way, each of which may leave room. ``check`` is called
        before each look and may raise.
        """
        while True:
            check()
            victims, fits = self.surplus(is_exempt, num_bytes - self.size_of(key))
            if fits:
                return victims
            if num_bytes > self.capacity_bytes or not self._num_reservations:
                return None
            self._freed.clear()
            await self._freed.wait()

    @contextlib.contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Count ``num_bytes`` as taken while a change is under way."""
        self._reserved_bytes += num_bytes
        self._num_reservations += 1
        try:
            yield
        finally:
            self._reserved_bytes -= num_bytes
            self._num_reservations -= 1
            self._freed.set()
