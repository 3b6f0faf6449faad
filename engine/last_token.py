"""A sequence's last token, run once more because its logits are wanted and nobody has them.

So it is when every token of a prompt came in stored blocks. Its K and V are held, and stay what
they are: nothing is written, and a pass over it costs one row, as any generated token does.
"""

import torch

from kvstrata.engine.attention import AttentionState, LayerRows
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.engine.paged_states import HeldTokens
from kvstrata.kernels.attend_dense import attend_dense


class LastToken:
    """The last token that ``cache`` holds, as a ``KVCache`` that it is not in yet.

    Attributes:
        length: Its position.
    """

    def __init__(self, cache: SequenceCache | PagedCache) -> None:
        """Look at a cache of at least one token."""
        self._cache = cache
        self.length = cache.length - 1

    def begin(self, num_tokens: int, rows: LayerRows = ()) -> AttentionState:
        """Return what attends over all that is held; see ``KVCache``."""
        assert (num_tokens, len(rows)) == (1, 0), "it runs all layers, alone"
        return _HeldState(self._cache)

    def advance(self, num_tokens: int) -> None:
        """Do nothing: it is held already."""


class _HeldState:
    """Attends for one token over what a cache holds, the token itself included."""

    def __init__(self, cache: SequenceCache | PagedCache) -> None:
        self._cache = cache
        self._held = HeldTokens(cache) if isinstance(cache, PagedCache) else None

    def rows(self, layer: int) -> torch.Tensor | None:
        """Return None: it runs every layer; see ``AttentionState.rows``."""

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend; the new ``keys`` and ``values`` are those held, and left alone."""
        if self._held is not None:
            return self._held.attend(layer, queries, scaling)
        cache = self._cache
        assert isinstance(cache, SequenceCache)
        k, v = (part[layer, :, : cache.length] for part in (cache.keys, cache.values))
        return attend_dense(queries, k, v, scaling)[0].to(queries.dtype)
