"""How much the probe rows of a prompt attend to each of its tokens, and which rows are probes."""

import math
from typing import Literal

import torch

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
    scores: torch.Tensor = sums.unflatten(-2, (keys.shape[-3], -1)).mean(-2)
    if normaliser == "full_nnz":
        scores /= torch.arange(num_keys, 0, -1, device=keys.device)
        return scores
    counts = seeing_rows(positions.to(keys.device), num_keys)
    scores /= counts.clamp(min=1)
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
