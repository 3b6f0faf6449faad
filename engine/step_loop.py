"""The step loop: one thread that runs passes over all sequences of a node, one after another.

What is async may be called from any event loop; ``Stepper`` does the work, in the thread.
"""

import asyncio
import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from kvstrata.engine.kv_arena import ArenaFullError
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.model import Model
from kvstrata.engine.seat import Choose, Compute, Generate, Sealed, Seat
from kvstrata.engine.sequence import FrameSet, Loaded, RunningSequence
from kvstrata.engine.step_counts import StepCounts
from kvstrata.engine.step_times import StepTimes
from kvstrata.engine.stepper import Stepper
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.presets import Method
from kvstrata.protos.errors import CapacityError, DrainingError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, has_images

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

SEAL_NICE = 10  # of the thread that seals: a tenth of what a pass gets of a processor
MAX_STALL = 2.0  # a pass with a chunk of a prompt takes at most that many times one without
_POLL_S = 0.05  # how often deadlines and waiting seats are looked at while nothing runs


class StepLoop:
    """Runs the sequences of a node.

    Attributes:
        model: What runs.
        pool: Their memory.
    """

    def __init__(self, model: Model, pool: KVPool, *, max_stall: float = MAX_STALL) -> None:
        """Start the thread."""
        self.model = model
        self.pool = pool
        self._stepper = Stepper(model, pool, max_stall)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._num_asked = 0
        self._is_stopping = False
        self._has_ended = False
        self._ending = threading.Lock()
        self._sealer = ThreadPoolExecutor(1, "seal", initializer=_give_way)
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> StepCounts:
        """What has happened so far."""
        return self._stepper.counts

    @property
    def times(self) -> StepTimes:
        """What passes take."""
        return self._stepper.times

    @property
    def num_queued(self) -> int:
        """Tokens of prompts that are still to be computed."""
        return self._stepper.num_queued

    async def call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something short in the loop's thread, between two passes."""
        done: Future[T] = Future()

        def work() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(call(*args, **kwargs))
                except BaseException as error:
                    done.set_exception(error)

        self._post(work)
        return await asyncio.wrap_future(done)

    def next_order(self) -> int:
        """Return the place of a request among all, which it keeps when it is parked."""
        self._num_asked += 1
        return self._num_asked

    @property
    def capacity(self) -> int:
        """Bytes of KV that sequences can hold, all together."""
        return self.pool.arena.capacity_bytes

    def bytes_for(
        self, method: Method, token_ids: Sequence[int], num_prompt: int, num_cached: int
    ) -> int:
        """Return about how many bytes a sequence needs; see ``open``."""
        is_pooled = not method.pipeline.stages
        # What was generated fills block after block; one of them is rows at a time.
        generated = len(token_ids) - num_prompt
        rows = max(num_prompt - num_cached, 0)
        rows += generated if method.skip else min(generated, BLOCK_TOKENS)
        codec = method.codec if is_pooled and not has_images(token_ids) else None
        return self.pool.bytes_for(codec, len(token_ids), len(token_ids) - rows)

    async def open(
        self,
        method: Method,
        token_ids: Sequence[int],
        *,
        num_cached: int = 0,
        tenant: str = "",
        deadline_unix_s: float = float("inf"),
        salt: bytes = b"",
        num_prompt: int | None = None,
        order: int | None = None,
    ) -> RunningSequence:
        """Wait for room, and return a sequence in the pool; ``close`` it in the end.

        Args:
            method: What happens to its KV.
            token_ids: What is known of it.
            num_cached: Tokens of which blocks will be loaded, as far as one knows.
            tenant: Who is served.
            deadline_unix_s: When nobody waits any more; also of all that is done for it.
            salt: The tenant's secret part of the cache scope.
            num_prompt: How many of ``token_ids`` are the prompt; None for all.
            order: Of ``next_order``, for a sequence that was parked; None for a new one.

        Raises:
            CapacityError: The pool is too small for it, even if it were alone.
            DeadlineError: There was no room in time.
            DrainingError: The loop has ended.
        """
        prompt = len(token_ids) if num_prompt is None else num_prompt
        needed, capacity = self.bytes_for(method, token_ids, prompt, num_cached), self.capacity
        if needed > capacity and prompt == len(token_ids):  # else it was running: it is tried
            raise CapacityError(
                f"{len(token_ids)} tokens need about {needed} bytes of KV memory, the node has "
                f"{capacity}",
                "shorten the prompt, or give the node a larger pool",
            )
        seat = Seat(
            method,
            token_ids,
            min(needed, capacity),
            tenant,
            deadline_unix_s,
            salt,
            num_prompt=prompt,
            order=self.next_order() if order is None else order,
        )
        seat.opened.set_running_or_notify_cancel()
        self._post(lambda: self._stepper.wait(seat))
        try:
            return await asyncio.wrap_future(seat.opened)
        except asyncio.CancelledError:
            with contextlib.suppress(DrainingError):
                self._post(lambda: self._stepper.leave(seat))
            raise

    async def load(self, sequence: RunningSequence, blocks: Sequence[FrameSet]) -> Loaded:
        """Load stored blocks; see ``RunningSequence.load``. Told are the seconds of the work alone.

        Raises:
            ParkedError: There is no room for them, not even by parking others.
        """
        first = sequence.num_blocks_held

        def load() -> Loaded:  # again and again, as room is made: what is held stays
            held = sequence.num_blocks_held - first
            begin = time.perf_counter()
            loaded = sequence.load(blocks[held:])
            seconds = time.perf_counter() - begin
            return Loaded(held + loaded.num_blocks, loaded.reason, seconds)

        return await self.call(self._stepper.with_room, sequence, load)

    async def settle(self, sequence: RunningSequence, blocks: Sequence[SealedBlock]) -> None:
        """Attend to sealed blocks as their readers will; see ``RunningSequence.settle``.

        Raises:
            ParkedError: There is no room for them, not even by parking others.
        """
        await self.call(self._stepper.with_room, sequence, lambda: sequence.settle(blocks))

    async def refine(
        self,
        sequence: RunningSequence,
        method: Method,
        first: int,
        blocks: Sequence[FrameSet],
        added: Sequence[Stratum],
    ) -> Loaded:
        """Replace held blocks by finer readings, between two passes; see ``RunningSequence``.

        Nobody is parked for it: where there is no room, nothing is refined, for "no_room".

        Raises:
            ParkedError: It lost its memory.
        """

        def refine() -> Loaded:
            try:
                return sequence.refine(method, first, blocks, added)
            except ArenaFullError:
                return Loaded(0, "no_room")

        return await self.call(self._stepper.with_room, sequence, refine)

    async def truncate(self, sequence: RunningSequence, length: int) -> None:
        """Forget all tokens from position ``length`` on.

        Raises:
            ParkedError: It lost its memory.
        """
        await self.call(self._stepper.with_room, sequence, lambda: sequence.cache.truncate(length))

    async def compute(
        self, sequence: RunningSequence, until: int, choose: Choose | None = None
    ) -> AsyncIterator[None]:
        """Compute a prompt's tokens up to ``until``; yields after each chunk.

        Args:
            sequence: Holds less than that.
            until: The end of a block; saliency is that of the tokens before it.
            choose: For a sequence of the pool: all that is known is computed, and the next token
                chosen, before the blocks are sealed. Not called for others.

        Raises:
            ParkedError: It lost its memory.
            DeadlineError: Its deadline passed.
        """
        if until <= sequence.cache.length:
            return
        progress: asyncio.Queue[None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        stop = len(sequence.token_ids) if choose else until
        job = Compute(until, stop, lambda: _tell(loop, progress.put_nowait, None), choose)
        job.done.set_running_or_notify_cancel()
        await self.call(self._stepper.assign, sequence, job)
        done = asyncio.ensure_future(asyncio.wrap_future(job.done))
        chunk: asyncio.Future[None] | None = None
        try:
            while not done.done():
                chunk = asyncio.ensure_future(progress.get())
                await asyncio.wait({chunk, done}, return_when=asyncio.FIRST_COMPLETED)
                if chunk.done():
                    yield
            await done
        finally:
            done.cancel()
            if chunk is not None:
                chunk.cancel()

    async def seal(self, sequence: RunningSequence, first: int, last: int) -> list[SealedBlock]:
        """Return blocks of a prompt sealed, see ``RunningSequence.seal``; passes go on meanwhile.

        Until it returns, nothing else may be done with the sequence.

        Raises:
            ParkedError: It lost its memory.
        """
        sealing = await self.call(self._begin_seal, sequence, first, last)
        return await asyncio.wrap_future(sealing)

    async def generate(self, sequence: RunningSequence, choose: Choose, sealed: Sealed) -> None:
        """Run what is known of the sequence, then generate until ``choose`` returns None.

        Both callbacks run in the loop's thread and must be quick.

        Raises:
            ParkedError: It lost its memory. The tokens that were chosen are known.
            DeadlineError: Its deadline passed.
            Exception: What ``choose`` or the model raised for it.
        """
        job = Generate(choose, sealed)
        job.done.set_running_or_notify_cancel()
        await self.call(self._stepper.assign, sequence, job)
        await asyncio.wrap_future(job.done)

    async def close(self, sequence: RunningSequence) -> None:
        """Free everything of a sequence, whatever is being done for it. Idempotent."""
        with contextlib.suppress(DrainingError):
            await asyncio.shield(self.call(self._stepper.close, sequence))

    def stop(self) -> None:
        """End the thread; whoever waits is told. Idempotent."""
        self._sealer.shutdown(wait=True)
        with contextlib.suppress(DrainingError):
            self._post(self._stop)
        self._thread.join()

    # What follows runs in the loop's thread.

    def _begin_seal(
        self, sequence: RunningSequence, first: int, last: int
    ) -> Future[list[SealedBlock]]:
        seat = self._stepper.begin_seal(sequence)
        try:
            sealing = self._sealer.submit(sequence.seal, first, last)
        except RuntimeError:  # it was shut down
            self._stepper.end_seal(seat)
            raise _draining() from None
        sealing.add_done_callback(lambda _: self._post(lambda: self._stepper.end_seal(seat)))
        return sealing

    def _post(self, work: Callable[[], None]) -> None:
        with self._ending:
            if self._has_ended:
                raise _draining()
            self._inbox.put(work)

    def _run(self) -> None:
        stepper = self._stepper
        while not self._is_stopping:
            try:
                self._drain(wait_s=0.0 if stepper.has_work else _POLL_S)
                stepper.expire()
                stepper.admit()
                stepper.step()
            except Exception as error:
                # A defect of ours: nobody may wait for ever, nor may later requests pay for it.
                stepper.counts.add("failed_steps")
                logger.exception("a step failed; all sequences of the node end")
                stepper.fail_all(error)
        with self._ending:
            self._has_ended = True
        self._drain(wait_s=0.0)
        self._stop()

    def _drain(self, wait_s: float) -> None:
        try:
            work = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                work()
                work = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _stop(self) -> None:
        self._is_stopping = True
        self._stepper.fail_all(_draining())


def _give_way() -> None:
    """Let this thread, and those that it starts, have what passes leave of the processors."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        nice = os.getpriority(os.PRIO_PROCESS, 0) + SEAL_NICE
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(nice, 19))


def _draining() -> DrainingError:
    return DrainingError("the node is shutting down", "send it again")


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[T], object], value: T) -> None:
    """Call something in the event loop; does nothing when that has ended."""
    try:
        loop.call_soon_threadsafe(call, value)
    except RuntimeError:
        return
