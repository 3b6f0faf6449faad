"""Attention column sums: how much attention each key receives from chosen rows, without the matrix.

The building block of saliency: ZipCache and ZipVL score tokens by it, H2O accumulates it.

Legend: L layers, H query heads, K key heads, R rows, N keys, D head_dim.
"""

import torch

from kvstrata.kernels.backend import FLOATS, backend_of

_ROWS_AT_ONCE = 64


def column_sums(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return each key's sum of causal attention over the rows; all sums of a head add up to R.

    Row i is a query at ``positions[i]`` and sees the keys 0 to ``positions[i]``. The rows-by-keys
    matrix never exists as a whole: on a CPU a tile of 2 to 8 MiB does, on a GPU a tile per program.

    Args:
        queries: Post-RoPE queries of the chosen rows, (L, H, R, D) or (H, R, D); bf16, fp16, fp32.
        keys: Post-RoPE keys of positions 0 to N - 1, (L, K, N, D) or (K, N, D); same dtype. Query
            head h reads key head h // (H / K).
        positions: int64 (R,), at least 0, in any order, repeats allowed.
        scaling: Factor on the dot products before the softmax.

    Returns:
        float32 (L, H, N) or (H, N). No rows give zeros.

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together, no keys, a negative
            position; on a CPU also products that are not finite.

    Source:
        ZipCache, arXiv:2405.14256, section 4.2 (the sum over probe rows).
    """
    has_layers = queries.ndim == 4
    if not has_layers:
        queries, keys = queries[None], keys[None]
    _check(queries, keys, positions)
    backend = backend_of(queries, keys)
    # A row beyond the last key sees what the last key's row does; one more must fit the integer.
    positions, order = positions.to(queries.device).clamp_max(keys.shape[2] - 1).sort()
    queries = queries[:, :, order]
    if positions.numel() == 0 or queries.numel() == 0:
        sums = torch.zeros((*queries.shape[:2], keys.shape[2]), device=queries.device)
    elif backend == "numba":
        from kvstrata.kernels.colsum_numba import column_sums_numba

        sums = column_sums_numba(queries, keys, positions, scaling)
    elif backend == "triton":
        from kvstrata.kernels.colsum_triton import column_sums_triton

        sums = column_sums_triton(queries, keys, positions, scaling)
    else:
        sums = column_sums_reference(queries, keys, positions, scaling)
    return sums if has_layers else sums[0]


def column_sums_reference(
    queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return ``column_sums`` of inputs with layers; the definition, a few rows at a time."""
    num_layers, num_heads, num_rows, dim = queries.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    hidden = torch.arange(num_keys, device=keys.device) > positions[:, None]
    sums = torch.zeros((num_layers, num_kv_heads, num_heads // num_kv_heads, num_keys))
    sums = sums.to(keys.device)
    for layer in range(num_layers):
        transposed = keys[layer].float().transpose(1, 2)[:, None]
        grouped = queries[layer].view(num_kv_heads, -1, num_rows, dim)
        for start in range(0, num_rows, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            logits = grouped[:, :, rows].float() @ transposed * scaling
            sums[layer] += logits.masked_fill_(hidden[rows], -torch.inf).softmax(-1).sum(2)
    if not torch.isfinite(sums).all():
        raise ValueError(NOT_FINITE)
    return sums.view(num_layers, num_heads, num_keys)


NOT_FINITE = "queries or keys hold NaN or infinity, or their products overflow"


def _check(queries: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> None:
    shapes = f"queries of shape {tuple(queries.shape)} do not fit keys of shape {tuple(keys.shape)}"
    if queries.ndim != 4 or keys.ndim != 4:
        raise ValueError(f"{shapes}: both need (layers, heads, tokens, head_dim) or no layers")
    num_layers, num_heads, num_rows, dim = queries.shape
    if keys.shape[0] != num_layers or keys.shape[3] != dim:
        raise ValueError(f"{shapes}: layers and head_dim must be equal")
    if keys.shape[1] == 0 or num_heads % keys.shape[1]:
        raise ValueError(f"{shapes}: query heads must be a multiple of key heads")
    if keys.shape[2] == 0:
        raise ValueError("at least one key is needed")
    if queries.dtype not in FLOATS or queries.dtype != keys.dtype:
        raise ValueError(
            f"queries and keys must both be bf16, fp16 or fp32, "
            f"not {queries.dtype} and {keys.dtype}"
        )
    if positions.shape != (num_rows,) or positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{num_rows} rows need as many integer positions, "
            f"not {positions.dtype} of shape {tuple(positions.shape)}"
        )
    if num_rows and positions.min() < 0:
        raise ValueError(f"positions must not be negative, and one is {int(positions.min())}")
