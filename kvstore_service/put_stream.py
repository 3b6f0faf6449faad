"""Putting a block together from the messages of a Put stream, within bounds known before."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.request_check import parse_key
from kvstrata.protos.errors import InvalidRequestError, LimitError, MalformedMessageError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.kvstore_pb2 import PutOpen

_KNOWN_STRATA = frozenset(Stratum.values()) - {Stratum.STRATUM_UNSPECIFIED}


class BlockAssembly:
    """One block while its bytes arrive. Holds what arrived, never more than was declared.

    A message that is exactly one stratum is kept as it came; anything else is joined once.
    """

    def __init__(self, opening: PutOpen, limits: StoreLimits) -> None:
        self.key: BlockKey = parse_key(opening.key)
        self.durability: str = opening.durability
        self._pending = deque((int(s.stratum), int(s.frame_bytes)) for s in opening.strata)
        self.num_bytes = sum(size for _, size in self._pending)
        self.frames: dict[int, bytes] = {}
        self._parts: list[bytes] = []
        self._arrived = 0
        self._check(limits)

    def _check(self, limits: StoreLimits) -> None:
        declared = [stratum for stratum, _ in self._pending]
        if (
            not declared
            or len(set(declared)) < len(declared)
            or not _KNOWN_STRATA.issuperset(declared)
        ):
            raise InvalidRequestError(
                f"a block declares each of its strata once, got {declared[:8]}",
                "name one to three of BASE, MID, FINE, or EXACT alone",
            )
        if self.num_bytes > limits.max_block_bytes:
            raise LimitError(
                f"a block of {self.num_bytes} bytes exceeds the limit of {limits.max_block_bytes}",
                "raise the store's limit or use a smaller preset",
                block_key=self.key.encode(),
            )
        if any(size == 0 for _, size in self._pending):
            raise InvalidRequestError("a frame of 0 bytes was declared")

    @property
    def is_complete(self) -> bool:
        """Whether every declared byte has arrived."""
        return not self._pending

    def add(self, data: bytes) -> None:
        """Take one message's bytes.

        Raises:
            MalformedMessageError: More bytes than were declared, or none.
        """
        if not data:
            raise MalformedMessageError("a data message without bytes")
        view = memoryview(data)
        while view:
            if not self._pending:
                raise MalformedMessageError(
                    f"{len(view)} bytes more than were declared", "declare the frames' true sizes"
                )
            stratum, size = self._pending[0]
            part = view[: size - self._arrived]
            whole = data if len(part) == len(data) else bytes(part)
            self._parts.append(whole)
            self._arrived += len(part)
            view = view[len(part) :]
            if self._arrived == size:
                self.frames[stratum] = (
                    self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                )
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
