"""Gathering of the rows that masks keep, ragged over heads and blocks, and scattering them back.

Legend: H heads, N blocks, D head_dim, T rows kept in all. A block has 64 tokens; bit i of a mask
(bit 63 is the sign of the int64) keeps token i.
"""

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.token_masks import TOKENS, count_tokens, to_flags

_ITEM_SIZES = (1, 2, 4)


def gather_by_mask(
    blocks: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows that ``masks`` keep, how many per block, and where each was.

    Rows are in the order of head, block, token, so those of one head or block are contiguous.

    Args:
        blocks: (H, N, 64, D), of 1, 2 or 4 bytes an item; bits are kept as they are.
        masks: int64 (H, N), read as unsigned.

    Returns:
        Rows (T, D); counts int64 (H, N), which add up to T; positions int64 (T,), the token's index
        in its head, 0 to 64 N - 1, ascending within a head.

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together.
    """
    _check_masks(masks)
    if blocks.ndim != 4 or blocks.shape[:3] != (*masks.shape, TOKENS):
        raise ValueError(
            f"masks of shape {tuple(masks.shape)} need blocks of shape "
            f"(heads, blocks, {TOKENS}, head_dim), not {tuple(blocks.shape)}"
        )
    if blocks.element_size() not in _ITEM_SIZES:
        raise ValueError(f"items must have 1, 2 or 4 bytes, not {blocks.dtype}")
    backend = backend_of(blocks, masks)
    blocks, masks = blocks.contiguous(), masks.contiguous()
    counts = count_tokens(masks)
    total = int(counts.sum())
    rows = torch.empty((total, blocks.shape[3]), dtype=blocks.dtype, device=blocks.device)
    positions = torch.empty(total, dtype=torch.int64, device=blocks.device)
    if total == 0:
        return rows, counts, positions
    if backend == "numba":
        from kvstrata.kernels.gather_numba import gather_numba

        gather_numba(blocks, masks, counts, rows, positions)
    elif backend == "triton":
        from kvstrata.kernels.gather_triton import gather_triton

        gather_triton(blocks, masks, counts, rows, positions)
    else:
        gather_reference(blocks, masks, counts, rows, positions)
    return rows, counts, positions


def scatter_by_mask(
    rows: torch.Tensor, masks: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return blocks with ``rows`` where ``masks`` keep a token: undoes ``gather_by_mask``.

    Args:
        rows: (T, D), in the order of ``gather_by_mask``; T is the number of bits in ``masks``.
        masks: int64 (H, N), read as unsigned.
        out: Contiguous (H, N, 64, D) to write into, whose other tokens stay; new zeros without it.

    Returns:
        ``out`` or the new blocks, (H, N, 64, D).

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together.
    """
    _check_masks(masks)
    masks = masks.contiguous()
    counts = count_tokens(masks)
    total = int(counts.sum())
    if rows.ndim != 2 or rows.shape[0] != total:
        raise ValueError(f"masks keep {total} rows, not rows of shape {tuple(rows.shape)}")
    if rows.element_size() not in _ITEM_SIZES:
        raise ValueError(f"items must have 1, 2 or 4 bytes, not {rows.dtype}")
    shape = (*masks.shape, TOKENS, rows.shape[1])
    if out is None:
        out = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
    elif out.shape != shape or out.dtype != rows.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {rows.dtype} of shape {shape}")
    backend = backend_of(rows, masks, out)
    rows = rows.contiguous()
    if total == 0:
        return out
    if backend == "numba":
        from kvstrata.kernels.gather_numba import scatter_numba

        scatter_numba(rows, masks, counts, out)
    elif backend == "triton":
        from kvstrata.kernels.gather_triton import scatter_triton

        scatter_triton(rows, masks, counts, out)
    else:
        scatter_reference(rows, masks, counts, out)
    return out


def gather_reference(
    blocks: torch.Tensor,
    masks: torch.Tensor,
    counts: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write the kept rows and their positions; the definition."""
    kept = to_flags(masks)
    rows.copy_(blocks[kept])
    positions.copy_(kept.flatten(1).nonzero()[:, 1])


def scatter_reference(
    rows: torch.Tensor, masks: torch.Tensor, counts: torch.Tensor, out: torch.Tensor
) -> None:
    """Write ``rows`` to the kept tokens of ``out``; the definition."""
    out[to_flags(masks)] = rows


def _check_masks(masks: torch.Tensor) -> None:
    if masks.dtype != torch.int64 or masks.ndim != 2:
        raise ValueError(
            f"masks must be int64 (heads, blocks), not {masks.dtype} of shape {tuple(masks.shape)}"
        )
