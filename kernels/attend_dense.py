"""Attention of many new tokens over uncompressed keys, with the logarithm of its softmax sum.

The form of ``attend_blocks`` for a chunk of a prompt: what lies before the chunk, and the chunk
itself, are attended one by one and merged, so that no mask is ever made.
"""

import torch

from kvstrata.kernels.attend_blocks import Attention

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_dense(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    *,
    is_causal: bool = False,
) -> Attention:
    """Return attention of all queries over all keys, or of each over those up to its own.

    On a CPU it is torch's flash attention, without repeating K or V unless causal.

    Args:
        queries: (H * G, n, D); query head i reads KV head i // G.
        keys: (H, m, D), at least one.
        values: As ``keys``.
        scaling: Factor on the dot products before the softmax.
        is_causal: Query i sees keys 0 to i; then m is n.

    Returns:
        Output float32 (H * G, n, D), and lse float32 (H * G, n).

    Raises:
        ValueError: The shapes do not belong together.
    """
    heads, num_keys, head_dim = keys.shape
    num_heads, num_rows = queries.shape[:2]
    if keys.shape != values.shape or queries.shape[2] != head_dim or num_heads % heads:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} do not belong together"
        )
    if not num_keys or (is_causal and num_keys != num_rows):
        raise ValueError(f"{num_rows} causal rows need as many keys, and at least one")
    if queries.device.type != "cpu":
        return attend_dense_reference(queries, keys, values, scaling, is_causal=is_causal)
    group = num_heads // heads
    if is_causal:
        keys, values = (rows.repeat_interleave(group, 0) for rows in (keys, values))
    else:
        queries = queries.reshape(heads, group * num_rows, head_dim)
    out, lse = _FLASH(queries[None], keys[None], values[None], 0.0, is_causal, scale=scaling)
    out, lse = out[0].float(), lse[0]
    return out.reshape(num_heads, num_rows, -1), lse.reshape(num_heads, num_rows)


def attend_dense_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    *,
    is_causal: bool = False,
) -> Attention:
    """Return ``attend_dense`` by its definition; all scores exist at once."""
    heads, num_keys, head_dim = keys.shape
    num_rows = queries.shape[1]
    grouped = queries.float().reshape(heads, -1, num_rows, head_dim)
    scores = grouped @ keys.float()[:, None].mT * scaling
    if is_causal:
        hidden = torch.ones(num_rows, num_keys, dtype=torch.bool, device=keys.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ values.float()[:, None]
    return out.flatten(0, 1), lse.flatten(0, 1)
