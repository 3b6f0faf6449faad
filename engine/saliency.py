"""How much the last rows of a prompt attend to each of its tokens: the reference in torch."""

import torch


def saliency(
    queries: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the normalised attention that each key receives from the probe rows; more is higher.

    A plain column sum favours early tokens, for more rows can see them. So each column's sum is
    divided by the number of probe rows that can see it. With uniform attention over 8 tokens and
    all rows as probes the score falls from .340 for the first token to .125 for the last, where
    the sum falls from 2.72 to .125. A column that no probe row sees gets the least score of the
    seen ones in its head. Works layer by layer: the extra memory is num_heads * r * n floats.

    Args:
        queries: Post-RoPE queries of the probe rows, (num_layers, num_heads, r, head_dim).
        positions: int64, (r,), the position of each row.
        keys: Post-RoPE keys of positions 0 to n - 1, (num_layers, num_kv_heads, n, head_dim).
        scaling: Factor on the dot products before the softmax.

    Returns:
        float32, (num_layers, num_kv_heads, n): the mean over the query heads of each group.

    Raises:
        ValueError: No probe rows, no keys, or shapes that do not belong together.

    Source:
        ZipCache, arXiv:2405.14256, normalised attention scores; we divide by the probe rows that
        see the column, where the paper counts all rows.
    """
    num_layers, num_heads, num_rows, head_dim = queries.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    if num_rows == 0 or num_keys == 0:
        raise ValueError("saliency needs at least one probe row and one key")
    if positions.shape != (num_rows,):
        raise ValueError(f"{num_rows} probe rows but positions of shape {tuple(positions.shape)}")
    if keys.shape[0] != num_layers or keys.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"queries of shape {tuple(queries.shape)} do not fit keys of shape {tuple(keys.shape)}"
        )
    columns = torch.arange(num_keys, device=keys.device)
    visible = columns <= positions.to(keys.device)[:, None]
    num_seeing_rows = visible.sum(dim=0)
    seen = num_seeing_rows > 0
    result = torch.empty((num_layers, num_kv_heads, num_keys), device=keys.device)
    for layer in range(num_layers):
        rows = queries[layer].reshape(num_kv_heads, -1, head_dim).float() * scaling
        logits = rows @ keys[layer].float().transpose(1, 2)
        logits = logits.view(num_heads, num_rows, num_keys).masked_fill_(~visible, -torch.inf)
        sums = logits.softmax(dim=-1).sum(dim=1)
        scores = sums / num_seeing_rows.clamp(min=1)
        scores = scores.view(num_kv_heads, -1, num_keys).mean(dim=1)
        result[layer] = torch.where(seen, scores, scores[:, seen].amin(dim=1, keepdim=True))
    return result
