"""A sequence that shares no pass with others: what is done for it, one pass at a time.

Methods with stages see all rows of a prompt, or change their cache after every token, so their
sequences have memory of their own (``SelectingSequence``) and take turns with everybody's pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvstrata.engine.seat import Compute, Generate
from kvstrata.engine.sequence import RunningSequence


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn ran: tokens of a prompt, and whether a token was generated."""

    num_prompt: int
    num_generated: int


def turns(
    sequence: RunningSequence,
    job: Compute | Generate,
    num_prompt: int,
    chunk: Callable[[], int],
) -> Iterator[Turn]:
    """Do a job turn by turn; the caller may do anything else in between.

    Args:
        sequence: Nothing else may be done with it meanwhile.
        job: Its callbacks are called; ``done`` is left to the caller.
        num_prompt: How many of the sequence's tokens are the prompt.
        chunk: Most tokens of a prompt in the next turn; a method that must see the prompt in one
            piece takes more.

    Raises:
        Exception: What ``choose`` or the model raised.
    """
    if isinstance(job, Compute):
        for count in sequence.compute(job.until, chunk):
            job.progressed()
            yield Turn(count, 0)
        return
    held = sequence.cache.length
    known = sequence.token_ids[held:]
    if held < num_prompt:  # the tail in one piece, as ever; what was generated before singly
        pieces = [known[: num_prompt - held], *([token] for token in known[num_prompt - held :])]
    else:
        pieces = [[token] for token in known]
    if not pieces:
        logits = sequence.model.forward_batch([sequence.next_span(1)])[0]
        sequence.fill()
        if (token_id := job.choose(logits)) is not None:
            pieces = [[token_id]]
        yield Turn(0, 1)
    while pieces:
        piece = pieces.pop(0)
        logits, blocks = sequence.extend(piece)
        if blocks:
            job.sealed(blocks)
        if not pieces and (token_id := job.choose(logits)) is not None:
            pieces = [[token_id]]
        yield Turn(len(piece), 0) if len(piece) > 1 else Turn(0, 1)
