"""Several continuations of one cached prompt in one forward pass, none of which sees another.

A pass over 18 tokens reads all weights, and eight questions would read them eight times.
"""

from collections.abc import Sequence

import torch

from kvstrata.engine.attention import attend
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.model import Model


class _AttendInBranches:
    """An ``AttentionState``: each token sees the cache and what precedes it in its branch."""

    def __init__(self, cache: SequenceCache, branch_of: torch.Tensor) -> None:
        self._cache = cache
        num_new = len(branch_of)
        visible = (branch_of[:, None] == branch_of).tril()
        mask = torch.zeros(num_new, cache.length + num_new, dtype=cache.spec.dtype)
        mask[:, cache.length :].masked_fill_(~visible, -torch.inf)
        group_size = cache.spec.num_heads // cache.spec.num_kv_heads
        self._mask = mask.to(cache.keys.device).repeat(group_size, 1)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend without appending; see ``AttentionState.attend``."""
        held = self._cache.length
        all_keys = torch.cat([self._cache.keys[layer, :, :held], keys], 1)
        all_values = torch.cat([self._cache.values[layer, :, :held], values], 1)
        return attend(queries, all_keys, all_values, scaling, self._mask)


@torch.inference_mode()
def forward_branches(
    model: Model, cache: SequenceCache, branches: Sequence[Sequence[int]]
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
    logits = model._hf_model(
        input_ids=ids.to(model.device),
        position_ids=positions[None].to(model.device),
        use_cache=False,
        kv_cache_state=_AttendInBranches(cache, branch_of),
    ).logits[0]
    return list(logits.float().split(sizes))
