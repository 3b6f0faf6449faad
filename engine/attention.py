"""The hook between transformers' attention modules and our KV cache.

Transformers calls the hook in each layer with the q, k and v of the new tokens, post-RoPE. The hook
hands them to the state that travels through the forward call as the keyword ``kv_cache_state``.
``batch.py`` has the state of a pass over several sequences.
Not covered: padded batches, dropout, attention weights as an output.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION_NAME = "kvstrata"

# A layer's index and its new queries, keys and values, to all its keys and values:
# ``SequenceCache.append``, or ``following``.
Extend = Callable[
    [int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]

# Per layer, the new tokens that run it, ascending int64; None for all. Empty: all run all.
LayerRows = Sequence[torch.Tensor | None]


class AttentionState(Protocol):
    """What the hook needs: one object per forward pass, seen by each layer in turn."""

    def rows(self, layer: int) -> torch.Tensor | None:
        """Return which of the new tokens run this layer, ascending int64; None for all.

        The others pass it by, unchanged, and ``attend`` sees nothing of them.
        """
        ...

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return the attention output of the new tokens.

        Args:
            layer: Layer index, ascending within a pass.
            queries: (num_heads, n, head_dim), post-RoPE.
            keys: (num_kv_heads, n, head_dim), post-RoPE.
            values: As ``keys``.
            scaling: Factor on the dot products before the softmax.

        Returns:
            (num_heads, n, head_dim), the dtype of ``queries``.
        """
        ...


class AttendOver:
    """The state of a normal pass: attend over what ``extend`` makes of a layer's new rows."""

    def __init__(
        self,
        extend: Extend,
        mask: torch.Tensor | None = None,
        rows: LayerRows = (),
    ) -> None:
        """Serve one forward pass.

        Args:
            extend: See above.
            mask: As for ``attend``; None is causal.
            rows: Per layer, the new tokens that run it, a run from the first on; empty for all.
        """
        self._extend = extend
        self._mask = mask
        self._is_causal = mask is None
        self._rows = rows

    def rows(self, layer: int) -> torch.Tensor | None:
        """Return which of the new tokens run this layer; see ``AttentionState.rows``."""
        return self._rows[layer] if self._rows else None

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend over old and new rows; see ``AttentionState.attend``."""
        all_keys, all_values = self._extend(layer, queries, keys, values)
        num_new = queries.shape[1]
        num_cached = all_keys.shape[1] - num_new
        if self._is_causal and num_new > 1 and num_cached > 0:
            group_size = queries.shape[0] // keys.shape[0]
            shape = (num_new * group_size, num_new + num_cached)
            if self._mask is None or self._mask.shape != shape:
                self._mask = _causal_mask(num_new, num_cached, group_size, queries)
        mask = None if self._is_causal and num_new == 1 else self._mask
        return attend(queries, all_keys, all_values, scaling, mask)


def following(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Extend:
    """Return what puts new rows after given ones, which it leaves alone; differentiable.

    Args:
        keys: Per layer, (num_kv_heads, cached, head_dim).
        values: As ``keys``.
    """

    def extend(
        layer: int, _: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([keys[layer], new_keys], 1), torch.cat([values[layer], new_values], 1)

    return extend


def alone(
    _layer: int, _queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Extend nothing: a sequence without a past."""
    return keys, values


class FirstLayerCapturedError(Exception):
    """Stops a forward pass after layer 0's keys and values were captured; never leaves the room."""


class CaptureFirstLayer:
    """The state of a pass that ends at layer 0's attention, keeping its q, k and v."""

    def __init__(self) -> None:
        """Start with nothing captured."""
        self.queries = torch.empty(0)
        self.keys = torch.empty(0)
        self.values = torch.empty(0)
        self.scaling = 1.0

    def rows(self, layer: int) -> None:
        """Return None: all tokens."""

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Keep q, k, v and the scaling, then raise ``FirstLayerCapturedError``."""
        self.queries, self.keys, self.values, self.scaling = queries, keys, values, scaling
        raise FirstLayerCapturedError


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return causal attention of the last rows over all keys, without repeating K or V.

    The query heads of a group become more rows of their one KV head. A whole prompt at once goes
    to the causal kernel instead, which skips the upper triangle (2000 tokens on 2 cores: 53 ms
    against 131 ms per layer with a mask).

    Args:
        queries: (num_heads, n, head_dim).
        keys: (num_kv_heads, total, head_dim), the last n of which belong to the queries.
        values: As ``keys``.
        scaling: Factor on the dot products before the softmax.
        mask: Added to the dot products, (group * n, total); None for a single new token or when
            n == total.

    Returns:
        (num_heads, n, head_dim).
    """
    num_heads, num_new, head_dim = queries.shape
    if num_new > 1 and num_new == keys.shape[1]:
        return F.scaled_dot_product_attention(
            queries[None],
            keys[None],
            values[None],
            is_causal=True,
            scale=scaling,
            enable_gqa=num_heads != keys.shape[0],
        )[0]
    rows = queries.reshape(1, keys.shape[0], -1, head_dim)
    output = F.scaled_dot_product_attention(
        rows, keys[None], values[None], attn_mask=mask, scale=scaling
    )
    return output.reshape(num_heads, num_new, head_dim)


def _causal_mask(
    num_new: int, num_cached: int, group_size: int, like: torch.Tensor
) -> torch.Tensor:
    """Return the additive mask of ``num_new`` rows, repeated for each query head of a group."""
    hidden = torch.ones(
        (num_new, num_cached + num_new), dtype=torch.bool, device=like.device
    ).triu_(num_cached + 1)
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, -torch.inf).repeat(group_size, 1)


def _hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    kv_cache_state: AttentionState | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if kv_cache_state is None:
        raise RuntimeError("call the model through kvstrata.engine.Model, which owns its KV cache")
    # The argument, not ``module.scaling``: OPT scales its queries itself and passes 1.
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    output = kv_cache_state.attend(int(layer), query[0], key[0], value[0], scaling)
    return output.transpose(0, 1)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Stand in for transformers' mask builder: the hook masks by itself."""


def register() -> None:
    """Make ``attn_implementation="kvstrata"`` known to transformers. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, _hook)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
