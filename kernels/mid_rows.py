"""Rows of single tokens: which quarter of its cell each of a token's components lies in.

A row of head h has mid_counts[h] / 4 bytes: the high bits of its first components, then their low
bits, component i in bit i % 8 of byte i / 8. Rows go block by block, heads ascending, tokens
ascending, with nothing between them: masks tell where each row lies.
"""

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.block_planes import (
    KEPT_MULTIPLE,
    MidRows,
    PlaneLayout,
    check_components,
    fine_codes,
)
from kvstrata.kernels.token_masks import check_masks, to_flags


def pack_mid_rows(y: torch.Tensor, masks: torch.Tensor, layout: PlaneLayout) -> MidRows:
    """Return the rows of the tokens in ``masks``.

    Args:
        y: bf16, fp16 or fp32 (H, N, 64, D): the numbers that were encoded, to the last bit.
        masks: int64 (H, N): the tokens to keep; no escapes and no dropped tokens.
        layout: What was encoded with.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    check_components(y, layout)
    check_masks("mid masks", masks, layout.num_heads, y.shape[1])
    starts = layout.mid_starts(masks)
    backend = backend_of(y, masks)
    if backend == "numba" and layout.dim % KEPT_MULTIPLE == 0:
        from kvstrata.kernels.mid_rows_numba import pack_mid_rows_numba as pack
    elif backend == "triton":
        from kvstrata.kernels.mid_rows_triton import pack_mid_rows_triton as pack
    else:
        pack = pack_mid_rows_reference
    return MidRows(masks, pack(y, masks, layout, starts), starts[:: layout.num_heads])


def pack_mid_rows_reference(
    y: torch.Tensor, masks: torch.Tensor, layout: PlaneLayout, starts: torch.Tensor
) -> torch.Tensor:
    """Return the rows, uint8, of masks whose rows start at ``starts``; the definition."""
    rows = torch.empty(int(starts[-1]), dtype=torch.uint8, device=y.device)
    flags, places = to_flags(masks), 1 << torch.arange(8, device=masks.device)
    codes, at = fine_codes(y, layout), 0
    for n in range(y.shape[1]):
        for h, count in enumerate(layout.mid_counts.tolist()):
            quarters = codes[h, n, flags[h, n], :count]
            bits = torch.cat([quarters >> 1 & 1, quarters & 1], -1)
            packed = (bits.unflatten(-1, (-1, 8)) * places).sum(-1).to(torch.uint8).flatten()
            rows[at : at + packed.numel()] = packed
            at += packed.numel()
    return rows
