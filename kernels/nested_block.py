"""The nested block codec: KV blocks to records of 2 + 3 bits per key and 2 + 2 per value, and back.

Keys are coded per channel of a block (``quantize_channels``). Values are turned by a Hadamard
matrix and coded per token against its root mean square (``quantize_gaussian``). The BASE record
alone reads coarsely, with the MID record finely. ``NestedLayout`` tells the bytes.

Legend: L layers, H KV heads, N blocks, T block tokens (64), D head_dim, U units of 16 tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.hadamard import turn
from kvstrata.kernels.huge_memory import empty_huge
from kvstrata.kernels.nested_layout import TOKENS, UNIT, NestedLayout, Rows
from kvstrata.kernels.planes import pack_planar, unpack_planar_reference
from kvstrata.kernels.quantize import (
    BASE_BITS,
    KEY_BITS,
    VALUE_BITS,
    decode_scales,
    dequantize_channels,
    dequantize_channels_base,
    gaussian_base_levels,
    gaussian_levels,
    quantize_channels,
    quantize_gaussian,
)


def encode_blocks(
    keys: torch.Tensor, values: torch.Tensor, num_sinks: int = 0, lead_bytes: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the BASE and MID records of every block and layer.

    Equal input gives equal bytes on every machine and device.

    Args:
        keys: (L, H, N, T, D); bf16, fp16 or fp32, any strides.
        values: The same shape, dtype and device.
        num_sinks: So many of the N x T tokens, the first ones, do not widen the range of the keys'
            codes, and their key codes mean nothing: they are stored elsewhere.
        lead_bytes: Room to leave before each BASE record, for the caller to fill; even, because
            fp16 numbers follow.

    Returns:
        uint8 (N, L, lead_bytes + base_bytes) and uint8 (N, L, mid_bytes).

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or a value is not finite or beyond fp16
            (of keys that are no sinks, and of the root mean squares of values).
    """
    _check_blocks(keys, values)
    if lead_bytes < 0 or lead_bytes % 2:
        raise ValueError(f"lead_bytes must be even and not negative, not {lead_bytes}")
    layers, heads, num_blocks, _, dim = keys.shape
    layout = NestedLayout.of(heads, dim)
    backend = backend_of(keys, values)
    if backend == "reference" or not layers * num_blocks:
        base, mid = encode_blocks_reference(keys, values, num_sinks)
        return torch.nn.functional.pad(base, (lead_bytes, 0)), mid
    shape = (num_blocks, layers)
    base = empty_huge((*shape, lead_bytes + layout.base_bytes), torch.uint8, keys.device)
    mid = empty_huge((*shape, layout.mid_bytes), torch.uint8, keys.device)
    if backend == "numba":
        from kvstrata.kernels.nested_encode_numba import encode_blocks_numba

        faults = encode_blocks_numba(keys, values, num_sinks, layout, base, mid)
    else:
        from kvstrata.kernels.nested_block_triton import encode_blocks_triton

        faults = encode_blocks_triton(keys, values, num_sinks, layout, base, mid)
    for fault, what in ((1, "keys"), (2, "values")):
        if faults & fault:
            raise ValueError(f"{what} are not finite or exceed the range of fp16")
    return base, mid


def decode_blocks(
    base: Sequence[Rows],
    mid: Sequence[Rows] | None,
    layout: NestedLayout,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values (L, H, N, T, D) of the given records.

    Args:
        base: Per block its layers' BASE records: uint8 (L, base_bytes) or wider, rows at any
            distance, in host memory; read in place.
        mid: The same for MID records; None reads BASE alone.
        layout: Of the records.
        dtype: bf16, fp16 or fp32.
        device: Where the result lies.

    Raises:
        ValueError: No block, or records of other shapes or dtypes than the layout asks for.
    """
    device = torch.device(device)
    _check_rows(base, layout.base_bytes, "base")
    if mid is not None:
        _check_rows(mid, layout.mid_bytes, "mid")
        if (len(mid), mid[0].shape[0]) != (len(base), base[0].shape[0]):
            raise ValueError("base and mid must be of the same blocks and layers")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, not {dtype}")
    shape = (base[0].shape[0], layout.heads, len(base), TOKENS, layout.dim)
    keys, values = empty_huge(shape, dtype, device), empty_huge(shape, dtype, device)
    backend = backend_of(keys)
    if backend == "triton" and layout.dim & -layout.dim < UNIT:  # too small for tensor cores
        backend = "reference"
    if backend == "numba":
        from kvstrata.kernels.nested_decode_numba import decode_blocks_numba

        decode_blocks_numba(base, mid, layout, keys, values)
        return keys, values
    stacked = _stack(base, layout.base_bytes).to(device)
    fine = None if mid is None else _stack(mid, layout.mid_bytes).to(device)
    if backend == "triton":
        from kvstrata.kernels.nested_block_triton import decode_blocks_triton

        decode_blocks_triton(stacked, fine, layout, keys, values)
    else:
        for out, read in zip(
            (keys, values), decode_blocks_reference(stacked, fine, layout), strict=True
        ):
            out.copy_(read)
    return keys, values


def encode_blocks_reference(
    keys: torch.Tensor, values: torch.Tensor, num_sinks: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``encode_blocks`` returns, without room before the BASE records."""
    _, _, num_blocks, tokens, dim = keys.shape
    place = torch.arange(num_blocks * tokens, device=keys.device).view(num_blocks, tokens)
    skipped = (place < num_sinks).expand(keys.shape[:-1])
    key_codes, minimum, step = quantize_channels(keys.float(), skipped)
    value_codes, peak, scale = quantize_gaussian(turn(values.float()))
    key_codes = key_codes.flatten(-2)
    # (U, 16, groups, size) to (U, size, 16, groups)
    size = dim & -dim
    value_codes = value_codes.unflatten(-1, (-1, size)).unflatten(-3, (-1, UNIT))
    value_codes = value_codes.permute(0, 1, 2, 3, 6, 4, 5).flatten(3)
    base = _records(
        minimum,
        step,
        peak[..., None],
        scale,
        pack_planar(key_codes >> (KEY_BITS - BASE_BITS), 2),
        pack_planar(value_codes >> (VALUE_BITS - BASE_BITS), 2),
    )
    mid = _records(
        pack_planar(key_codes >> 1 & 3, 2),
        pack_planar(key_codes & 1, 1),
        pack_planar(value_codes & 3, 2),
    )
    return base, mid


def _records(*fields: torch.Tensor) -> torch.Tensor:
    """Return uint8 (N, L, bytes): the fields, each (L, H, N, ...), side by side, heads first."""
    flat = [
        # A copy, because ``contiguous`` keeps odd strides of size-1 axes, which ``view`` refuses.
        field.permute(2, 0, 1, 3)
        .clone(memory_format=torch.contiguous_format)
        .view(torch.uint8)
        .flatten(2)
        for field in fields
    ]
    return torch.cat(flat, -1)


def decode_blocks_reference(
    base: torch.Tensor, mid: torch.Tensor | None, layout: NestedLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 keys and values (L, H, N, T, D) of uint8 records (N, L, bytes)."""
    heads, dim = layout.heads, layout.dim
    scales = layout.scales
    parameters = base[..., :scales].clone().view(torch.float16)
    minimum = parameters[..., : heads * dim].unflatten(-1, (heads, dim))
    step = parameters[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim))
    scale = decode_scales(
        parameters[..., 2 * heads * dim :],
        base[..., scales : layout.keys].unflatten(-1, (heads, TOKENS)),
    )
    key_codes = _codes(base[..., layout.keys : layout.values], heads, 2)
    value_codes = _codes(base[..., layout.values : layout.base_bytes], heads, 2)
    if mid is None:
        keys = dequantize_channels_base(key_codes.unflatten(-1, (TOKENS, dim)), minimum, step)
        levels = gaussian_base_levels(value_codes)
    else:
        key_codes = (key_codes << 2 | _codes(mid[..., : layout.mid_bits], heads, 2)) << 1
        key_codes |= _codes(mid[..., layout.mid_bits : layout.mid_values], heads, 1)
        keys = dequantize_channels(key_codes.unflatten(-1, (TOKENS, dim)), minimum, step)
        fine = _codes(mid[..., layout.mid_values : layout.mid_bytes], heads, 2)
        levels = gaussian_levels(value_codes << 2 | fine)
    # (U, size, 16, groups) to (T, D); sums of integers are exact, whatever their order.
    size = dim & -dim
    units = levels.unflatten(-1, (-1, size, UNIT, dim // size))
    turned = turn(units.permute(0, 1, 2, 3, 5, 6, 4).flatten(-2).flatten(-3, -2), scaled=False)
    factor = scale * torch.tensor(layout.norm, device=base.device)
    values = turned * factor[..., None]
    return keys.permute(1, 2, 0, 3, 4), values.permute(1, 2, 0, 3, 4)


def _codes(packed: torch.Tensor, heads: int, bits: int) -> torch.Tensor:
    """Return uint8 codes (N, L, H, T x D) of packed bytes (N, L, H x P)."""
    return unpack_planar_reference(packed.unflatten(-1, (heads, -1)), bits)


def _check_blocks(keys: torch.Tensor, values: torch.Tensor) -> None:
    if keys.ndim != 5 or keys.shape[3] != TOKENS or keys.shape != values.shape:
        raise ValueError(
            f"keys and values must both be (layers, heads, blocks, {TOKENS}, head_dim), not "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if keys.dtype not in FLOATS or keys.dtype != values.dtype:
        raise ValueError(
            f"keys and values must both be bfloat16, float16 or float32, not {keys.dtype} and "
            f"{values.dtype}"
        )


def _check_rows(rows: Sequence[Rows], size: int, name: str) -> None:
    if not rows:
        raise ValueError(f"{name} must hold the records of at least one block")
    for block in rows:
        if block.ndim != 2 or block.dtype != np.uint8 or block.shape[1] < size:
            raise ValueError(
                f"{name} must be uint8 (layers, {size} bytes or more), not {block.dtype} "
                f"{block.shape}"
            )
        if block.shape[0] != rows[0].shape[0] or block.strides[1] != 1 or block.strides[0] < 0:
            raise ValueError(f"{name} must have the same layers in every block, and dense rows")


def _stack(rows: Sequence[Rows], size: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([block[:, :size] for block in rows]))
