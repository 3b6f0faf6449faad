"""Several continuations of one cached prompt in one forward pass, none of which sees another.

A pass over 18 tokens reads all weights, and eight questions would read them eight times.
"""

from collections.abc import Sequence

import torch

from kvstrata.engine.attention import AttendOver, following
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.model import Model


def _branch_mask(cache: SequenceCache, branch_of: torch.Tensor) -> torch.Tensor:
    """Return the mask under which a token sees the cache and what precedes it in its branch."""
    num_new = len(branch_of)
    visible = (branch_of[:, None] == branch_of).tril()
    mask = torch.zeros(num_new, cache.length + num_new, dtype=cache.spec.dtype)
    mask[:, cache.length :].masked_fill_(~visible, -torch.inf)
    group_size = cache.spec.num_heads // cache.spec.num_kv_heads
    return mask.to(cache.keys.device).repeat(group_size, 1)


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
    held = cache.read(0, cache.length)
    logits = model._hf_model(
        input_ids=ids.to(model.device),
        position_ids=positions[None].to(model.device),
        use_cache=False,
        kv_cache_state=AttendOver(following(*held), _branch_mask(cache, branch_of)),
    ).logits[0]
    return list(logits.float().split(sizes))
