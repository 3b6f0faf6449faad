"""The small operations between a decoder's matrix products, each in one pass over its rows.

In eager torch they are some twenty calls per layer, each of which takes longer to start than to
run when a step has few rows. Sums and products are float32 inside; results are rounded where
transformers rounds them, but rotation and the gate are rounded once instead of after each product.

Legend: N rows, E hidden size, Q query heads, H KV heads, D head_dim, F intermediate size.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.kernels.backend import backend_of

_LANES = 16


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows divided by their root mean square and times a weight; and the rows' sum.

    Args:
        x: (N, E), bf16, fp16 or fp32.
        residual: Added to ``x`` first; likewise, or None for nothing.
        weight: (E,), of the same dtype.
        eps: Added to the mean square.

    Returns:
        The normalised rows, and ``x + residual``.

    Source:
        RMSNorm, arXiv:1910.07467, equation 4; rounding as in transformers' LlamaRMSNorm.
    """
    if _is_quick(x, x.shape[1]):
        from kvstrata.kernels.decoder_ops_numba import add_rms_norm_numba

        return add_rms_norm_numba(x, residual, weight, eps)
    if backend_of(x) == "triton":
        from kvstrata.kernels.decoder_ops_triton import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``add_rms_norm`` by its definition."""
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), total


def rotate_heads(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return heads rotated to the positions of their rows (``rope.rotate``, by row).

    Args:
        x: (N, heads, D), rows may lie apart; bf16, fp16 or fp32.
        cos: float32 (positions, R), both halves of a row equal; R even, at most D.
        sin: Likewise.
        positions: int64 (N,), rows of the tables.

    Returns:
        (N, heads, D), contiguous.
    """
    half = cos.shape[1] // 2
    if _is_quick(x, half) and x.shape[2] == 2 * half and x.stride()[1:] == (x.shape[2], 1):
        from kvstrata.kernels.decoder_ops_numba import rotate_heads_numba

        return rotate_heads_numba(x, cos, sin, positions)
    if backend_of(x) == "triton":
        from kvstrata.kernels.decoder_ops_triton import rotate_heads_triton

        return rotate_heads_triton(x, cos, sin, positions)
    return rotate_heads_reference(x, cos, sin, positions)


def rotate_heads_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return ``rotate_heads`` by its definition."""
    rotary = cos.shape[1]
    cos, sin = (table[positions.to(table.device)][:, None] for table in (cos, sin))
    turning = x[..., :rotary].float()
    low, high = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([-high, low], -1) * sin
    return torch.cat([turned.to(x.dtype), x[..., rotary:]], -1)


def silu_gate(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of rows that hold both.

    Args:
        x: (N, 2 F), gate, then up; bf16, fp16 or fp32.

    Returns:
        (N, F).

    Source:
        SwiGLU, arXiv:2002.05202, equation 6.
    """
    if _is_quick(x, x.shape[1] // 2):
        from kvstrata.kernels.decoder_ops_numba import silu_gate_numba

        return silu_gate_numba(x)
    if backend_of(x) == "triton":
        from kvstrata.kernels.decoder_ops_triton import silu_gate_triton

        return silu_gate_triton(x)
    return silu_gate_reference(x)


def silu_gate_reference(x: torch.Tensor) -> torch.Tensor:
    """Return ``silu_gate`` by its definition."""
    gate, up = x.float().chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def _is_quick(x: torch.Tensor, width: int) -> bool:
    return width % _LANES == 0 and backend_of(x) == "numba"
