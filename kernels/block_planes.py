"""Bit planes of the components of 64-token blocks: quantise and pack, unpack to numbers.

One component and plane of a block is one 64-bit word, bit t for token t. Within a block the words
go head by head, in a head plane by plane (most significant first), in a plane by component; only
components wider than the plane have a word in it. Refinement words say which quarter of its cell
a value lies in: per head the high bits of components 0 to m - 1, then their low bits; rows of
single tokens are cut from them (``mid_rows``).

Legend: H KV heads, N blocks, D components (head_dim), W words per block, F refinement words per
block, R components kept, the first ones.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.sign_codes import (
    COEFFICIENTS,
    MAX_WIDTH,
    base_levels,
    code_table,
    fine_levels,
    grid_index,
)
from kvstrata.kernels.token_masks import TOKENS, check_masks, count_tokens, to_flags, to_mask

KEPT_MULTIPLE = 16
NOT_FINITE = "components are NaN, infinite or so large that their squares overflow"


@dataclass(frozen=True)
class PlaneLayout:
    """How many bits each component has, and where they lie.

    Worked example: widths ((2, 1, 0, 0, 0, 0, 0, 0),) and mid_counts (8,) make 3 words per block:
    plane 0 of components 0 and 1, plane 1 of component 0; and mid rows of 2 bytes.

    Attributes:
        widths: uint8 (H, D), 0 to 6, not increasing along D.
        mid_counts: Integers (H,): components that mid rows refine, the first ones; multiples of 8.
    """

    widths: torch.Tensor
    mid_counts: torch.Tensor

    def __post_init__(self) -> None:
        if self.widths.dtype != torch.uint8 or self.widths.ndim != 2 or not self.widths.numel():
            raise ValueError(
                f"widths must be uint8 (heads, dim), not {self.widths.dtype} "
                f"{tuple(self.widths.shape)}"
            )
        if int(self.widths.max()) > MAX_WIDTH:
            raise ValueError(f"a width is {int(self.widths.max())}, the limit is {MAX_WIDTH}")
        if (self.widths[:, 1:] > self.widths[:, :-1]).any():
            raise ValueError("widths must not increase along the components")
        counts = self.mid_counts
        if counts.shape != (self.num_heads,) or counts.is_floating_point():
            raise ValueError(f"mid_counts must be {self.num_heads} integers")
        if ((counts < 0) | (counts > self.dim) | (counts % 8 != 0)).any():
            raise ValueError(
                f"mid_counts must be multiples of 8 up to {self.dim}: {counts.tolist()}"
            )

    @property
    def num_heads(self) -> int:
        """Return H."""
        return self.widths.shape[0]

    @property
    def dim(self) -> int:
        """Return D."""
        return self.widths.shape[1]

    @cached_property
    def plane_sizes(self) -> torch.Tensor:
        """Return int64 (H, 6): how many components have a word in each plane."""
        planes = torch.arange(MAX_WIDTH, device=self.widths.device)
        return (self.widths[:, None, :] > planes[:, None]).sum(-1)

    @cached_property
    def words_per_head(self) -> torch.Tensor:
        """Return int64 (H,)."""
        return self.plane_sizes.sum(-1)

    @cached_property
    def word_offsets(self) -> torch.Tensor:
        """Return int64 (H, 6): where each plane's words start in a block."""
        sizes = self.plane_sizes.flatten()
        return (sizes.cumsum(0) - sizes).view(-1, MAX_WIDTH)

    @cached_property
    def num_words(self) -> int:
        """Return W."""
        return int(self.words_per_head.sum())

    @cached_property
    def mid_row_bytes(self) -> torch.Tensor:
        """Return int64 (H,): bytes of one mid token."""
        return self.mid_counts.long() // 4

    def num_kept(self, *, refined: bool) -> int:
        """Return R: components that may be nonzero in some head, rounded up to 16 if D is."""
        most = int(self.plane_sizes[:, 0].max())
        if refined:
            most = max(most, int(self.mid_counts.max()))
        return min(self.dim, -(-max(most, 1) // KEPT_MULTIPLE) * KEPT_MULTIPLE)

    def mid_starts(self, mid: torch.Tensor) -> torch.Tensor:
        """Return int64 (N * H + 1,): where the mid rows of each block and head start, in bytes."""
        sizes = (count_tokens(mid) * self.mid_row_bytes[:, None]).T.flatten()
        return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


@dataclass(frozen=True)
class MidRows:
    """The refinements of mid tokens, as stored.

    Attributes:
        masks: int64 (H, N), the tokens that have a row: no escapes.
        rows: uint8 (bytes,), ``mid_rows.pack_mid_rows``.
        block_offsets: int64 (N + 1,), where each block's rows start.
    """

    masks: torch.Tensor
    rows: torch.Tensor
    block_offsets: torch.Tensor


def encode_block_planes(
    y: torch.Tensor, layout: PlaneLayout, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return base words and what each token loses if only base is read.

    Args:
        y: bf16, fp16 or fp32 (H, N, 64, D), components of unit variance; any strides.
        layout: H heads of D components.
        weights: float32 (H, D): what a squared error costs in each component.

    Returns:
        Words int64 (N, W), error float32 (H, N, 64) =
        sum over c of weights[h, c] * (y - base value) ** 2.

    Raises:
        ValueError: Shapes or types do not fit, or ``y`` is not finite.
    """
    check_components(y, layout)
    check_weights(weights, layout)
    backend = backend_of(y, weights, layout.widths)
    if backend == "numba" and layout.dim % KEPT_MULTIPLE == 0:
        from kvstrata.kernels.block_planes_numba import encode_block_planes_numba as encode
    elif backend == "triton":
        from kvstrata.kernels.block_planes_triton import encode_block_planes_triton as encode
    else:
        encode = encode_block_planes_reference
    words, error = encode(y, layout, weights)
    if not torch.isfinite(error).all():
        raise ValueError(NOT_FINITE)
    return words, error


def encode_block_planes_reference(
    y: torch.Tensor, layout: PlaneLayout, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``encode_block_planes`` returns; the definition."""
    codes = fine_codes(y, layout) >> 2
    rest = y.float() - base_values(codes, layout.widths)
    error = torch.zeros(y.shape[:-1], device=y.device)
    for c in range(layout.dim):
        error += weights[:, None, None, c] * rest[..., c].square()
    by_component = codes.permute(1, 0, 3, 2)  # (N, H, D, 64)
    words = []
    for h, sizes in enumerate(layout.plane_sizes.tolist()):
        for plane, size in enumerate(sizes):
            shift = layout.widths[h, :size, None].long() - 1 - plane
            words.append(to_mask((by_component[:, h, :size] >> shift & 1).bool()))
    return torch.cat(words, 1), error


def fine_codes(y: torch.Tensor, layout: PlaneLayout) -> torch.Tensor:
    """Return int64 (H, N, 64, D): 4 * base code + quarter of its cell."""
    widths = layout.widths.long()[:, None, None].expand(y.shape)
    tables = torch.stack([code_table(w) for w in range(MAX_WIDTH + 1)]).to(y.device)
    return tables[widths, grid_index(torch.nan_to_num(y.float()))].long()


def base_values(codes: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Return the float32 value of each code, int64 (H, ..., D), for widths (H, D)."""
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for h, c in torch.cartesian_prod(*map(torch.arange, widths.shape)).tolist():
        values[h, ..., c] = base_levels(int(widths[h, c])).to(codes.device)[codes[h, ..., c]]
    return values


def decode_block_planes(
    words: torch.Tensor,
    layout: PlaneLayout,
    mid: MidRows | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return components of unit variance: y (H, N * 64, R), tokens in order.

    Args:
        words: int64 (N, W).
        layout: What they were encoded with.
        mid: Refinements; their tokens get the finer values. None reads base alone.
        dtype: float32 or bf16, to which values are rounded.

    Returns:
        The first R = ``layout.num_kept(refined=mid is not None)`` components; the rest is zero.

    Raises:
        ValueError: Sizes or types do not fit.
    """
    check_words(words, layout)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"components are read as float32 or bf16, not {dtype}")
    if mid is not None:
        check_mid_rows(mid, layout, words.shape[0])
    backend = backend_of(words, layout.widths)
    if backend == "numba" and layout.dim % KEPT_MULTIPLE == 0:
        from kvstrata.kernels.block_planes_numba import decode_block_planes_numba as decode
    elif backend == "triton":
        from kvstrata.kernels.block_planes_triton import decode_block_planes_triton as decode
    else:
        decode = decode_block_planes_reference
    return decode(words, layout, mid, dtype)


def decode_block_planes_reference(
    words: torch.Tensor, layout: PlaneLayout, mid: MidRows | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return what ``decode_block_planes`` returns; the definition."""
    num_blocks, kept = words.shape[0], layout.num_kept(refined=mid is not None)
    bits = to_flags(words).mT.long()  # (N, 64, W)
    shape = (layout.num_heads, num_blocks, TOKENS, kept)
    y = torch.zeros(shape, dtype=torch.float32, device=words.device)
    codes = torch.zeros(shape, dtype=torch.int64, device=words.device)
    for h, sizes in enumerate(layout.plane_sizes.tolist()):
        for plane, size in enumerate(sizes):
            start = int(layout.word_offsets[h, plane])
            bit = bits[..., start : start + size]
            codes[h, ..., :size] = codes[h, ..., :size] << 1 | bit
            steps = [COEFFICIENTS[int(w)][plane] for w in layout.widths[h, :size]]
            y[h, ..., :size] += (2 * bit - 1) * torch.tensor(steps, device=words.device)
    if mid is not None:
        _refine(y, codes, layout, mid)
    return y.flatten(1, 2).to(dtype)


def _refine(y: torch.Tensor, codes: torch.Tensor, layout: PlaneLayout, mid: MidRows) -> None:
    """Put the fine values of mid tokens into ``y``, (H, N, 64, R)."""
    at = mid.block_offsets.tolist()
    flags = to_flags(mid.masks)
    for n in range(codes.shape[1]):
        start = at[n]
        for h, count in enumerate(layout.mid_counts.tolist()):
            for t in flags[h, n].nonzero().flatten().tolist():
                row = mid.rows[start : start + count // 4]
                start += count // 4
                bits = (row[:, None] >> torch.arange(8, device=row.device) & 1).flatten().long()
                fine = codes[h, n, t, :count] << 2 | bits[:count] << 1 | bits[count:]
                for c, width in enumerate(layout.widths[h, :count].tolist()):
                    y[h, n, t, c] = fine_levels(width).to(y.device)[fine[c]]


def check_mid_rows(mid: MidRows, layout: PlaneLayout, num_blocks: int) -> None:
    """Refuse mid rows whose sizes are not those that their masks tell.

    Raises:
        ValueError: They are not.
    """
    check_masks("mid masks", mid.masks, layout.num_heads, num_blocks)
    offsets = mid.block_offsets
    if offsets.dtype != torch.int64 or offsets.shape != (num_blocks + 1,):
        raise ValueError(f"mid block offsets must be int64 ({num_blocks + 1},)")
    if mid.rows.dtype != torch.uint8 or mid.rows.ndim != 1:
        raise ValueError(f"mid rows must be flat uint8, not {mid.rows.dtype}")
    told = layout.mid_starts(mid.masks)[:: layout.num_heads]
    if not torch.equal(told, offsets) or mid.rows.numel() != int(told[-1]):
        raise ValueError(
            f"{mid.rows.numel()} bytes of mid rows do not fit the masks, "
            f"which tell {int(told[-1])} bytes in {num_blocks} blocks"
        )


def check_components(y: torch.Tensor, layout: PlaneLayout) -> None:
    """Refuse components of another shape or type.

    Raises:
        ValueError: They have it.
    """
    wanted = (layout.num_heads, TOKENS, layout.dim)
    if y.ndim != 4 or (y.shape[0], *y.shape[2:]) != wanted or y.dtype not in FLOATS:
        raise ValueError(
            f"components must be bf16, fp16 or fp32 ({wanted[0]}, blocks, {TOKENS}, {wanted[2]}), "
            f"not {y.dtype} {tuple(y.shape)}"
        )


def check_weights(weights: torch.Tensor, layout: PlaneLayout) -> None:
    """Refuse weights of another shape or type.

    Raises:
        ValueError: They have it.
    """
    if weights.dtype != torch.float32 or weights.shape != layout.widths.shape:
        raise ValueError(
            f"weights must be float32 {tuple(layout.widths.shape)}, "
            f"not {weights.dtype} {tuple(weights.shape)}"
        )


def check_words(words: torch.Tensor, layout: PlaneLayout) -> None:
    """Refuse words that are not those of the layout.

    Raises:
        ValueError: They are not.
    """
    if words.dtype != torch.int64 or words.ndim != 2 or words.shape[1] != layout.num_words:
        raise ValueError(
            f"words must be int64 (blocks, {layout.num_words}), "
            f"not {words.dtype} {tuple(words.shape)}"
        )
