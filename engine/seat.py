"""A running sequence's place in the step loop, and what is being done for it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from kvstrata.engine.batch import Span
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.engine.sequence import RunningSequence
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.presets import Method

# Float32 logits (vocab,) to the next token, or None to end. In the loop's thread: it must be quick.
Choose = Callable[[torch.Tensor], int | None]
Sealed = Callable[[list[SealedBlock]], None]


class ParkedError(Exception):
    """A sequence lost its memory to others; open it again and go on. Never leaves the node."""


@dataclass(eq=False)
class Compute:
    """Compute a prompt's tokens up to ``until``, or all of them.

    Attributes:
        until: A multiple of the block size.
        stop: Behind the last token that is computed: ``until``, or where the prompt ends.
        progressed: Told after each chunk, in the loop's thread.
        choose: Given the logits after the prompt; None if they are not wanted.
        done: Resolved at the end.
    """

    until: int
    stop: int
    progressed: Callable[[], None]
    choose: Choose | None = None
    done: "Future[None]" = field(default_factory=Future)


@dataclass(eq=False)
class Generate:
    """Run what is known of a sequence's tokens, then generate.

    Attributes:
        choose: Given the logits after the last token.
        sealed: Given blocks that filled, before the next pass.
        done: Resolved when ``choose`` returned None.
    """

    choose: Choose
    sealed: Sealed
    done: "Future[None]" = field(default_factory=Future)


@dataclass(eq=False)
class Seat:
    """A sequence that has a place, or waits for one.

    Attributes:
        method: Of the sequence.
        token_ids: Its known tokens at the start.
        num_bytes: What it will need of the pool, about.
        tenant: Who is served.
        deadline_unix_s: When nobody waits any more.
        salt: The tenant's secret part of the cache scope.
        num_prompt: How many of ``token_ids`` are the prompt.
        order: Seats in the order in which they were asked for.
        opened: Resolved with the sequence.
        sequence: Once it has a place.
        job: What is being done; None while its owner does something else.
    """

    method: Method
    token_ids: Sequence[int]
    num_bytes: int
    tenant: str
    deadline_unix_s: float
    salt: bytes = field(repr=False)
    num_prompt: int
    order: int
    opened: "Future[RunningSequence]" = field(default_factory=Future)
    sequence: RunningSequence | None = None
    job: Compute | Generate | None = None

    @property
    def is_alone(self) -> bool:
        """Whether it shares no pass, because its memory is its own and not the pool's."""
        return self.sequence is not None and not isinstance(self.sequence.cache, PagedCache)

    def close(self) -> None:
        """Give its memory back to the pool."""
        if self.sequence is not None and not self.is_alone:
            self.cache.close()

    @property
    def cache(self) -> PagedCache:
        """The sequence's cache."""
        assert self.sequence is not None
        assert isinstance(self.sequence.cache, PagedCache)
        return self.sequence.cache

    @property
    def is_generating(self) -> bool:
        """Whether its next pass is over one token, the last known one."""
        sequence = self.sequence
        if sequence is None or not isinstance(self.job, Generate):
            return False
        return sequence.cache.length == len(sequence.token_ids) - 1

    @property
    def num_queued(self) -> int:
        """Tokens of its prompt that are still to be computed."""
        sequence, job = self.sequence, self.job
        return job.stop - sequence.cache.length if sequence and isinstance(job, Compute) else 0

    def next_span(self, limit: int) -> Span | None:
        """Return its next tokens, at most ``limit``; None if too few are allowed.

        A prompt's chunk is never one token: a pass takes single tokens for generated ones, and
        keeps no probes of them.
        """
        assert self.sequence is not None
        job = self.job
        if not isinstance(job, Compute):
            return self.sequence.next_span(limit)
        limit -= job.stop - self.sequence.cache.length - limit == 1
        if limit <= 1:
            return None
        return self.sequence.prompt_span(job.stop, limit, wants_logits=job.choose is not None)

    def fail(self, error: BaseException) -> None:
        """Tell its owner that what was being done ended with an error."""
        pending: Future[Any] = self.opened if self.job is None else self.job.done
        self.job = None
        if not pending.done():
            pending.set_exception(error)
