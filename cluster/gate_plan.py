"""What gates are trained on, and how long: stretches of text, or prompts and their answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstrata.engine.model import Model
from kvstrata.methods.attention_gate import LOSS_FORMS, LossForm
from kvstrata.protos.errors import InvalidRequestError, LimitError
from kvstrata.protos.identity import BLOCK_TOKENS

HELD_OUT = 0.1  # the end of every text is kept from training and measured on


@dataclass(frozen=True, slots=True)
class GatePlan:
    """What to train, on what, and how long.

    Attributes:
        length: Tokens of a stretch of text.
        batch: Stretches for one update.
        num_steps: Updates.
        learning_rate: At its highest.
        keep_rate: Share of tokens to keep.
        loss: Form of what keeping more costs.
        weight: Of that, against the text's loss.
        warm_steps: Updates before, towards what later tokens attend to; 0 for none.
        num_cached: Stretches of text whose activations these run on.
        warm_rate: Their learning rate.
        pooled: Count the mean of all layers, so that some may keep more than others; else each
            layer's own.
        gate_heads: Heads of the reduced attention.
        gate_dim: Their width.
        window: Tokens that it sees together; 0 for the whole stretch.
        bidirectional: Whether it sees what follows. Then the first half of a stretch is a prompt
            whose tokens are gated, and only the second half's loss counts.
        rank: Of an adapter that learns with the gates; 0 leaves the base as it is.
        num_measured: Stretches of held-out text to measure on.
        seed: Of everything drawn.
    """

    length: int = 512
    batch: int = 1
    num_steps: int = 60
    learning_rate: float = 2e-4
    keep_rate: float = 0.5
    loss: LossForm = "hinge"
    weight: float = 4.0
    warm_steps: int = 400
    num_cached: int = 24
    warm_rate: float = 3e-3
    pooled: bool = True
    gate_heads: int = 2
    gate_dim: int = 16
    window: int = BLOCK_TOKENS
    bidirectional: bool = False
    rank: int = 0
    num_measured: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep_rate <= 1:
            raise LimitError(f"keep_rate must be in (0, 1], not {self.keep_rate}", "0.5 is usual")
        if self.loss not in LOSS_FORMS:
            raise LimitError(f"no loss {self.loss!r}", f"use one of {', '.join(LOSS_FORMS)}")
        if self.window < 0 or (self.window and BLOCK_TOKENS % self.window):
            raise LimitError(
                f"window is {self.window}", f"use a divisor of {BLOCK_TOKENS}, or 0 for all"
            )


@dataclass(frozen=True, slots=True)
class Example:
    """What one pass trains on.

    Attributes:
        ids: Tokens, the last of which is only predicted.
        num_gated: Tokens from the first on whose keep flags are learned; those after are kept.
        first_counted: Predictions from this token on count.
    """

    ids: list[int]
    num_gated: int
    first_counted: int = 0


def cut(model: Model, text: str, plan: GatePlan) -> list[Example]:
    """Return the stretches of a text as examples: each predicts all of itself, or its answer."""
    ids = model.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    begins_with = model.tokenizer.encode("", verbose=False)
    size = plan.length + 1 - len(begins_with)
    gated = plan.length // 2 if plan.bidirectional else plan.length
    return [
        Example([*begins_with, *ids[end - size : end]], gated, gated if plan.bidirectional else 0)
        for end in range(size, len(ids) + 1, size)
    ]


def answered(model: Model, prompt: str, answer: str) -> Example:
    """Return a supervised example: the prompt is gated, the answer's loss counts.

    Raises:
        InvalidRequestError: One of the two is empty.
    """
    before = model.tokenizer.encode(prompt, verbose=False)
    after = model.tokenizer.encode(answer, add_special_tokens=False, verbose=False)
    if not before or not after:
        raise InvalidRequestError(
            f"an example lacks its {'answer' if before else 'prompt'}", "give both"
        )
    ids = [*before, *after]
    if len(ids) > model.spec.max_positions:
        raise InvalidRequestError(
            f"an example has {len(ids)} tokens, the model takes {model.spec.max_positions}",
            "shorten it",
        )
    return Example(ids, len(before), len(before) - 1)


def num_training(group: Sequence[Example]) -> int:
    """Return how many examples of a group, from its begin on, are trained on."""
    return len(group) - int(len(group) * HELD_OUT)
