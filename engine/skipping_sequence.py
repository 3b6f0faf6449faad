"""A running sequence whose generated tokens run fewer and fewer layers (SkipDecode).

Its prompt is everybody's: it runs all layers, and its blocks are fetched and stored as ever. What
is generated stays uncompressed and is stored nowhere, because layers lack tokens that others have.

In a pass each layer runs for the tokens of those sequences whose budgets reach it, so sequences at
different places of their schedules, and ones without a schedule, share every pass: budgets only
fall, hence a layer that runs for a token has all tokens before it.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from kvstrata.engine.attention import LayerRows
from kvstrata.engine.batch import Span
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.model import Model
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.engine.sequence import RunningSequence
from kvstrata.methods.framing import SealedBlock
from kvstrata.methods.presets import Method
from kvstrata.methods.skipdecode import SkipDecode, running_rows

_KEPT_ROWS = 256  # different budgets whose rows are kept


class SkippingSequence(RunningSequence):
    """A request whose method has a schedule. Not thread-safe: one call at a time."""

    def __init__(
        self,
        model: Model,
        method: Method,
        token_ids: Sequence[int],
        *,
        salt: bytes = b"",
        num_prompt: int | None = None,
        pool: KVPool | None = None,
    ) -> None:
        """Start with an empty cache; arguments as for ``SelectingSequence``.

        Raises:
            ArenaFullError: The pool has no place for another sequence.
        """
        super().__init__(model, method, token_ids, salt=salt, pool=pool)
        assert method.skip is not None
        self._schedule = method.skip
        self._num_prompt = len(token_ids) if num_prompt is None else num_prompt
        self._num_counted = self._num_prompt

    def next_span(self, limit: int) -> Span:
        """Return the next tokens, at most ``limit``: of the prompt, or generated ones."""
        first, prompt = self.cache.length, self._num_prompt
        if first < prompt or first == len(self.token_ids):
            return super().next_span(min(limit, prompt - first))
        if isinstance(self.cache, PagedCache):
            self.cache.counts_saliency = False  # no block fills any more
        stop = min(first + limit, len(self.token_ids), self.model.spec.max_positions)
        return Span(
            self.cache,
            self.token_ids[first:stop],
            wants_logits=stop == len(self.token_ids),
            rows=_rows(self._schedule, first - prompt, stop - prompt, self.model.spec.num_layers),
        )

    def fill(self) -> list[SealedBlock]:
        """Seal a block of the prompt that filled; count what ran for generated tokens."""
        first, last = self._num_counted, self.cache.length
        if last <= self._num_prompt or self._is_again:
            return super().fill()
        rows = _rows(
            self._schedule,
            first - self._num_prompt,
            last - self._num_prompt,
            self.model.spec.num_layers,
        )
        self.layer_executions += sum(last - first if r is None else len(r) for r in rows)
        self._num_counted = last
        return []


def _rows(schedule: SkipDecode, first: int, last: int, num_layers: int) -> LayerRows:
    """Return per layer which of the generated tokens [first, last) run it."""
    if last - first == 1:
        return _single_rows(schedule.warmup_layers, schedule.budget(first), num_layers)
    picked = running_rows([schedule] * (last - first), range(first, last), num_layers)
    return [None if rows is None else torch.tensor(rows, dtype=torch.int64) for rows in picked]


@lru_cache(_KEPT_ROWS)
def _single_rows(warmup_layers: int, budget: int, num_layers: int) -> LayerRows:
    """Return per layer whether a token of that budget runs it: None or no rows."""
    skipped = torch.empty(0, dtype=torch.int64)
    first = num_layers - (budget - warmup_layers)
    return [None if n < warmup_layers or n >= first else skipped for n in range(num_layers)]
