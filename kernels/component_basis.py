"""Between tokens and their components: encode tokens to planes, expand planes to tokens.

y = (x - mean) @ forward has components of unit variance, sorted by what they cost; and
x = y @ inverse + mean. Large products go to the matrix unit in bf16 with float32 sums, where y is
about 3 at most and its rounding error below the cells of six bits.

Legend: H KV heads, N blocks, D head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.block_planes import (
    KEPT_MULTIPLE,
    MidRows,
    PlaneLayout,
    check_mid_rows,
    check_weights,
    check_words,
    decode_block_planes_reference,
    encode_block_planes,
)
from kvstrata.kernels.escape_rows import EscapeRows, check_escape_rows, scatter_escape_rows
from kvstrata.kernels.huge_memory import empty_huge
from kvstrata.kernels.token_masks import TOKENS, TokenClasses, check_masks, to_flags
from kvstrata.kernels.value_bias import ValueBias, decode_value_bias

_SMALLEST = 32  # below it half a token does not fill a vector


@dataclass(frozen=True)
class ComponentBasis:
    """The calibrated tables of the keys or values of one layer, or of several as one.

    Attributes:
        layout: Widths and refined components.
        mean: float32 (H, D).
        forward: float32 (H, D, D): A / deviation.
        inverse: float32 (H, D, D): deviation * A ** -1.
        deviation: float32 (H, D), above 0.
    """

    layout: PlaneLayout
    mean: torch.Tensor
    forward: torch.Tensor
    inverse: torch.Tensor
    deviation: torch.Tensor
    _made: dict[object, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape = tuple(self.layout.widths.shape)
        wanted = {"mean": shape, "deviation": shape}
        wanted |= dict.fromkeys(("forward", "inverse"), (*shape, shape[1]))
        for name, size in wanted.items():
            table: torch.Tensor = getattr(self, name)
            if table.dtype != torch.float32 or tuple(table.shape) != size:
                raise ValueError(
                    f"{name} must be float32 {size}, not {table.dtype} {tuple(table.shape)}"
                )
            if not torch.isfinite(table).all():
                raise ValueError(f"{name} is not finite")
        if not (self.deviation > 0).all():
            raise ValueError("deviation must be above zero")

    def on(self, device: torch.device) -> "ComponentBasis":
        """Return these tables on a device, brought there once."""
        if self.mean.device == device:
            return self
        layout = PlaneLayout(self.layout.widths.to(device), self.layout.mid_counts.to(device))
        tables = (self.mean, self.forward, self.inverse, self.deviation)
        moved: ComponentBasis = self.once(
            device, lambda: ComponentBasis(layout, *(table.to(device) for table in tables))
        )
        return moved

    def matrix(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return ``forward`` or ``inverse`` in another format, converted once."""
        table: torch.Tensor = self.once(
            (name, dtype), lambda: getattr(self, name).to(dtype).contiguous()
        )
        return table

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned at the first call with this key; tables do not change."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the format in which tokens of a format are multiplied."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def encode_tokens(
    x: torch.Tensor,
    basis: ComponentBasis,
    weights: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return components, base words and each token's error.

    Args:
        x: Keys before RoPE, or values: bf16, fp16 or fp32 (H, N, 64, D), any strides.
        basis: H heads of D components.
        weights: float32 (H, D), as for ``encode_block_planes``.
        out: Where to write y, contiguous; fresh memory costs as much as a product.

    Returns:
        y (H, N, 64, D), float32 for float32 tokens, else bf16, which mid rows and value bias need;
        words int64 (N, W); error float32 (H, N, 64).

    Raises:
        ValueError: Shapes or types do not fit, or ``x`` is not finite.
    """
    shape = (basis.layout.num_heads, TOKENS, basis.layout.dim)
    if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != shape or x.dtype not in FLOATS:
        raise ValueError(
            f"tokens must be bf16, fp16 or fp32 ({shape[0]}, blocks, {TOKENS}, {shape[2]}), "
            f"not {x.dtype} {tuple(x.shape)}"
        )
    check_weights(weights, basis.layout)
    if out is not None:
        _check_out(out, tuple(x.shape), product_dtype(x.dtype))
    backend, quick = backend_of(x, basis.mean, weights), shape[2] % KEPT_MULTIPLE == 0
    if backend == "numba" and quick:
        from kvstrata.kernels.component_basis_numba import encode_tokens_numba

        return encode_tokens_numba(x, basis, weights, out)
    if backend == "triton" and quick:
        from kvstrata.kernels.component_basis_triton import encode_tokens_triton

        return encode_tokens_triton(x, basis, weights, out)
    y = to_components(x, basis)
    y = y if out is None else out.copy_(y)
    return y, *encode_block_planes(y, basis.layout, weights)


def to_components(x: torch.Tensor, basis: ComponentBasis) -> torch.Tensor:
    """Return y (H, N, 64, D) of tokens (H, N, 64, D), in the format of their product."""
    dtype = product_dtype(x.dtype)
    centred = (x.float() - basis.mean[:, None, None]).to(dtype).flatten(1, 2)
    return torch.bmm(centred, basis.matrix("forward", dtype)).view(x.shape)


def expand(
    words: torch.Tensor,
    basis: ComponentBasis,
    classes: TokenClasses,
    *,
    mid: MidRows | None = None,
    bias: ValueBias | None = None,
    escapes: EscapeRows | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the tokens of planes, (H, N, 64, D), contiguous.

    Dropped tokens get the mean; escaped ones too where ``escapes`` is missing.

    Args:
        words: int64 (N, W).
        basis: What they were encoded with.
        classes: int64 masks (H, N), ``token_classes`` of the stored ones.
        mid: Refinements of the tokens in ``classes.mid``; None reads them at base.
        bias: What is added to the tokens in ``classes.base``.
        escapes: The tokens in ``classes.escape``.
        rotation: cos and sin, float32 (N * 64, D), both halves of a row equal; turns every token,
            as ``rope.rotate`` does.
        dtype: bf16, fp16 or fp32.
        out: Where to write, contiguous, (H, N, 64, D) of ``dtype``.

    Raises:
        ValueError: Sizes or types do not fit one another.
    """
    check_expand(words, basis, classes, mid, bias, escapes, rotation, dtype)
    dim, size = basis.layout.dim, (basis.layout.num_heads, words.shape[0], TOKENS, basis.layout.dim)
    if out is None:
        out = empty_huge(size, dtype, words.device)
    _check_out(out, size, dtype)
    shift = None if bias is None else shift_of(basis, bias)
    quick = dim % KEPT_MULTIPLE == 0 and dim >= _SMALLEST
    backend = backend_of(words, basis.mean)
    if backend == "numba" and quick:
        from kvstrata.kernels.component_basis_numba import expand_numba as run
    elif backend == "triton" and quick:
        from kvstrata.kernels.component_basis_triton import expand_triton as run
    else:
        run = expand_reference
    run(words, basis, classes, mid, shift, escapes, rotation, out)
    return out


def shift_of(basis: ComponentBasis, bias: ValueBias) -> torch.Tensor:
    """Return what base tokens get, float32 (H, N, D): mean and bias.

    In float64, rounded once: BLAS is not asked for its order, and blocks read the same alone.
    """
    rows = decode_value_bias(bias).transpose(0, 1).double() / basis.deviation.double()[:, None]
    mean, inverse = (basis.matrix(name, torch.float64) for name in ("mean", "inverse"))
    return torch.baddbmm(mean[:, None], rows, inverse).float()


def expand_reference(
    words: torch.Tensor,
    basis: ComponentBasis,
    classes: TokenClasses,
    mid: MidRows | None,
    shift: torch.Tensor | None,
    escapes: EscapeRows | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
) -> None:
    """Write what ``expand`` returns to ``out``, all in float32; ``shift`` is mean plus bias."""
    y = decode_block_planes_reference(words, basis.layout, mid, torch.float32)
    x = torch.bmm(y, basis.inverse[:, : y.shape[2]]).unflatten(1, (-1, TOKENS))
    mean = basis.mean[:, None, None].expand(x.shape)
    added = mean
    if shift is not None:
        added = torch.where(to_flags(classes.base)[..., None], shift[:, :, None], mean)
    x = torch.where(to_flags(classes.base | classes.mid)[..., None], x + added, mean)
    if escapes is not None:
        scatter_escape_rows(escapes, x)
    if rotation is not None:
        half = x.shape[-1] // 2
        cos, sin = (table[:, :half].view(-1, TOKENS, half) for table in rotation)
        low, high = x[..., :half], x[..., half:]
        x = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    out.copy_(x)


def check_expand(
    words: torch.Tensor,
    basis: ComponentBasis,
    classes: TokenClasses,
    mid: MidRows | None,
    bias: ValueBias | None,
    escapes: EscapeRows | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError unless the arguments of ``expand`` fit one another."""
    check_words(words, basis.layout)
    num_heads, num_blocks, dim = basis.layout.num_heads, words.shape[0], basis.layout.dim
    for name, masks in classes._asdict().items():
        check_masks(f"{name} masks", masks, num_heads, num_blocks)
    if mid is not None:
        check_mid_rows(mid, basis.layout, num_blocks)
        if not torch.equal(mid.masks, classes.mid):
            raise ValueError("mid rows are of other tokens than the mid class")
    if escapes is not None:
        check_escape_rows(escapes, num_heads, num_blocks, dim)
        if not torch.equal(escapes.masks, classes.escape):
            raise ValueError("escape rows are of other tokens than the escape class")
    if bias is not None and bias.nibbles.shape != (num_blocks, num_heads, dim // 2):
        raise ValueError(
            f"bias must be ({num_blocks}, {num_heads}, {dim // 2}), not {tuple(bias.nibbles.shape)}"
        )
    if dtype not in FLOATS:
        raise ValueError(f"tokens are expanded to bf16, fp16 or fp32, not {dtype}")
    for table in rotation or ():
        if table.dtype != torch.float32 or table.shape != (num_blocks * TOKENS, dim) or dim % 2:
            raise ValueError(
                f"cos and sin must be float32 ({num_blocks * TOKENS}, {dim}) with an even dim, "
                f"not {table.dtype} {tuple(table.shape)}"
            )


def _check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {dtype} {shape}, not {out.dtype} {tuple(out.shape)}"
        )
