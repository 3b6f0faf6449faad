"""How much the probe rows of a prompt attend to each of its tokens, and which rows are probes."""

import math
from typing import Literal

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.colsum import column_sums

Normaliser = Literal["probe_nnz", "full_nnz"]


def normalised_saliency(
    queries: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    normaliser: Normaliser = "probe_nnz",
) -> torch.Tensor:
    """Return the normalised attention that each key receives from the probe rows; more is higher.

    A plain column sum favours early tokens, for more rows can see them. So each column's sum is
    divided by a number of rows that can see it. With uniform attention over 8 tokens and all rows
    as probes the score falls from .340 for the first token to .125 for the last, where the sum
    falls from 2.72 to .125. With ``probe_nnz``, a column that no probe row sees gets the least
    score of the seen ones in its head.

    Args:
        queries: Post-RoPE queries of the probe rows, (num_layers, num_heads, r, head_dim).
        positions: int64, (r,), the position of each row.
        keys: Post-RoPE keys of positions 0 to n - 1, (num_layers, num_kv_heads, n, head_dim).
        scaling: Factor on the dot products before the softmax.
        normaliser: ``probe_nnz`` divides by the probe rows that see the column. ``full_nnz``
            divides by n - j, as if all rows were probes: what ZipCache's code does, which favours
            late tokens when they are not.

    Returns:
        float32, (num_layers, num_kv_heads, n): the mean over the query heads of each group.

    Raises:
        ValueError: No probe rows, another normaliser, or what ``column_sums`` refuses.

    Source:
        ZipCache, arXiv:2405.14256, section 4.2, normalised attention scores.
    """
    if normaliser not in ("probe_nnz", "full_nnz"):
        raise ValueError(f"normaliser must be probe_nnz or full_nnz, not {normaliser!r}")
    if positions.numel() == 0:
        raise ValueError("saliency needs at least one probe row")
    sums = column_sums(queries, keys, positions, scaling)
    num_keys = keys.shape[-2]
    counts = torch.arange(num_keys, 0, -1, device=keys.device)
    if normaliser == "probe_nnz":
        counts = seeing_rows(positions.to(keys.device), num_keys)
    return normalise_sums(sums.unflatten(-2, (keys.shape[-3], -1)), counts)


def normalise_sums(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return column sums, averaged over the query heads of a group, divided by what sees them.

    Args:
        sums: float32 (num_layers, num_kv_heads, G, num_keys).
        counts: int64 (num_keys,), how many rows see each key. A key that none sees gets the least
            score of the seen ones in its head; one at least is seen.

    Returns:
        float32 (num_layers, num_kv_heads, num_keys).

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together.
    """
    if sums.ndim != 4 or sums.dtype != torch.float32 or not sums.shape[2]:
        raise ValueError(
            f"sums must be float32 (layers, heads, group, keys), not {sums.dtype} of shape "
            f"{tuple(sums.shape)}"
        )
    if counts.dtype != torch.int64 or counts.shape != sums.shape[3:]:
        raise ValueError(
            f"counts must be int64 ({sums.shape[3]},), not {counts.dtype} {tuple(counts.shape)}"
        )
    backend = backend_of(sums, counts)
    if backend == "numba":
        from kvstrata.kernels.saliency_numba import normalise_sums_numba

        return normalise_sums_numba(sums, counts)
    if backend == "triton":
        from kvstrata.kernels.saliency_triton import normalise_sums_triton

        return normalise_sums_triton(sums, counts)
    return normalise_sums_reference(sums, counts)


def normalise_sums_reference(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return what ``normalise_sums`` returns; the definition."""
    scores: torch.Tensor = sums.mean(-2) / counts.clamp(min=1)
    seen = counts > 0
    if not seen.all():
        scores[..., ~seen] = scores[..., seen].amin(-1, keepdim=True)
    return scores


def seeing_rows(positions: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Return int64 (num_keys,): how many of the rows at ``positions`` see each key."""
    columns = torch.arange(num_keys, device=positions.device)
    return positions.numel() - torch.searchsorted(positions.long().sort().values, columns)


def probe_rows(
    num_tokens: int, recent: float = 0.05, random: float = 0.05, seed: int = 0
) -> torch.Tensor:
    """Return the ascending positions of the probe rows: the last ones and a draw of earlier ones.

    Args:
        num_tokens: Length of the prompt, at least 1.
        recent: How many rows at the end: a count if an integer (64), else a share of the prompt
            (0.05), rounded up. The last row is always a probe.
        random: How many of the rows before those, drawn without repetition; likewise.
        seed: Of the draw. Equal arguments give equal rows, in every process.

    Returns:
        int64, (r,), without repeats.

    Raises:
        ValueError: No tokens, or a count or share that is negative, or a share above 1.

    Source:
        ZipCache, arXiv:2405.14256, section 4.2 (5 % and 5 %); ZipVL, arXiv:2410.08584 (64 and 64).
    """
    if num_tokens < 1:
        raise ValueError(f"a prompt has at least one token, not {num_tokens}")
    num_recent = min(num_tokens, max(1, _count("recent", recent, num_tokens)))
    first_recent = num_tokens - num_recent
    num_random = min(first_recent, _count("random", random, num_tokens))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(first_recent, generator=generator)[:num_random].sort().values
    return torch.cat([drawn, torch.arange(first_recent, num_tokens)])


def _count(name: str, amount: float, num_tokens: int) -> int:
    if amount < 0 or (isinstance(amount, float) and not amount <= 1):
        raise ValueError(f"{name} must be a count or a share from 0.0 to 1.0, not {amount}")
    return amount if isinstance(amount, int) else math.ceil(amount * num_tokens)
