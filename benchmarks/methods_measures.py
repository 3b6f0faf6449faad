"""From samples to the rows of ``bench_methods.py``: one per scheme, budget and length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from codec_measures import Answer, Sample
from methods_tasks import Tasks

BF16_BITS = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """One scheme on one context with its tasks."""

    scheme: str
    budget: float
    sample: Sample
    tasks: Tasks

    @property
    def pairs(self) -> list[tuple[Answer, Answer]]:
        """Each answer after, and before."""
        return list(zip(self.sample.answers, self.sample.reference_answers, strict=True))

    def answers(self, kind: str) -> list[tuple[Answer, Answer]]:
        """Return the pairs of one kind: "facts", "lines" or "passages"."""
        tasks, begin = self.tasks, 0
        for name in ("facts", "lines", "passages"):
            count = getattr(tasks, name)
            if name == kind:
                return self.pairs[begin : begin + count]
            begin += count
        raise ValueError(f"no tasks {kind!r}")


def rows(measured: Sequence[Measured], model: str) -> list[dict[str, Any]]:
    """Return a row per scheme, budget and prompt length; texts are pooled, questions counted."""
    groups: dict[tuple[str, float, int], list[Measured]] = {}
    for one in measured:
        key = (one.scheme, one.budget, one.sample.num_prompt)
        groups.setdefault(key, []).append(one)
    return [_row(key, group, model) for key, group in groups.items()]


def _row(key: tuple[str, float, int], group: Sequence[Measured], model: str) -> dict[str, Any]:
    scheme, budget, tokens = key
    samples = [one.sample for one in group]
    kl = [value for s in samples for value in s.kl]
    nll = [value for s in samples for value in s.nll]
    agreed = [value for s in samples for value in s.agreed]
    bits = sum(s.num_bits for s in samples) / sum(s.num_elements for s in samples)
    found: dict[str, Any] = {
        "bench": "methods",
        "model": model,
        "method": scheme,
        "peer": samples[0].peer,
        "budget": budget,
        "bits": round(bits, 4),
        "ratio": round(BF16_BITS / bits, 3),
        "perplexity": round(math.exp(sum(nll) / len(nll)), 4),
        "kl": round(sum(kl) / len(kl), 6),
        "top1": round(sum(agreed) / len(agreed), 4),
        "tokens": tokens,
        "contexts": len(samples),
    }
    for name, kinds in {"needle": ("facts", "lines"), "accuracy": ("passages",)}.items():
        pairs = [pair for one in group for kind in kinds for pair in one.answers(kind)]
        known = [after for after, before in pairs if before.right]
        found[name] = round(sum(a.right for a in known) / len(known), 4) if known else None
        found[f"{name}_asked"] = len(known)
        change = [after.log_p - before.log_p for after, before in pairs]
        found[f"{name}_log_p"] = round(sum(change) / len(change), 4) if change else None
    return found
