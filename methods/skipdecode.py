"""SkipDecode: fewer layers for later tokens, the same for every sequence at the same place.

Every generated token has a budget of layers, which falls linearly along the generation and never
rises. The first ``warmup_layers`` and the top ones run, those between are skipped, so the sets of
two tokens are nested: where a layer runs for a token, it ran for all before it, and its cache has
no hole. Prompt tokens run all layers.

Example, 6 layers, ``max_layers=5, min_layers=3, decay_tokens=2``: token 0 runs layers 0 2 3 4 5,
token 1 runs 0 3 4 5, token 2 and all later ones 0 4 5. After three tokens the cache of layer 1 has
the prompt alone, of layer 2 one token more, of layer 3 two, of layers 0, 4 and 5 three.

Source:
    SkipDecode, arXiv:2307.02628, sections 3 and 4. ``min_layers`` and ``max_layers`` include the
    warm-up layers. Weights must have been tuned for it: ``kvstrata tune skipdecode``.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kvstrata.protos.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class SkipDecode:
    """The schedule of one generation. It changes no stored block, so no block's identity.

    Attributes:
        max_layers: Layers that the first generated token runs.
        min_layers: Layers from token ``decay_tokens`` on; at most ``max_layers``.
        decay_tokens: Tokens over which the budget falls; the median answer's length is a good one.
        warmup_layers: Layers at the bottom that always run; less than ``min_layers``.
    """

    max_layers: int
    min_layers: int
    decay_tokens: int = 128
    warmup_layers: int = 1

    def __post_init__(self) -> None:
        """Refuse what is no schedule.

        Raises:
            InvalidRequestError: Names the field.
        """
        if self.warmup_layers < 0:
            raise InvalidRequestError("skipdecode: warmup_layers is negative", "give 0 or more")
        if self.min_layers < self.warmup_layers + 1:
            raise InvalidRequestError(
                f"skipdecode: min_layers {self.min_layers} leaves no layer beside "
                f"{self.warmup_layers} warm-up layers",
                f"give at least {self.warmup_layers + 1}",
            )
        if self.max_layers < self.min_layers:
            raise InvalidRequestError(
                f"skipdecode: max_layers {self.max_layers} is below min_layers {self.min_layers}",
                "budgets only fall: give max_layers >= min_layers",
            )
        if self.decay_tokens < 1:
            raise InvalidRequestError("skipdecode: decay_tokens is not positive", "give 1 or more")

    @classmethod
    def for_speedup(
        cls, num_layers: int, speedup: float, *, decay_tokens: int = 128
    ) -> "SkipDecode":
        """Return the schedule with the mean budget ``num_layers / speedup``, falling by half.

        Raises:
            InvalidRequestError: ``speedup`` is below 1, or leaves less than a layer and a warm-up.
        """
        if not speedup >= 1:
            raise InvalidRequestError(f"skipdecode: a speed-up of {speedup}", "give 1 or more")
        double = 2 * num_layers / speedup
        max_layers = min(num_layers, round(double * 2 / 3))
        return cls(max_layers, round(double) - max_layers, decay_tokens)

    def check(self, num_layers: int) -> None:
        """Raise unless a model of so many layers can follow the schedule.

        Raises:
            InvalidRequestError: The model has fewer layers than ``max_layers``.
        """
        if self.max_layers > num_layers:
            raise InvalidRequestError(
                f"skipdecode: max_layers {self.max_layers} of a model with {num_layers} layers",
                f"give at most {num_layers}",
            )

    def budget(self, index: int) -> int:
        """Return how many layers generated token ``index`` runs; never more than the one before."""
        fall = (self.max_layers - self.min_layers) * min(index, self.decay_tokens)
        # Half up, in integers: exact, so monotone.
        return self.max_layers - (2 * fall + self.decay_tokens - 1) // (2 * self.decay_tokens)

    def runs(self, layer: int, index: int, num_layers: int) -> bool:
        """Return whether ``layer`` runs for generated token ``index``; negative ones are prompt."""
        if index < 0 or layer < self.warmup_layers:
            return True
        return layer >= num_layers - (self.budget(index) - self.warmup_layers)

    def layers(self, index: int, num_layers: int) -> tuple[int, ...]:
        """Return the layers that run for generated token ``index``, ascending."""
        return tuple(n for n in range(num_layers) if self.runs(n, index, num_layers))

    def num_cached(self, num_generated: int, num_layers: int) -> tuple[int, ...]:
        """Return how many of the first ``num_generated`` tokens each layer has in its cache."""
        return tuple(
            bisect_left(range(num_generated), True, key=partial(self._skips, layer, num_layers))
            for layer in range(num_layers)
        )

    def _skips(self, layer: int, num_layers: int, index: int) -> bool:
        return not self.runs(layer, index, num_layers)

    def executions(self, num_generated: int) -> int:
        """Return how many layers run for the first ``num_generated`` tokens together."""
        return sum(map(self.budget, range(num_generated)))


def running_rows(
    schedules: Sequence["SkipDecode | None"], indices: Sequence[int], num_layers: int
) -> list[list[int] | None]:
    """Return per layer which rows of a batch it runs for; None where all run.

    Args:
        schedules: Of each row; None runs all layers.
        indices: Generation index of each row; negative for prompt tokens.
        num_layers: Of the model.
    """
    found: list[list[int] | None] = []
    pairs = list(zip(schedules, indices, strict=True))
    for layer in range(num_layers):
        rows = [
            row
            for row, (schedule, index) in enumerate(pairs)
            if schedule is None or schedule.runs(layer, index, num_layers)
        ]
        found.append(None if len(rows) == len(pairs) else rows)
    return found
