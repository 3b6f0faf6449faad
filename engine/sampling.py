"""From logits to a token id, so that a replay on another worker draws the same tokens."""

import math
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

MAX_TOKENS_LIMIT = 1_048_576
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 1_048_576
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end.

    Attributes:
        max_tokens: Most tokens to generate.
        temperature: 0 is greedy; higher is more random.
        top_p: Keep the fewest most probable tokens whose probabilities reach this sum; 1 is off.
        top_k: Keep this many most probable tokens; 0 is off.
        seed: Makes the draws repeatable; None draws afresh each time.
        stop: The text ends before the first of these strings to appear.
        ignore_eos: Go on past an end-of-sequence token.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: Names the field, the value and the valid range.
        """
        _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _check_int("top_k", self.top_k, 0, MAX_TOP_K)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if not _is_finite(self.temperature) or not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature must be in 0..{MAX_TEMPERATURE}, not {self.temperature}")
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if isinstance(self.stop, str) or len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop must be a tuple of at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise ValueError(
                    f"stop strings must have 1..{MAX_STOP_CHARS} characters, not {text!r:.40}"
                )


def sample(logits: torch.Tensor, params: SamplingParams, step: int) -> int:
    """Return the token id chosen from ``logits``.

    Greedy takes the largest logit, the lowest id on exact ties. Otherwise the draw of ``step``
    depends only on (``params.seed``, ``step``): no state is carried, so a replay may start
    anywhere. The draw is inverted through the probabilities in id order, so that two near-equal
    logits that swap ranks on another machine do not change the choice.

    Args:
        logits: Float, (vocab,), any device.
        params: Validated.
        step: Index of this token in the generation, from 0.

    Raises:
        ValueError: The logits hold NaN or no finite maximum, so no choice would be right.
    """
    exact = logits.detach().float().cpu().numpy()
    best = int(np.argmax(exact))
    if not math.isfinite(exact[best]):
        raise ValueError(f"cannot sample: the largest of the logits is {exact[best]}")
    if params.temperature == 0:
        return best
    scores: npt.NDArray[np.float64] = exact.astype(np.float64)
    weights = np.exp((scores - scores[best]) / params.temperature)
    weights = _keep_most_probable(weights, params.top_k, params.top_p)
    cumulative = np.cumsum(weights)
    point = _uniform(params.seed, step) * cumulative[-1]
    token_id = int(np.searchsorted(cumulative, point, side="right"))
    return min(token_id, int(np.flatnonzero(weights)[-1]))


def _keep_most_probable(
    weights: npt.NDArray[np.float64], top_k: int, top_p: float
) -> npt.NDArray[np.float64]:
    if top_k == 0 and top_p == 1:
        return weights
    order = np.argsort(-weights, kind="stable")
    num_kept = top_k or len(order)
    if top_p < 1:
        cumulative = np.cumsum(weights[order[:num_kept]])
        num_kept = int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left")) + 1
    kept = np.zeros_like(weights)
    kept[order[:num_kept]] = weights[order[:num_kept]]
    return kept


def _uniform(seed: int | None, step: int) -> float:
    """Return a float in [0, 1) that depends only on the arguments, unless ``seed`` is None."""
    key = secrets.randbits(64) if seed is None else seed & _MASK_64
    return float(np.random.Generator(np.random.Philox(key=key, counter=step)).random())


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer in {low}..{high}, not {value}")


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]
