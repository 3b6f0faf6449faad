"""Passes over running sequences: who has a place, what the next pass is over, what follows it.

Sequences join and leave between any two passes. A pass takes one token of each sequence that
generates, and as many tokens of prompts as keep it short (``StepTimes``). Tenants take turns by
what they have been served (``FairShare``). When memory ends, a sequence is parked: it gives its
memory back, its owner is told (``ParkedError``), and goes on later from its stored blocks. Who came
first is never parked for who came later, so somebody always gets on.

One thread calls all of this: ``StepLoop`` has it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from kvstrata.engine.batch import Span
from kvstrata.engine.fair_share import FairShare
from kvstrata.engine.kv_arena import ArenaFullError
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.model import Model
from kvstrata.engine.new_sequence import new_sequence
from kvstrata.engine.seat import Compute, Generate, ParkedError, Seat
from kvstrata.engine.sequence import RunningSequence
from kvstrata.engine.step_counts import StepCounts
from kvstrata.engine.step_times import StepTimes
from kvstrata.engine.turns import Turn, turns
from kvstrata.protos.errors import CapacityError, DeadlineError

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Stepper:
    """The sequences of a node.

    Attributes:
        model: What runs.
        pool: Their memory.
        counts: What has happened so far.
        times: What passes take.
    """

    def __init__(self, model: Model, pool: KVPool, max_stall: float) -> None:
        """Start with nobody; see ``StepTimes`` for ``max_stall``."""
        self.model = model
        self.pool = pool
        self.counts = StepCounts()
        self.times = StepTimes(max_stall)
        self._fair = FairShare()
        self._waiting: list[Seat] = []
        self._seats: dict[int, Seat] = {}
        self._turns: dict[int, Iterator[Turn]] = {}
        self._sealing: set[Seat] = set()  # also those that left: their memory is held till the end

    @property
    def has_work(self) -> bool:
        """Whether the next pass is over anything."""
        return any(seat.job is not None for seat in self._seats.values())

    @property
    def num_queued(self) -> int:
        """Tokens of prompts that are still to be computed; any thread may ask."""
        return sum(seat.num_queued for seat in list(self._seats.values()))

    def wait(self, seat: Seat) -> None:
        """Let a sequence wait for a place."""
        self._fair.arrive(seat.tenant)
        self._waiting.append(seat)

    def leave(self, seat: Seat) -> None:
        """Free what a seat holds, wherever it is."""
        if seat in self._waiting:
            self._waiting.remove(seat)
            self._fair.leave(seat.tenant)
        elif seat.sequence is not None and self._seats.pop(id(seat.sequence), None) is seat:
            self._turns.pop(id(seat.sequence), None)
            if seat not in self._sealing:
                seat.close()
            self._fair.leave(seat.tenant)

    def close(self, sequence: RunningSequence) -> None:
        """Free what a sequence holds. Idempotent."""
        seat = self._seats.get(id(sequence))
        if seat is not None:
            seat.job = None
            self.leave(seat)

    def fail_all(self, error: Exception) -> None:
        """Tell every owner an error, and free everything."""
        seats = [*self._waiting, *self._seats.values()]
        for seat in seats:
            seat.fail(error)
        for seat in seats:
            try:
                self.leave(seat)
            except Exception:
                logger.exception("a sequence's memory was not given back")

    def assign(self, sequence: RunningSequence, job: Compute | Generate) -> None:
        """Begin a job; its future tells how it ends."""
        seat = self._seats.get(id(sequence))
        if seat is None:
            job.done.set_exception(ParkedError())
            return
        assert seat.job is None, "one thing at a time"
        if isinstance(job, Compute) and not seat.is_alone:
            sequence.begin_prompt(job.until)
        elif isinstance(job, Generate) and not seat.is_alone:
            seat.num_bytes = 0  # it holds its prompt; from here on it grows page by page
        seat.job = job

    def expire(self) -> None:
        """End what nobody waits for any more."""
        now = time.time()
        for seat in [*self._waiting, *self._seats.values()]:
            if seat.deadline_unix_s <= now and (seat.job is not None or not seat.opened.done()):
                self.counts.add("expired")
                where = "while it waited for memory" if seat.sequence is None else "in mid-run"
                sentence = f"the request's deadline is over {where}"
                remedy = "raise the timeout or ask for fewer tokens"
                self._blame(seat, DeadlineError(sentence, remedy))

    def _by_turn(self, seats: Sequence[Seat]) -> list[Seat]:
        return sorted(seats, key=lambda seat: (self._fair.served(seat.tenant), seat.order))

    def admit(self) -> None:
        """Give places to those who wait, as far as memory goes; whose turn it is first."""
        for seat in self._by_turn(self._waiting):
            wanted = seat.num_bytes + self._growth()
            is_alone = bool(seat.method.pipeline.stages)
            if (self._seats or self._sealing) and self._free_bytes(is_alone) < wanted:
                return
            try:
                sequence = new_sequence(
                    self.model,
                    seat.method,
                    seat.token_ids,
                    salt=seat.salt,
                    num_prompt=seat.num_prompt,
                    pool=self.pool,
                )
            except ArenaFullError:
                return
            except Exception as error:
                self._blame(seat, error)
                continue
            self._waiting.remove(seat)
            seat.sequence = sequence
            self._seats[id(sequence)] = seat
            seat.opened.set_result(sequence)

    def _free_bytes(self, is_alone: bool) -> int:
        """Return what is free for one more, less what those with a place have yet to take of it."""
        expected = sum(
            seat.num_bytes if seat.is_alone else max(0, seat.num_bytes - seat.cache.num_bytes)
            for seat in self._seats.values()
        )
        return self.pool.free_beyond(expected, is_alone=is_alone)

    def _growth(self) -> int:
        """Return the bytes that running sequences will soon need on top."""
        return sum(not seat.is_alone for seat in self._seats.values()) * self.pool.growth_bytes

    def with_room(self, sequence: RunningSequence, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, parking others while it finds no room for the sequence.

        Raises:
            ParkedError: There is no room, not even by parking others; or it was parked itself.
            CapacityError: There is none, although it is alone.
        """
        while True:
            seat = self._seats.get(id(sequence))
            if seat is None:
                raise ParkedError
            try:
                return work()
            except ArenaFullError:
                if self._park_for(seat):
                    continue
                if self._is_only(seat):
                    raise self._too_small(seat) from None
                self._park(seat)
                raise ParkedError from None

    def begin_seal(self, sequence: RunningSequence) -> Seat:
        """Let another thread read a sequence's memory: it stays where it is until ``end_seal``.

        Raises:
            ParkedError: It has none any more.
        """
        seat = self._seats.get(id(sequence))
        if seat is None:
            raise ParkedError
        assert seat.job is None, "one thing at a time"
        self._sealing.add(seat)
        self.pool.arena.hold_still()
        return seat

    def end_seal(self, seat: Seat) -> None:
        """End ``begin_seal``; whoever left meanwhile gives the memory back now."""
        self._sealing.discard(seat)
        self.pool.arena.let_move()
        if self._seats.get(id(seat.sequence)) is not seat:
            seat.close()

    def step(self) -> None:
        """Run one pass, and one of those that share none, if there is anything to run."""
        self._run_pass()
        self._run_alone()

    def _run_alone(self) -> None:
        """Give one of the sequences that share no pass a turn."""
        ready = [seat for seat in self._seats.values() if seat.job is not None and seat.is_alone]
        if not ready:
            return
        seat = self._by_turn(ready)[0]
        sequence, job = seat.sequence, seat.job
        assert sequence is not None
        assert job is not None
        if id(sequence) not in self._turns:
            self._turns[id(sequence)] = turns(sequence, job, seat.num_prompt, self._chunk)
        try:
            turn = next(self._turns[id(sequence)], None)
        except Exception as error:
            self._blame(seat, error)
            return
        if turn is None:
            del self._turns[id(sequence)]
            self._finish(seat, job)
            return
        self.counts.add_pass(turn.num_generated, turn.num_prompt)
        self._fair.charge(seat.tenant, prompt=turn.num_prompt, generated=turn.num_generated)

    def _chunk(self) -> int:
        return self.times.chunk(sum(seat.is_generating for seat in self._seats.values()))

    def _run_pass(self) -> None:
        spans, seats = self._plan()
        if not spans:
            return
        begin = time.perf_counter()
        rows = self._forward(spans, seats)
        num_generated = sum(len(span.token_ids) == 1 for span in spans)
        num_tokens = sum(len(span.token_ids) for span in spans)
        self.counts.add_pass(num_generated, num_tokens - num_generated)
        chosen = iter(rows)
        for span, seat in zip(spans, seats, strict=True):
            if seat.job is None or seat.sequence is None:  # it failed in this pass
                continue
            self._charge(seat, span)
            if span.wants_logits:
                self._choose(seat, next(chosen))
        self.times.add(num_generated, num_tokens - num_generated, time.perf_counter() - begin)
        for seat in seats:
            try:
                self._after(seat)
            except Exception as error:
                self._blame(seat, error)

    def _plan(self) -> tuple[list[Span], list[Seat]]:
        """Return what the next pass is over; room for it is reserved."""
        running = [s for s in self._seats.values() if s.job is not None and not s.is_alone]
        ready = self._by_turn(running)
        generating = [seat for seat in ready if seat.is_generating]
        spans: list[Span] = []
        seats: list[Seat] = []
        for seat in generating:
            if self._reserve(seat, 1) and (span := seat.next_span(1)):
                spans.append(span)
                seats.append(seat)
        budget = self.times.chunk(len(spans))
        others = [seat for seat in ready if not seat.is_generating]
        # What is nearly done comes first within a tenant's turn: a hit runs a few tokens only.
        others.sort(key=lambda seat: isinstance(seat.job, Compute))
        for seat in others:
            if budget <= 0:
                break
            span = seat.next_span(budget) if self._seats.get(id(seat.sequence)) is seat else None
            if span is None or not self._reserve(seat, len(span.token_ids)):
                continue
            spans.append(span)
            seats.append(seat)
            budget -= len(span.token_ids)
        # Parking for a later seat may have taken an earlier one's place.
        kept = [i for i, seat in enumerate(seats) if seat.job is not None]
        return [spans[i] for i in kept], [seats[i] for i in kept]

    def _reserve(self, seat: Seat, num_tokens: int) -> bool:
        """Make room for a seat's next tokens, by parking others if need be."""
        while self._seats.get(id(seat.sequence)) is seat:
            try:
                seat.cache.reserve(num_tokens)
                return True
            except ArenaFullError:
                if self._park_for(seat):
                    continue
                if self._is_only(seat):
                    self._blame(seat, self._too_small(seat))
                elif not self._sealing:
                    self._park(seat)  # else memory is held still: better luck in the next pass
                return False
        return False

    def _is_only(self, seat: Seat) -> bool:
        return len(self._seats) == 1 and not self._sealing - {seat}

    def _too_small(self, seat: Seat) -> CapacityError:
        return CapacityError(
            f"the node's KV memory of {self.pool.arena.capacity_bytes} bytes holds "
            f"{seat.cache.length} tokens of this request and no more",
            "ask for fewer tokens, or give the node a larger pool",
        )

    def _park_for(self, seat: Seat) -> bool:
        """Park whoever has been served most and came last; False if that is ``seat`` itself."""
        others = [
            other
            for other in self._seats.values()
            if other is not seat
            and not other.is_alone
            and other not in self._sealing
            and other.order > seat.order
        ]
        if not others:
            return False
        self._park(max(others, key=lambda s: (self._fair.served(s.tenant), s.order)))
        return True

    def _park(self, seat: Seat) -> None:
        self.counts.add("parked")
        logger.info("parked", extra={"tokens": seat.cache.length})
        seat.fail(ParkedError())
        self.leave(seat)

    def _forward(self, spans: Sequence[Span], seats: Sequence[Seat]) -> list[torch.Tensor]:
        """Run the pass; if it fails, each alone, so that only who is to blame fails."""
        slots = torch.tensor([seat.cache.slot for seat in seats]).to(self.model.device)
        before = self.pool.saliency[slots]
        try:
            return list(self.model.forward_batch(spans))
        except Exception:
            self.counts.add("failed_passes")
            logger.exception("a pass failed; its sequences run one by one")
        self.pool.saliency[slots] = before  # layers that ran have counted
        rows: list[torch.Tensor] = []
        for span, seat in zip(spans, seats, strict=True):
            try:
                rows += self.model.forward_batch([span])
            except Exception as error:
                self._blame(seat, error)
        return rows

    def _blame(self, seat: Seat, error: Exception) -> None:
        seat.fail(error)
        self.leave(seat)

    def _charge(self, seat: Seat, span: Span) -> None:
        count = len(span.token_ids)
        is_generated = isinstance(seat.job, Generate) and count == 1
        self._fair.charge(seat.tenant, **{"generated" if is_generated else "prompt": count})

    def _choose(self, seat: Seat, logits: torch.Tensor) -> None:
        choose = None if seat.job is None else seat.job.choose
        assert choose is not None
        assert seat.sequence is not None
        try:
            if (token_id := choose(logits)) is not None:
                seat.sequence.token_ids.append(token_id)
        except Exception as error:
            self._blame(seat, error)

    def _after(self, seat: Seat) -> None:
        """Seal a block that filled, and tell what is done."""
        job, sequence = seat.job, seat.sequence
        if job is None or sequence is None:
            return
        if isinstance(job, Compute):
            job.progressed()
            if sequence.cache.length >= job.stop:
                self._finish(seat, job)
            return
        blocks = sequence.fill()
        if blocks:
            job.sealed(blocks)
            try:
                self.with_room(sequence, lambda: sequence.settle(blocks))
            except ParkedError:
                return
        if sequence.cache.length == len(sequence.token_ids):
            self._finish(seat, job)

    def _finish(self, seat: Seat, job: Compute | Generate) -> None:
        seat.job = None
        job.done.set_result(None)
