"""Layers that run for some of a pass's tokens only; the others pass them by.

Transformers' decoder layers stay what they are, under their own names: only ``forward`` is led
through here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kvstrata.engine.attention import AttentionState

_PER_ROW = ("position_ids", "position_embeddings")


def select_rows_in(hf_model: Any) -> None:
    """Let every decoder layer of a transformers model ask the pass's state which rows it runs for.

    Call it once. Without a state, or where all rows run, nothing changes.
    """
    inner = hf_model.base_model
    for index, layer in enumerate(getattr(inner, "decoder", inner).layers):
        layer.forward = partial(_forward, layer.forward, index)


def _forward(
    forward: Callable[..., torch.Tensor],
    index: int,
    hidden: torch.Tensor,
    *,
    kv_cache_state: AttentionState | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return hidden states (1, n, width); rows that do not run keep theirs."""
    rows = None if kv_cache_state is None else kv_cache_state.rows(index)
    if rows is None:
        return forward(hidden, kv_cache_state=kv_cache_state, **kwargs)
    if not len(rows):
        return hidden
    rows = rows.to(hidden.device)
    for name in _PER_ROW:
        if kwargs.get(name) is not None:
            kwargs[name] = _pick(kwargs[name], rows)
    out = forward(hidden[:, rows], kv_cache_state=kv_cache_state, **kwargs)
    return hidden.index_copy(1, rows, out)


def _pick(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_pick(part, rows) for part in value)
    return value[:, rows]
