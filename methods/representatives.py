"""Mean keys that stand for blocks, so that a query finds the blocks that matter to it (ReKV).

Source: arXiv 2503.00540. ``query_rows`` and ``top_blocks`` are the readable reference of what the
store's ``Retrieve`` computes.

Legend: L layers, Hq query heads, H KV heads, N blocks, T block tokens, D head_dim.
"""

import math
from collections.abc import Sequence

import torch

from kvstrata.protos.errors import LimitError
from kvstrata.protos.representatives import MAX_LAYERS, pack_representatives

NONE, ALL = "", "all"


def parse_choice(text: str) -> str:
    """Return the canonical text of which layers get representatives.

    Args:
        text: "" or "none", "all", or layers such as "5,14", counted from 0.

    Returns:
        "" for none, "all", or ascending layers, each once.

    Raises:
        LimitError: Anything else.
    """
    text = text.strip()
    if text in (NONE, "none"):
        return NONE
    if text == ALL:
        return ALL
    parts = [part.strip() for part in text.split(",")]
    if len(text) > 4096 or not all(part.isdecimal() for part in parts):
        raise LimitError(
            f"representatives must be 'none', 'all' or layers, not {text[:40]!r}",
            "write layers like '5,14'",
        )
    layers = sorted({int(part) for part in parts})
    if layers[-1] >= MAX_LAYERS:
        raise LimitError(f"no model has a layer {layers[-1]}", "count layers from 0")
    return ",".join(map(str, layers))


def check_layers(choice: str, num_layers: int) -> None:
    """Raise ``LimitError`` if a canonical choice names a layer that the model does not have."""
    if choice not in (NONE, ALL) and (last := int(choice.rpartition(",")[2])) >= num_layers:
        raise LimitError(
            f"the model has no layer {last} to take representatives of",
            f"count layers from 0 to {num_layers - 1}",
        )


def chosen_layers(choice: str, num_layers: int) -> list[int]:
    """Return the layers of a canonical choice that a model of ``num_layers`` has, ascending."""
    if choice == ALL:
        return list(range(num_layers))
    return [layer for layer in map(int, filter(None, choice.split(","))) if layer < num_layers]


def mean_keys(keys: torch.Tensor) -> torch.Tensor:
    """Return the mean keys, float16 (L, H, N, D), of ``keys`` (L, H, N, T, D) before RoPE."""
    return keys.float().mean(dim=3).half()


def attachments(keys: torch.Tensor, layers: Sequence[int]) -> list[bytes]:
    """Return each block's attachment.

    Args:
        keys: (L, H, N, T, D), before RoPE.
        layers: The L layers that they are of.
    """
    means = mean_keys(keys).permute(2, 0, 1, 3).flatten(2).cpu()  # (N, L, H * D)
    usable = means.isfinite().all(dim=-1)
    return [
        pack_representatives(
            {
                layer: means[block, i].numpy().tobytes()
                for i, layer in enumerate(layers)
                if usable[block, i]
            }
        )
        for block in range(len(means))
    ]


def group_sum(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Return a query (Hq, D) summed within each group of heads that share a KV head, (H, D)."""
    return query.reshape(num_kv_heads, -1, query.shape[-1]).sum(dim=1)


def scores(query: torch.Tensor, means: torch.Tensor, *, cosine: bool = False) -> torch.Tensor:
    """Return how well blocks answer a query, float32 (N,), larger is better.

    Args:
        query: (Hq, D), before RoPE; usually the mean over the question's tokens.
        means: (N, H, D), representatives of one layer.
        cosine: Divide by the norms of the query and of the representative repeated for every head.
    """
    repeated = means.float().repeat_interleave(len(query) // means.shape[1], dim=1).flatten(1)
    flat = query.float().flatten()
    dots: torch.Tensor = repeated @ flat
    if not cosine:
        return dots
    norms = torch.linalg.vector_norm(repeated, dim=1) * torch.linalg.vector_norm(flat)
    cosines: torch.Tensor = dots / norms.clamp_min(torch.finfo(torch.float32).tiny)
    return cosines


def top_blocks(block_scores: Sequence[float | None], top_k: int, chunk: int = 1) -> list[int]:
    """Return the blocks of the best chunks, ascending.

    A chunk is ``chunk`` neighbouring blocks, the last one perhaps fewer; its score is the mean of
    its blocks'. The ``top_k / chunk`` best chunks are taken, of equal ones the first.

    Args:
        block_scores: In order of time; None for a block that cannot be had, which no chunk counts.
        top_k: Blocks wanted, a multiple of ``chunk``.
        chunk: Blocks of a chunk.
    """
    means = []
    for first in range(0, len(block_scores), chunk):
        known = [score for score in block_scores[first : first + chunk] if score is not None]
        means.append(math.fsum(known) / len(known) if known else -math.inf)
    order = sorted(range(len(means)), key=lambda i: (-means[i], i))[: top_k // chunk]
    return sorted(
        block
        for i in order
        for block in range(i * chunk, min((i + 1) * chunk, len(block_scores)))
        if block_scores[block] is not None
    )
