"""Putting a block together from the messages of a Put stream, within bounds known before."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence

from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.request_check import parse_key, parse_retention
from kvstrata.protos.errors import (
    InvalidRequestError,
    LimitError,
    MalformedMessageError,
    ThrottledError,
)
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.kvstore_pb2 import PutOpen, StratumSize
from kvstrata.protos.retention import Retention

_KNOWN_STRATA = frozenset(Stratum.values()) - {Stratum.STRATUM_UNSPECIFIED}


def declared_sizes(
    key: BlockKey, strata: Sequence[StratumSize], limits: StoreLimits
) -> dict[int, int]:
    """Return the strata that an opening declares, and their bytes.

    Raises:
        InvalidRequestError: None, one of them twice, an unknown or an empty one.
        LimitError: Larger than a block may be.
    """
    declared = [int(size.stratum) for size in strata]
    if not declared or len(set(declared)) < len(declared) or not _KNOWN_STRATA.issuperset(declared):
        raise InvalidRequestError(
            f"a block declares each of its strata once, got {declared[:8]}",
            "name one to three of BASE, MID, FINE, or EXACT alone",
        )
    sizes = {int(size.stratum): int(size.frame_bytes) for size in strata}
    num_bytes = sum(sizes.values())
    if num_bytes > limits.max_block_bytes:
        raise LimitError(
            f"a block of {num_bytes} bytes exceeds the limit of {limits.max_block_bytes}",
            "raise the store's limit or use a smaller preset",
            block_key=key.encode(),
        )
    if 0 in sizes.values():
        raise InvalidRequestError("a frame of 0 bytes was declared")
    return sizes


class BlockAssembly:
    """One block while its bytes arrive. Holds what arrived, never more than was declared.

    A stratum that comes in one message is copied out of it; others are joined once more.
    """

    def __init__(self, opening: PutOpen, limits: StoreLimits) -> None:
        self.key: BlockKey = parse_key(opening.key)
        self.durability: str = opening.durability
        self.retention: Retention | None = None
        if opening.HasField("retention"):
            self.retention = parse_retention(opening.retention, limits.max_keep_ms)
        sizes = declared_sizes(self.key, opening.strata, limits)
        self._pending = deque(sizes.items())
        self.num_bytes = sum(sizes.values())
        self.frames: dict[int, bytes] = {}
        self._parts: list[bytes] = []
        self._arrived = 0

    @property
    def is_complete(self) -> bool:
        """Whether every declared byte has arrived."""
        return not self._pending

    def add(self, data: Iterable[bytes | memoryview]) -> None:
        """Take one message's bytes.

        Raises:
            MalformedMessageError: More bytes than were declared.
        """
        for each in data:
            view = memoryview(each)
            while view:
                if not self._pending:
                    raise MalformedMessageError(
                        f"{len(view)} bytes more than were declared",
                        "declare the frames' true sizes",
                    )
                stratum, size = self._pending[0]
                part = view[: size - self._arrived]
                self._parts.append(bytes(part))
                self._arrived += len(part)
                view = view[len(part) :]
                if self._arrived == size:
                    whole = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                    self.frames[stratum] = whole
                    self._parts, self._arrived = [], 0
                    self._pending.popleft()


class ByteBudget:
    """Bytes that may be in flight at once; further ones wait, first come first served."""

    def __init__(self, num_bytes: int) -> None:
        self._free = num_bytes
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def reserved(self, num_bytes: int) -> AsyncIterator[None]:
        """Hold ``num_bytes``, at most the whole budget, waiting until they are free."""
        await self._acquire(num_bytes)
        try:
            yield
        finally:
            self.give_back(num_bytes)

    def take(self, num_bytes: int) -> None:
        """Hold ``num_bytes`` until they are given back, without waiting.

        Raises:
            ThrottledError: They are not free, or others wait for them.
        """
        if self._queue or num_bytes > self._free:
            raise ThrottledError(
                f"in_flight: no room for {num_bytes} bytes more in flight", "put the block later"
            )
        self._free -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Hold so many bytes less."""
        self._free += num_bytes
        self._wake()

    async def _acquire(self, num_bytes: int) -> None:
        if not self._queue and num_bytes <= self._free:
            self._free -= num_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((num_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free += num_bytes
            self._wake()
            raise

    def _wake(self) -> None:
        while self._queue:
            num_bytes, turn = self._queue[0]
            if turn.done():
                self._queue.popleft()
            elif num_bytes <= self._free:
                self._queue.popleft()
                self._free -= num_bytes
                turn.set_result(None)
            else:
                break
