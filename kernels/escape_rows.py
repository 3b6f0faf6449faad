"""Tokens that quantise badly, as int8: turned by a Hadamard matrix, one bf16 scale per token.

Rows go block by block, heads ascending, tokens ascending; masks tell which tokens they are. There
are few.
"""

from dataclasses import dataclass

import torch

from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.quantize import dequantize_int8, quantize_int8
from kvstrata.kernels.token_masks import TOKENS, check_masks, count_tokens, to_flags


@dataclass(frozen=True)
class EscapeRows:
    """Escaped tokens, as stored.

    Attributes:
        masks: int64 (H, N), the tokens that have a row.
        scales: bf16 (E,).
        codes: int8 (E, D).
        block_offsets: int64 (N + 1,), the first row of each block.
    """

    masks: torch.Tensor
    scales: torch.Tensor
    codes: torch.Tensor
    block_offsets: torch.Tensor


def row_starts(masks: torch.Tensor) -> torch.Tensor:
    """Return int64 (N * H + 1,): the first row of each block and head."""
    counts = count_tokens(masks).T.flatten()
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def pack_escape_rows(x: torch.Tensor, masks: torch.Tensor) -> EscapeRows:
    """Return the rows of the tokens in ``masks``.

    Args:
        x: Keys or values, bf16, fp16 or fp32 (H, N, 64, D), any strides.
        masks: int64 (H, N).

    Raises:
        ValueError: Shapes do not fit, or an escaped token is not finite.
    """
    if x.ndim != 4 or x.shape[2] != TOKENS:
        raise ValueError(f"tokens must be (heads, blocks, {TOKENS}, dim), not {tuple(x.shape)}")
    check_masks("escape masks", masks, x.shape[0], x.shape[1])
    backend = backend_of(x, masks)
    if backend == "triton":
        from kvstrata.kernels.escape_rows_triton import pack_escape_rows_triton as pack
    elif backend == "numba":
        from kvstrata.kernels.escape_rows_numba import pack_escape_rows_numba as pack
    else:
        pack = pack_escape_rows_reference
    codes, scales = pack(x, masks)
    return EscapeRows(masks, scales, codes, row_starts(masks)[:: x.shape[0]])


def pack_escape_rows_reference(
    x: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes (E, D) and bf16 scales (E,); the definition."""
    n, h, t = to_flags(masks.T).nonzero(as_tuple=True)
    return quantize_int8(x[h, n, t].float() @ hadamard(x.shape[3]).to(x.device))


def check_escape_rows(rows: EscapeRows, num_heads: int, num_blocks: int, dim: int) -> None:
    """Refuse rows whose number is not the one that their masks tell.

    Raises:
        ValueError: It is not.
    """
    check_masks("escape masks", rows.masks, num_heads, num_blocks)
    told = row_starts(rows.masks)[::num_heads]
    offsets = rows.block_offsets
    if offsets.dtype != torch.int64 or not torch.equal(told, offsets):
        raise ValueError("escape block offsets do not fit the escape masks")
    total = int(told[-1])
    if rows.codes.dtype != torch.int8 or rows.codes.shape != (total, dim):
        raise ValueError(
            f"escape codes must be int8 ({total}, {dim}), not {tuple(rows.codes.shape)}"
        )
    if rows.scales.dtype != torch.bfloat16 or rows.scales.shape != (total,):
        raise ValueError(f"escape scales must be bf16 ({total},), not {tuple(rows.scales.shape)}")


def unpack_escape_rows(rows: EscapeRows) -> torch.Tensor:
    """Return float32 (E, D): the escaped tokens in the order of their rows."""
    backend = backend_of(rows.codes, rows.scales)
    if backend == "triton":
        from kvstrata.kernels.escape_rows_triton import unpack_escape_rows_triton

        return unpack_escape_rows_triton(rows)
    if backend == "numba":
        from kvstrata.kernels.escape_rows_numba import unpack_escape_rows_numba

        return unpack_escape_rows_numba(rows)
    return unpack_escape_rows_reference(rows)


def unpack_escape_rows_reference(rows: EscapeRows) -> torch.Tensor:
    """Return what ``unpack_escape_rows`` returns; the definition."""
    values = dequantize_int8(rows.codes, rows.scales)
    return values @ hadamard(rows.codes.shape[1]).to(values.device)


def scatter_escape_rows(rows: EscapeRows, out: torch.Tensor) -> None:
    """Overwrite the escaped tokens of ``out``, (H, N, 64, D), any float dtype.

    Raises:
        ValueError: The rows do not fit ``out``.
    """
    check_escape_rows(rows, out.shape[0], out.shape[1], out.shape[3])
    backend = backend_of(rows.codes, rows.scales, out)
    if backend == "triton":
        from kvstrata.kernels.escape_rows_triton import scatter_escape_rows_triton as scatter
    elif backend == "numba" and out.is_contiguous() and out.dtype in FLOATS:
        from kvstrata.kernels.escape_rows_numba import scatter_escape_rows_numba as scatter
    else:
        scatter = scatter_escape_rows_reference
    scatter(rows, out)


def scatter_escape_rows_reference(rows: EscapeRows, out: torch.Tensor) -> None:
    """Do what ``scatter_escape_rows`` does; the definition."""
    n, h, t = to_flags(rows.masks.T).nonzero(as_tuple=True)
    out[h, n, t] = unpack_escape_rows_reference(rows).to(out.dtype)
