"""Rotary position embedding: rotation of keys at positions, and back.

Layout "rotate half" (NeoX, Llama): channel i of the first half of the rotated channels turns with
channel i of the second half. Channels beyond the rotated ones are left as they are.

Legend: H heads, N tokens, D head_dim, R rotated channels, P positions that the tables hold.
"""

import torch

from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.huge_memory import empty_huge


def rotate(
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``keys`` rotated to their positions, or back from them; computed in float32.

    Rotating and rotating back restores float32 keys to about 1e-7 and others to their rounding.
    Tables that are scaled (YaRN's attention factor) scale both ways, so unscale them first.

    Args:
        keys: (..., N, D), bf16, fp16 or fp32.
        cos: float32 (P, R), R even and at most D; as transformers has it, both halves of R are
            usually equal. Row i holds position i.
        sin: Likewise.
        positions: int64 (N,), the table row of each token; without it P must be N, row by row.
        inverse: Turn back.
        out: Where to write, contiguous, shape and dtype of ``keys``; may be ``keys`` itself, but
            must not share memory with them otherwise.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        ValueError: Shapes, dtypes or devices that do not belong together, or positions outside the
            tables.

    Source:
        RoFormer, arXiv:2104.09864, equation 34.
    """
    _check(keys, cos, sin, positions, out)
    backend = backend_of(keys, cos, sin, *(t for t in (positions, out) if t is not None))
    if out is None:
        out = empty_huge(tuple(keys.shape), keys.dtype, keys.device)
    elif _shares_memory(keys, out) and not (
        keys.is_contiguous() and keys.data_ptr() == out.data_ptr()
    ):
        raise ValueError("keys in place must be contiguous, and out be the keys themselves")
    if keys.numel() == 0:
        return out
    cos, sin = cos.contiguous(), sin.contiguous()
    source = keys.contiguous().view(-1, *keys.shape[-2:])
    target = out.view(source.shape)
    if backend == "numba":
        from kvstrata.kernels.rope_numba import rotate_numba

        rotate_numba(source, cos, sin, positions, inverse, target)
    elif backend == "triton":
        from kvstrata.kernels.rope_triton import rotate_triton

        rotate_triton(source, cos, sin, positions, inverse, target)
    else:
        rotate_reference(source, cos, sin, positions, inverse, target)
    return out


def rotate_reference(
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    inverse: bool,
    out: torch.Tensor,
) -> None:
    """Write ``rotate`` of contiguous (H, N, D) to ``out``, maybe ``keys``; the definition."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    half = cos.shape[-1] // 2
    turned = keys[..., : 2 * half].float()
    first, second = turned[..., :half], turned[..., half:]
    swapped = torch.cat([-second, first], dim=-1)
    turned = turned * cos + swapped * (-sin if inverse else sin)
    out[..., 2 * half :] = keys[..., 2 * half :]
    out[..., : 2 * half] = turned.to(out.dtype)


def _shares_memory(keys: torch.Tensor, out: torch.Tensor) -> bool:
    """Tell whether the spans of two tensors in memory overlap."""
    if keys.numel() == 0 or keys.device.type == "meta":
        return False
    steps = zip(keys.shape, keys.stride(), strict=True)
    end = keys.data_ptr() + keys.itemsize * (1 + sum((n - 1) * step for n, step in steps))
    return keys.data_ptr() < out.data_ptr() + out.nbytes and out.data_ptr() < end


def _check(
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    if keys.ndim < 2 or keys.dtype not in FLOATS:
        raise ValueError(
            f"keys must be bf16, fp16 or fp32 (..., tokens, head_dim), "
            f"not {keys.dtype} of shape {tuple(keys.shape)}"
        )
    num_tokens, dim = keys.shape[-2:]
    if cos.shape != sin.shape or cos.ndim != 2 or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(
            f"cos and sin must be float32 of one shape (positions, rotary_dim), "
            f"not {cos.dtype} {tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}"
        )
    if cos.shape[1] % 2 or not 0 < cos.shape[1] <= dim:
        raise ValueError(f"rotary_dim must be even and at most {dim}, not {cos.shape[1]}")
    if positions is None:
        if cos.shape[0] != num_tokens:
            raise ValueError(f"{num_tokens} tokens need as many rows of cos, not {cos.shape[0]}")
    elif positions.shape != (num_tokens,) or positions.dtype != torch.int64:
        raise ValueError(
            f"{num_tokens} tokens need as many int64 positions, "
            f"not {positions.dtype} of shape {tuple(positions.shape)}"
        )
    elif num_tokens and (positions.min() < 0 or positions.max() >= cos.shape[0]):
        raise ValueError(
            f"positions {int(positions.min())} to {int(positions.max())} are not all "
            f"within the {cos.shape[0]} rows of cos"
        )
    if out is not None and (
        out.shape != keys.shape or out.dtype != keys.dtype or not out.is_contiguous()
    ):
        raise ValueError("out must be contiguous, with the shape and dtype of keys")
