"""Several continuations of one cached prompt in one forward pass, none of which sees another.

A pass over 18 tokens reads all weights, and eight questions would read them eight times.
"""

from collections.abc import Sequence

import torch

from kvstrata.engine.attention import AttentionState, attend
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.kept_cache import KeptCache
from kvstrata.engine.model import Model


class _Branches:
    """The state of such a pass: each token sees the cache and what precedes it in its branch."""

    def __init__(self, cache: SequenceCache | KeptCache, branch_of: torch.Tensor) -> None:
        self._cache = cache
        self._visible = (branch_of[:, None] == branch_of).tril()
        self._mask: torch.Tensor | None = None

    def rows(self, layer: int) -> None:
        """Return None: all tokens run all layers."""

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend over what is held and the new tokens; see ``AttentionState.attend``."""
        group_size = len(queries) // len(keys)
        visible = self._visible.to(keys.device)
        if isinstance(self._cache, SequenceCache):
            held = [x[layer] for x in self._cache.read(0, self._cache.length)]
            if self._mask is None:
                seen = visible.new_ones(len(visible), self._cache.length)
                self._mask = torch.cat([seen, visible], 1).repeat(group_size, 1)
            mask = self._mask
        else:
            kept = self._cache._layers[layer]
            held = [kept.keys, kept.values]
            seen = (kept.positions >= 0)[:, None].expand(-1, len(visible), -1)
            rows = torch.cat([seen, visible.expand(len(keys), -1, -1)], 2)
            mask = rows.repeat(1, group_size, 1)[None]
        all_keys, all_values = torch.cat([held[0], keys], 1), torch.cat([held[1], values], 1)
        return attend(queries, all_keys, all_values, scaling, mask)


@torch.inference_mode()
def forward_branches(
    model: Model, cache: SequenceCache | KeptCache, branches: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """Return the logits after each token of each branch; the cache stays as it is.

    Args:
        model: Whose cache it is.
        cache: Holds at least one token.
        branches: Token ids, each branch beginning right after the cache's last token.

    Returns:
        float32, one (len(branch), vocab_size) per branch.
    """
    sizes = [len(branch) for branch in branches]
    branch_of = torch.repeat_interleave(torch.arange(len(branches)), torch.tensor(sizes))
    positions = torch.cat([torch.arange(cache.length, cache.length + size) for size in sizes])
    ids = torch.tensor([[token for branch in branches for token in branch]])
    state: AttentionState = _Branches(cache, branch_of)
    logits = model._hf_model(
        input_ids=ids.to(model.device),
        position_ids=positions[None].to(model.device),
        use_cache=False,
        kv_cache_state=state,
    ).logits[0]
    return list(logits.float().split(sizes))
