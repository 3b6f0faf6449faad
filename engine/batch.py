"""One forward pass over the new tokens of several sequences, laid end to end in one row.

Weights see one matrix of rows; attention sees each sequence apart. So a pass may mix sequences of
any length, prompt chunks and single tokens of running generations, and caches of different kinds.

This is also the seam for caches of other kinds (methods that evict, gate or merge): write a
``KVCache`` whose ``begin`` returns the ``AttentionState`` of its own. Nothing else has to know.
Layers and heads may keep different numbers of tokens: only ``length``, the position of the next
token, is common to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from kvstrata.engine.attention import AttentionState, LayerRows
from kvstrata.engine.layer_inputs import ObservingState


class KVCache(Protocol):
    """The KV of one running sequence, as a forward pass sees it.

    A pass calls ``begin``, the state's ``attend`` once per layer in ascending order, then
    ``advance``. A pass that fails half way does not call ``advance``; the next one begins anew at
    the same ``length``.

    Attributes:
        length: Tokens that have passed; the position of the next one.
    """

    length: int

    def begin(self, num_tokens: int, rows: LayerRows = ()) -> AttentionState:
        """Make room for the next tokens, and return what attends for them in this pass.

        Args:
            num_tokens: At least one.
            rows: Per layer, which of them run it; empty for all.

        Raises:
            ValueError: They do not fit; nothing has changed.
        """
        ...

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of the pass as held."""
        ...


class SteppingCache(KVCache, Protocol):
    """A cache whose kind attends for the next token of many sequences in one call."""

    @classmethod
    def begin_step(cls, caches: Sequence[Self], rows: Sequence[LayerRows]) -> AttentionState:
        """As ``begin(1, rows[i])`` of each; token i of the step belongs to ``caches[i]``."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """The next tokens of one sequence in a pass.

    Attributes:
        cache: Holds the tokens before; gets the new ones. In one span of a pass only.
        token_ids: At least one.
        wants_logits: Whether the logits after the last token are needed.
        rows: Per layer, which of the tokens run it; empty for all.
    """

    cache: KVCache
    token_ids: Sequence[int]
    wants_logits: bool = True
    rows: LayerRows = ()


class BatchState:
    """The state of a pass: hands each sequence's rows to its own state."""

    def __init__(self, parts: Sequence[tuple[int, AttentionState]]) -> None:
        """Take, in the order of the row, how many tokens are whose."""
        self._parts = parts

    def rows(self, layer: int) -> torch.Tensor | None:
        """Return which tokens of all parts run this layer; see ``AttentionState.rows``."""
        running = [state.rows(layer) for _, state in self._parts]
        if all(rows is None for rows in running):
            return None
        first, chosen = 0, []
        for (count, _), rows in zip(self._parts, running, strict=True):
            chosen.append(first + (torch.arange(count) if rows is None else rows))
            first += count
        return torch.cat(chosen)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend part by part; see ``AttentionState.attend``."""
        first, outputs = 0, []
        for count, state in self._parts:
            running = state.rows(layer)
            part = slice(first, first + (count if running is None else len(running)))
            first = part.stop
            if part.start < part.stop:
                q, k, v = queries[:, part], keys[:, part], values[:, part]
                outputs.append(state.attend(layer, q, k, v, scaling))
        return torch.cat(outputs, 1)


class ObservingBatch(BatchState):
    """A pass of which some sequence is shown the inputs of layers."""

    def observe(self, layer: int, hidden: torch.Tensor) -> None:
        """Show each part that wants it its own rows; see ``ObservingState``."""
        first = 0
        for count, state in self._parts:
            running = state.rows(layer)
            last = first + (count if running is None else len(running))
            if first < last and isinstance(state, ObservingState):
                state.observe(layer, hidden[first:last])
            first = last


@dataclass(frozen=True, slots=True)
class Pass:
    """Spans laid end to end.

    Attributes:
        token_ids: Of all spans. Caches of one kind that take one token each stand together.
        positions: Of each token in its sequence.
        kept: Of each span that wants logits, in the order of the spans, its last token.
        state: Attends for all of them.
    """

    token_ids: list[int]
    positions: list[int]
    kept: list[int]
    state: AttentionState


def begin_pass(spans: Sequence[Span]) -> Pass:
    """Begin a pass over all spans.

    Raises:
        ValueError: A cache is in two spans, or has no room; nothing that counts as held changed.
    """
    if len({id(span.cache) for span in spans}) < len(spans):
        raise ValueError("a sequence can be in one span of a pass only")
    steps: dict[Any, list[Span]] = {}
    order: list[Span] = []
    alone = []
    for span in spans:
        kind = type(span.cache)
        if len(span.token_ids) == 1 and hasattr(kind, "begin_step"):
            steps.setdefault(kind, []).append(span)
        else:
            alone.append(span)
    parts: list[tuple[int, AttentionState]] = []
    for kind, together in steps.items():
        state = kind.begin_step([s.cache for s in together], [s.rows for s in together])
        parts.append((len(together), state))
        order += together
    for span in alone:
        count = len(span.token_ids)
        parts.append((count, span.cache.begin(count, span.rows)))
    token_ids: list[int] = []
    positions: list[int] = []
    last: dict[int, int] = {}
    for span in [*order, *alone]:
        first = span.cache.length
        token_ids += span.token_ids
        positions += range(first, first + len(span.token_ids))
        last[id(span)] = len(token_ids) - 1
    return Pass(
        token_ids,
        positions,
        [last[id(span)] for span in spans if span.wants_logits],
        parts[0][1] if len(parts) == 1 else _together(parts),
    )


def _together(parts: Sequence[tuple[int, AttentionState]]) -> BatchState:
    observed = any(isinstance(state, ObservingState) for _, state in parts)
    return (ObservingBatch if observed else BatchState)(parts)
