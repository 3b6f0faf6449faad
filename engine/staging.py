"""Copies between host memory and a GPU: through pinned buffers, on streams of their own.

Bytes that came from the store go to a pinned buffer, from where the GPU fetches them while it
computes: block i + 1 is copied while block i is decoded. What is sealed comes back the same way.
In host memory there is nothing to stage, and none of this is made.

Three orders hold, by events that the GPU's streams wait for, never by waiting for the GPU:

- a copy begins behind all that was launched before its target was handed out, because whoever had
  the memory before may still be read;
- what is launched after a copy was asked for begins behind it;
- a buffer is written again when its copy has ended. This alone the host waits for, and not longer
  than ``timeout_s``: it polls the event, because ``Event.synchronize`` has no bound.

Tensors are held until their copy has ended, or used next on the stream that waits for it, so that
torch's allocator need not be told of the other streams (``record_stream``).
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

logger = logging.getLogger(__name__)

NUM_BUFFERS = 4
BUFFER_BYTES = 4 << 20  # a block of `balanced` of Llama-3-8B takes .8 MB
MAX_PINNED_BYTES = 1 << 30  # in one direction: the system cannot use this memory otherwise
TIMEOUT_S = 10.0  # a copy of a buffer takes a millisecond: the GPU is lost, or hopelessly behind
_POLL_S = 50e-6


class StagingLateError(Exception):
    """A copy has not ended in time; never leaves the node: what it was for is computed anew."""


def wait_for(event: Any, timeout_s: float) -> None:
    """Return when an event, of ``torch.cuda``, has passed, or was never recorded.

    Raises:
        StagingLateError: It has not in time.
    """
    end = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() >= end:
            raise StagingLateError(f"a GPU has not done its work within {timeout_s} s")
        time.sleep(_POLL_S)


@dataclass(eq=False)
class _Buffer:
    memory: torch.Tensor
    copied: Any  # torch.cuda.Event


class _Lane:
    """One direction: a ring of buffers, and the stream that copies."""

    def __init__(self, device: torch.device, num_buffers: int, buffer_bytes: int) -> None:
        self.stream: Any = torch.cuda.Stream(device)
        self.lock = threading.Lock()
        self._ring = deque(
            _Buffer(_pinned(buffer_bytes), torch.cuda.Event()) for _ in range(num_buffers)
        )

    def __len__(self) -> int:
        return len(self._ring)

    def next(self, timeout_s: float) -> _Buffer:
        """Return the buffer that was used longest ago, once its copy has ended."""
        wait_for(self._ring[0].copied, timeout_s)
        self._ring.rotate(-1)
        return self._ring[-1]

    def copy(self, target: torch.Tensor, source: torch.Tensor, buffer: _Buffer) -> None:
        """Launch a copy from a buffer or into it."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            buffer.copied.record(self.stream)


class Staging:
    """Copies to and from one GPU. ``read`` may be called from any thread, the rest from one.

    Attributes:
        counts: ``staged_blocks``, ``staged_bytes``, ``read_bytes``; and why something had to be
            computed anew: ``late_blocks``, ``late_reads``.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_buffers: int = NUM_BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Pin ``num_buffers`` of ``buffer_bytes`` for each direction, and no more ever.

        Raises:
            ValueError: No buffer, or more than ``MAX_PINNED_BYTES`` of them.
        """
        if num_buffers < 1 or buffer_bytes < 1 or num_buffers * buffer_bytes > MAX_PINNED_BYTES:
            raise ValueError(
                f"{num_buffers} buffers of {buffer_bytes} bytes cannot be pinned: at least one, "
                f"and at most {MAX_PINNED_BYTES} bytes in all"
            )
        self._device = device
        self._timeout_s = timeout_s
        self._size = buffer_bytes
        self._in = _Lane(device, num_buffers, buffer_bytes)
        self._out = _Lane(device, num_buffers, buffer_bytes)
        self.counts: Counter[str] = Counter()

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """Return what stages for a device; None where it is the processor's own memory."""
        return cls(device) if device.type == "cuda" else None

    def write(
        self, targets: Sequence[torch.Tensor], sources: Iterable[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """Copy blocks; yields each target once all that is launched from then on sees its block.

        The next block is copied while the GPU runs what the caller launched for this one. All
        targets must be there before the first is copied, and must not be moved meanwhile. One at a
        time.

        Args:
            targets: uint8, one dimension, on the GPU.
            sources: uint8, in host memory, as long as their targets. Asked for one by one, while
                what came before is copied.

        Raises:
            StagingLateError: An earlier copy has not ended in time. What was not yielded means
                nothing; copies that were launched end before whatever is launched next.
        """
        computing = torch.cuda.current_stream(self._device)
        self._in.stream.wait_stream(computing)  # whose memory this was may still be read
        for target, source in zip(targets, sources, strict=True):
            for to, part in zip(target.split(self._size), source.split(self._size), strict=True):
                try:
                    buffer = self._in.next(self._timeout_s)
                except StagingLateError:
                    self._count_late("late_blocks")
                    raise
                staged = buffer.memory[: len(part)].copy_(part)
                self._in.copy(to, staged, buffer)
                computing.wait_event(buffer.copied)
            self.counts["staged_blocks"] += 1
            self.counts["staged_bytes"] += len(target)
            yield target

    def read(self, source: torch.Tensor) -> torch.Tensor:
        """Return a copy in host memory; what was launched before is seen, later work goes on.

        Raises:
            StagingLateError: It, or another thread's, has not ended in time.
        """
        own = source.contiguous()
        flat = own.view(-1).view(torch.uint8)
        found = torch.empty(source.shape, dtype=source.dtype)
        into = found.view(-1).view(torch.uint8)
        lane = self._out
        if not lane.lock.acquire(timeout=self._timeout_s):
            self._count_late("late_reads")
            raise StagingLateError(f"another copy has not ended within {self._timeout_s} s")
        try:
            lane.stream.wait_stream(torch.cuda.current_stream(self._device))
            coming: deque[tuple[_Buffer, torch.Tensor]] = deque()
            for part, to in zip(flat.split(self._size), into.split(self._size), strict=True):
                if len(coming) == len(lane):
                    self._take(*coming.popleft())
                buffer = lane.next(self._timeout_s)
                lane.copy(buffer.memory[: len(part)], part, buffer)
                coming.append((buffer, to))
            while coming:
                self._take(*coming.popleft())
        except StagingLateError:
            self._count_late("late_reads")
            raise
        finally:
            lane.lock.release()
        self.counts["read_bytes"] += len(into)
        return found

    def _take(self, buffer: _Buffer, into: torch.Tensor) -> None:
        wait_for(buffer.copied, self._timeout_s)
        into.copy_(buffer.memory[: len(into)])

    def _count_late(self, reason: str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] == 1:  # a GPU that is lost is late every time
            logger.warning("a copy has not ended in time", extra={"reason": reason})


def to_host(tensor: torch.Tensor, staging: Staging | None) -> torch.Tensor:
    """Return a tensor in host memory: itself, if it is there and nothing is staged.

    Raises:
        StagingLateError: As ``Staging.read``.
    """
    return tensor.cpu() if staging is None else staging.read(tensor)


def _pinned(num_bytes: int) -> torch.Tensor:
    """Return host memory that the GPU reads by itself; or plain one, where none can be pinned."""
    with torch.inference_mode(False):
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning("no memory can be pinned", extra={"error": str(error)})
            return torch.empty(num_bytes, dtype=torch.uint8)
