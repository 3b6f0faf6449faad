"""What compression costs, measured against the same model on its uncompressed cache.

Two measures, because mean KL alone hides lost facts: the KL divergence of next-token distributions
along a text, and the change of log P(answer) for facts planted in real text.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvstrata.engine.model import Model
from kvstrata.engine.sequence import RunningSequence
from kvstrata.methods.presets import Method
from kvstrata.protos.identity import BLOCK_TOKENS

PLACES = (
    "Paris", "Madrid", "Tokyo", "Cairo", "Oslo", "Lima", "Vienna", "Dublin",
    "Athens", "Berlin", "Warsaw", "Havana", "Lisbon", "Prague", "Geneva", "Boston",
)  # fmt: skip
FACTS_PER_CONTEXT = 8


@dataclass(frozen=True, slots=True)
class Fact:
    """A five-digit number that only the context tells."""

    subject: str
    digits: str

    @property
    def statement(self) -> str:
        """The sentence that is planted."""
        return f"The access code for {self.subject} is {self.digits}."

    @property
    def cue(self) -> str:
        """What is asked, in the words of the statement; a space and the digits follow."""
        return f"\n\nThe access code for {self.subject} is"


@dataclass(frozen=True, slots=True)
class Recall:
    """Log P of a fact's digits on both caches, in nats, and whether greedy decoding gets all."""

    fact: Fact
    reference: float
    compressed: float
    reference_right: bool
    compressed_right: bool


def plant_facts(text: str, seed: int) -> tuple[str, list[Fact]]:
    """Return ``text`` with eight facts planted at even distances between its paragraphs."""
    draw = random.Random(seed)
    subjects = draw.sample(PLACES, FACTS_PER_CONTEXT)
    facts = [Fact(subject, f"{draw.randrange(10_000, 100_000)}") for subject in subjects]
    paragraphs = text.split("\n\n")
    step = max(1, len(paragraphs) // (FACTS_PER_CONTEXT + 1))
    for number, fact in reversed(list(enumerate(facts, start=1))):
        at = min(number * step, len(paragraphs))
        paragraphs[at:at] = [fact.statement]
    return "\n\n".join(paragraphs), facts


def prefilled(model: Model, method: Method, token_ids: Sequence[int]) -> RunningSequence:
    """Return a sequence whose cache holds the full blocks of ``token_ids``, uncompressed.

    The last token is not among them, so that something can be run on top.
    """
    sequence = RunningSequence(model, method, token_ids)
    for _ in sequence.compute((len(token_ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS):
        pass
    return sequence


def compress(sequence: RunningSequence) -> int:
    """Replace every full block by what its stored form decodes to; return the stored bytes."""
    sequence.cache.truncate(sequence.num_blocks_held * BLOCK_TOKENS)
    blocks = sequence.seal(0, sequence.num_blocks_held)
    sequence.settle(blocks)
    return sum(block.num_bytes for block in blocks)


def recall(model: Model, method: Method, text: str, facts: Sequence[Fact]) -> Iterator[Recall]:
    """Yield, fact by fact, what the compressed cache of ``text`` still knows."""
    ids = model.tokenizer.encode(text)
    sequence = prefilled(model, method, ids)
    reference = [_answer(sequence, ids, fact) for fact in facts]
    compress(sequence)
    for fact, (before, right_before) in zip(facts, reference, strict=True):
        after, right_after = _answer(sequence, ids, fact)
        yield Recall(fact, before, after, right_before, right_after)


def _answer(sequence: RunningSequence, ids: Sequence[int], fact: Fact) -> tuple[float, bool]:
    tokenizer = sequence.model.tokenizer
    held = sequence.num_blocks_held * BLOCK_TOKENS
    cue = tokenizer.encode(fact.cue, add_special_tokens=False)
    answer = tokenizer.encode(f" {fact.digits}", add_special_tokens=False)
    sequence.cache.truncate(held)
    logits = sequence.model.forward_all(sequence.cache, [*ids[held:], *cue, *answer])
    rows = logits[-len(answer) - 1 : -1].log_softmax(-1)
    sequence.cache.truncate(held)
    wanted = torch.tensor(answer)
    log_p = rows.gather(-1, wanted[:, None]).sum().item()
    return log_p, bool((rows.argmax(-1) == wanted).all())


def teacher_forced(
    sequence: RunningSequence, ids: Sequence[int], rest: Sequence[int]
) -> torch.Tensor:
    """Return log-probabilities (len(rest), vocab) of each token of ``rest`` in turn."""
    held = sequence.cache.length
    logits = sequence.model.forward_all(sequence.cache, [*ids[held:], *rest])
    sequence.cache.truncate(held)
    return logits[-len(rest) - 1 : -1].log_softmax(-1)


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean KL(reference || other) of log-probabilities (n, vocab), in nats."""
    return (reference.exp() * (reference - other)).sum(-1).mean().item()
