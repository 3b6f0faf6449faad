# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The nested block codec on a GPU: one program per KV head of a block.

Bytes equal the reference's: sums run in its order, divisions and roots are the correctly rounded
ones, and products are not fused with sums. Decoding sums integers, which is exact in any order, so
it may use the tensor cores: levels and signs are exact in fp16, sums in float32.
"""

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase
from kvstrata.kernels.nested_layout import TOKENS, UNIT, NestedLayout
from kvstrata.kernels.quantize import (
    BASE_LEVELS,
    BASE_TOP,
    KEY_TOP,
    LEVELS,
    LEVELS_PER_SIGMA,
    SCALE_BORDERS,
    SCALE_FACTORS,
    THRESHOLDS,
    TINY,
)

_TOKENS, _UNIT = tl.constexpr(TOKENS), tl.constexpr(UNIT)
_TINY, _SIGMA = tl.constexpr(TINY), tl.constexpr(LEVELS_PER_SIGMA)
_KEY_TOP, _HALF_END = tl.constexpr(KEY_TOP), tl.constexpr(65520.0)
_BASE_CENTRE, _BASE_STEP = tl.constexpr(BASE_TOP / 2), tl.constexpr(BASE_TOP + 1)
_MAX_CHUNK = 64


def _octets(levels: tuple[int, ...]) -> int:
    """Return levels as the bytes of one number, the first in the lowest."""
    return int.from_bytes(bytes(levels), "little")


_INNER, _OUTER = tl.constexpr(_octets(LEVELS[:4])), tl.constexpr(_octets(LEVELS[4:]))
_BASE_INNER, _BASE_OUTER = tl.constexpr(BASE_LEVELS[0]), tl.constexpr(BASE_LEVELS[1])
_T0, _T1, _T2, _T3, _T4, _T5, _T6 = (tl.constexpr(border) for border in THRESHOLDS)


def decode_blocks_triton(
    base: torch.Tensor,
    mid: torch.Tensor | None,
    layout: NestedLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write ``keys`` and ``values``, (L, H, N, T, D), from uint8 records (N, L, bytes)."""
    layers, heads, num_blocks, _, dim = keys.shape
    grid = (layers * heads * num_blocks,)
    fine = base if mid is None else mid
    halves = base[..., : layout.scales].contiguous().view(torch.float16)
    places = heads, layers, num_blocks
    size = dim & -dim
    _decode_keys_kernel[grid](
        base, halves, fine, keys, *places, layout.base_bytes, layout.scales // 2, fine.shape[-1],
        layout.keys, layout.mid_bits,
        dim, triton.next_power_of_2(dim), mid is not None, enable_fp_fusion=False,
    )  # fmt: skip
    _decode_values_kernel[grid](
        base, halves, fine, _table(SCALE_FACTORS, keys.device), values, *places,
        layout.base_bytes, layout.scales // 2, fine.shape[-1],
        layout.scales, layout.values, layout.mid_values,
        layout.norm, dim, size, min(size, _MAX_CHUNK), mid is not None, enable_fp_fusion=False,
        num_warps=_WARPS if torch.version.hip else _DECODE_WARPS_NVIDIA,
    )  # fmt: skip


def encode_blocks_triton(
    keys: torch.Tensor,
    values: torch.Tensor,
    num_sinks: int,
    layout: NestedLayout,
    base: torch.Tensor,
    mid: torch.Tensor,
) -> int:
    """Fill the records; returns faults as ``encode_blocks_numba`` does."""
    layers, heads, num_blocks, _, dim = keys.shape
    grid = (layers * heads * num_blocks,)
    faults = torch.zeros(1, dtype=torch.int32, device=keys.device)
    lead = base.shape[-1] - layout.base_bytes
    halves = torch.empty(
        (num_blocks, layers, layout.scales // 2), dtype=torch.float16, device=keys.device
    )
    places = heads, layers, num_blocks
    size = dim & -dim
    factors, borders = (_table(t, keys.device) for t in (SCALE_FACTORS, SCALE_BORDERS[:16]))
    _encode_keys_kernel[grid](
        keys, *keys.stride(), halves, base, mid, faults, *places, num_sinks,
        base.shape[-1], layout.scales // 2, layout.mid_bytes, lead + layout.keys, layout.mid_bits,
        dim, triton.next_power_of_2(dim), enable_fp_fusion=False,
    )  # fmt: skip
    _encode_values_kernel[grid](
        values, *values.stride(), halves, base, mid, factors, borders, faults, *places,
        base.shape[-1], layout.scales // 2, layout.mid_bytes,
        lead + layout.scales, lead + layout.values, layout.mid_values,
        layout.unit, 1 / dim, dim, size, size.bit_length() - 1, enable_fp_fusion=False,
    )  # fmt: skip
    base[..., lead : lead + layout.scales] = halves.view(torch.uint8)
    return int(faults.item())


def _table(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


@triton.jit
def _place(heads, layers, num_blocks):
    """Return this program's head, (block, layer) row and (layer, head, block) row."""
    pid = tl.program_id(0).to(tl.int64)
    n = pid % num_blocks
    h = pid // num_blocks % heads
    i = pid // num_blocks // heads
    return i, h, n, n * layers + i


@triton.jit
def _decode_keys_kernel(
    base, halves, mid, out,
    heads, layers, num_blocks, base_stride, halves_stride, mid_stride, keys_at, bits_at,
    DIM: tl.constexpr, WIDE: tl.constexpr, HAS_MID: tl.constexpr,
):  # fmt: skip
    """Decode the keys of one head of one block.

    .63 bytes in and itemsize out per key, 12 operations: memory bound. 8,192 blocks of 8 heads x
    128 (one layer) take at least 8192 * 8 * 8192 * 2.63 B / 3.35 TB/s = 0.42 ms on an H100.
    """
    i, h, n, row = _place(heads, layers, num_blocks)
    r, d = tl.arange(0, _UNIT)[:, None], tl.arange(0, WIDE)[None, :]
    inside = d < DIM
    parameters = halves + row * halves_stride + h * DIM + d
    minimum = tl.load(parameters, inside, 0.0).to(tl.float32)
    step = tl.load(parameters + heads * DIM, inside, 0.0).to(tl.float32)
    at = h * (_UNIT * DIM) + r * DIM + d
    coarse = tl.load(base + row * base_stride + keys_at + at, inside, 0).to(tl.int32)
    if HAS_MID:
        fine = tl.load(mid + row * mid_stride + at, inside, 0).to(tl.int32)
        q = bits_at + h * (_UNIT // 2 * DIM) + (r % 8) * DIM + d
        bits = tl.load(mid + row * mid_stride + q, inside, 0).to(tl.int32) >> (r // 8)
    else:
        minimum = minimum + _BASE_CENTRE * step
        step = step * _BASE_STEP
    target = out + (((i * heads + h) * num_blocks + n) * _TOKENS + r) * DIM + d
    for u in tl.static_range(4):
        code = coarse >> (2 * u) & 3
        if HAS_MID:
            code = code << 3 | (fine >> (2 * u) & 3) << 1 | (bits >> (2 * u) & 1)
        value = code.to(tl.float32) * step + minimum
        tl.store(target + u * _UNIT * DIM, value.to(out.dtype.element_ty), inside)


@triton.jit
def _decode_values_kernel(
    base, halves, mid, factors, out,
    heads, layers, num_blocks, base_stride, halves_stride, mid_stride,
    scales_at, values_at, mid_values_at, norm,
    DIM: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, HAS_MID: tl.constexpr,
):  # fmt: skip
    """Decode the values of one head of one block.

    .5 bytes in and itemsize out per value, 15 operations and 2 * SIZE in the tensor cores: memory
    bound. 8,192 blocks of 8 heads x 128 (one layer) take at least 0.40 ms on an H100.
    """
    i, h, n, row = _place(heads, layers, num_blocks)
    GROUPS: tl.constexpr = DIM // SIZE
    t, k = tl.arange(0, _TOKENS)[:, None], tl.arange(0, CHUNK)[None, :]
    peak = tl.load(halves + row * halves_stride + 2 * heads * DIM + h).to(tl.float32)
    scale_codes = tl.load(base + row * base_stride + scales_at + h * _TOKENS + t).to(tl.int32)
    factor = peak * tl.load(factors + scale_codes) * norm
    coarse = base + row * base_stride + values_at + h * (_UNIT * DIM)
    fine = mid + row * mid_stride + mid_values_at + h * (_UNIT * DIM)
    target = out + (((i * heads + h) * num_blocks + n) * _TOKENS + t) * DIM
    shift = t // _UNIT * 2
    for g in tl.static_range(GROUPS):
        for c in range(0, SIZE, CHUNK):
            total = tl.zeros((_TOKENS, CHUNK), tl.float32)
            for s in range(0, SIZE, CHUNK):
                at = ((s + k) * _UNIT + t % _UNIT) * GROUPS + g
                b = tl.load(coarse + at).to(tl.int32) >> shift
                if HAS_MID:
                    m = tl.load(fine + at).to(tl.int32) >> shift & 3
                    level = tl.where((b & 1) != 0, _OUTER, _INNER) >> (8 * m) & 0xFF
                else:
                    level = tl.where((b & 1) != 0, _BASE_OUTER, _BASE_INNER)
                level = tl.where((b & 2) != 0, -level, level)
                odd = (s + tl.arange(0, CHUNK))[:, None] & (c + k)
                odd = odd ^ odd >> 4
                odd = odd ^ odd >> 2
                odd = odd ^ odd >> 1
                sign = 1 - 2 * (odd & 1)
                total = tl.dot(level.to(tl.float16), sign.to(tl.float16), total)
            tl.store(target + g * SIZE + c + k, (total * factor).to(out.dtype.element_ty))


@triton.jit
def _encode_keys_kernel(
    keys, layer_stride, head_stride, block_stride, token_stride, channel_stride,
    halves, base, mid, faults,
    heads, layers, num_blocks, num_sinks, base_stride, halves_stride, mid_stride, keys_at, bits_at,
    DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Encode the keys of one head of one block.

    itemsize bytes in and .63 out per key, 20 operations: memory bound. 8,192 blocks of 8 heads x
    128 (one layer) take at least 0.42 ms on an H100.
    """
    i, h, n, row = _place(heads, layers, num_blocks)
    t, d = tl.arange(0, _TOKENS)[:, None], tl.arange(0, WIDE)[None, :]
    inside = d < DIM
    source = keys + i * layer_stride + h * head_stride + n * block_stride
    at = t.to(tl.int64) * token_stride + d * channel_stride
    value = tl.load(source + at, inside & (t >= 0), 0.0).to(tl.float32)
    kept = (n * _TOKENS + t >= num_sinks) & (d >= 0)
    low = tl.min(tl.where(kept, value, float("inf")), 0)[None, :]
    high = tl.max(tl.where(kept, value, float("-inf")), 0)[None, :]
    finite = tl.abs(value) < float("inf")
    empty = low > high
    least = tl.where(empty, 0.0, low) + 0.0
    most = tl.where(empty, 0.0, high) + 0.0
    half = least.to(tl.float16)
    minimum = half.to(tl.float32)
    step = tl.maximum(tl.div_rn(most - minimum, _KEY_TOP + 0.0 * minimum), _TINY)
    step_half = step.to(tl.float16)
    good = inside & (tl.abs(least) < _HALF_END) & (step < _HALF_END)
    wrong = tl.sum(tl.where(kept & inside & ~finite, 1, 0)) + tl.sum(tl.where(inside & ~good, 1, 0))
    if wrong > 0:
        tl.atomic_or(faults, 1)
    parameters = halves + row * halves_stride + h * DIM + d
    tl.store(parameters, half, inside)
    tl.store(parameters + heads * DIM, step_half, inside)
    inverse = tl.div_rn(1.0 + 0.0 * minimum, step_half.to(tl.float32))
    scaled = (value - minimum) * inverse
    scaled = tl.where(scaled > 0, tl.minimum(scaled, _KEY_TOP), 0.0)
    code = (scaled + 8388608.0).to(tl.int32, bitcast=True) & _KEY_TOP  # rounded half to even
    u = tl.arange(0, 4)[:, None, None]
    quarters = tl.reshape(code, (4, _UNIT, WIDE))
    r = tl.arange(0, _UNIT)[:, None]
    at = h * (_UNIT * DIM) + r * DIM + d
    coarse = tl.sum((quarters >> 3) << (2 * u), 0)
    tl.store(base + row * base_stride + keys_at + at, coarse.to(tl.uint8), inside)
    fine = tl.sum((quarters >> 1 & 3) << (2 * u), 0)
    tl.store(mid + row * mid_stride + at, fine.to(tl.uint8), inside)
    eighths = tl.reshape(code, (8, 8, WIDE)) & 1
    bits = tl.sum(eighths << tl.arange(0, 8)[:, None, None], 0)
    at = bits_at + h * (_UNIT // 2 * DIM) + tl.arange(0, 8)[:, None] * DIM + d
    tl.store(mid + row * mid_stride + at, bits.to(tl.uint8), inside)


@triton.jit
def _turned(source, token_stride, channel_stride, unit, SIZE: tl.constexpr, STEPS: tl.constexpr):
    """Return the transform (T, SIZE) of one group: neighbours are added first."""
    t, s = tl.arange(0, _TOKENS)[:, None], tl.arange(0, SIZE)[None, :]
    turned = tl.load(source + t.to(tl.int64) * token_stride + s * channel_stride).to(tl.float32)
    for _ in tl.static_range(STEPS):
        low, high = tl.split(tl.reshape(turned, (_TOKENS, SIZE // 2, 2)))
        both = tl.permute(tl.join(low + high, low - high), (0, 2, 1))
        turned = tl.reshape(both, (_TOKENS, SIZE))
    return turned * unit


@triton.jit
def _encode_values_kernel(
    values, layer_stride, head_stride, block_stride, token_stride, channel_stride,
    halves, base, mid, factors, borders, faults,
    heads, layers, num_blocks, base_stride, halves_stride, mid_stride,
    scales_at, values_at, mid_values_at, unit, share,
    DIM: tl.constexpr, SIZE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Encode the values of one head of one block.

    itemsize bytes in (twice, the second time from cache) and .5 out per value, 2 log2(SIZE) + 25
    operations: memory bound. 8,192 blocks of 8 heads x 128 take at least 0.40 ms on an H100.
    """
    i, h, n, row = _place(heads, layers, num_blocks)
    GROUPS: tl.constexpr = DIM // SIZE
    source = values + i * layer_stride + h * head_stride + n * block_stride
    total = tl.zeros((_TOKENS,), tl.float32)
    for g in tl.static_range(GROUPS):
        at = source + g * SIZE * channel_stride
        turned = _turned(at, token_stride, channel_stride, unit, SIZE, STEPS)
        squares = turned * turned
        for step in tl.static_range(STEPS):
            halved = tl.reshape(squares, (_TOKENS, 2, SIZE >> (step + 1)))
            low, high = tl.split(tl.permute(halved, (0, 2, 1)))
            squares = low + high
        total = total + tl.reshape(squares, (_TOKENS,))
    scale = tl.sqrt_rn(total * share)
    wrong = tl.sum(tl.where(scale < _HALF_END, 0, 1))
    if wrong > 0:
        tl.atomic_or(faults, 2)
    scale = tl.maximum(scale, _TINY)
    half = tl.max(scale, 0).to(tl.float16)
    tl.store(halves + row * halves_stride + 2 * heads * DIM + h, half)
    peak = half.to(tl.float32)
    bits = tl.div_rn(peak + 0.0 * scale, scale).to(tl.int32, bitcast=True)
    fraction = (bits & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True)
    code = ((bits >> 23) - 127) * 16
    for border in tl.static_range(16):
        code += (fraction > tl.load(borders + border)).to(tl.int32)
    code = tl.minimum(tl.maximum(code, 0), 255)
    t = tl.arange(0, _TOKENS)
    tl.store(base + row * base_stride + scales_at + h * _TOKENS + t, code.to(tl.uint8))
    decoded = peak * tl.load(factors + code)
    factor = tl.div_rn(_SIGMA + 0.0 * decoded, decoded)[:, None]
    u = tl.arange(0, 4)[:, None, None]
    r, s = tl.arange(0, _UNIT)[:, None], tl.arange(0, SIZE)[None, :]
    for g in tl.static_range(GROUPS):
        at = source + g * SIZE * channel_stride
        scaled = _turned(at, token_stride, channel_stride, unit, SIZE, STEPS) * factor
        size = tl.abs(scaled)
        cell = (size > _T0).to(tl.int32) + (size > _T1).to(tl.int32) + (size > _T2).to(tl.int32)
        cell += (size > _T3).to(tl.int32) + (size > _T4).to(tl.int32) + (size > _T5).to(tl.int32)
        cell += (size > _T6).to(tl.int32) + tl.where(scaled < 0, 8, 0)
        units = tl.reshape(cell, (4, _UNIT, SIZE))
        place = h * (_UNIT * DIM) + (s * _UNIT + r) * GROUPS + g
        coarse, fine = tl.sum((units >> 2) << (2 * u), 0), tl.sum((units & 3) << (2 * u), 0)
        tl.store(base + row * base_stride + values_at + place, coarse.to(tl.uint8))
        tl.store(mid + row * mid_stride + mid_values_at + place, fine.to(tl.uint8))


_PLACES = {"heads": "i32", "layers": "i32", "num_blocks": "i32"}
_STRIDES = {f"{axis}_stride": "i64" for axis in ("layer", "head", "block", "token", "channel")}


_WARPS, _DECODE_WARPS_NVIDIA = 4, 8  # with 4 warps, values of 128 channels spill on sm_100


def _cases() -> tuple[AotCase, ...]:
    """Return bf16 cases of head dimensions 64, 80 and 128."""
    cases = []
    for dim in (64, 80, 128):
        size = dim & -dim
        records = {"base_stride": "i64", "halves_stride": "i64", "mid_stride": "i64"}
        read = {"base": "*u8", "halves": "*fp16", "mid": "*u8"}
        wide = {"DIM": dim, "WIDE": triton.next_power_of_2(dim)}
        keys = {"keys_at": "i32", "bits_at": "i32"}
        places = {"scales_at": "i32", "values_at": "i32", "mid_values_at": "i32"}
        cases += [
            AotCase(
                f"decode_keys_bf16_dim{dim}",
                _decode_keys_kernel,
                {**read, "out": "*bf16", **_PLACES, **records, **keys},
                {**wide, "HAS_MID": True},
                wide_loads=False,
            ),
            AotCase(
                f"decode_values_bf16_dim{dim}",
                _decode_values_kernel,
                {**read, "factors": "*fp32", "out": "*bf16", **_PLACES, **records, **places}
                | {"norm": "fp32"},
                {"DIM": dim, "SIZE": size, "CHUNK": min(size, _MAX_CHUNK), "HAS_MID": True},
                num_warps=_DECODE_WARPS_NVIDIA,
                num_warps_amd=_WARPS,
                wide_loads=False,
                max_registers=255,
            ),
            AotCase(
                f"encode_keys_bf16_dim{dim}",
                _encode_keys_kernel,
                {"keys": "*bf16", **_STRIDES, "halves": "*fp16", "base": "*u8", "mid": "*u8"}
                | {"faults": "*i32", **_PLACES, "num_sinks": "i32", **records, **keys},
                wide,
                wide_loads=dim != 80,
                max_registers=255,
                ones=("channel_stride",),
                divisible=("layer_stride", "head_stride", "block_stride", "token_stride"),
            ),
            AotCase(
                f"encode_values_bf16_dim{dim}",
                _encode_values_kernel,
                {"values": "*bf16", **_STRIDES, "halves": "*fp16", "base": "*u8", "mid": "*u8"}
                | {"factors": "*fp32", "borders": "*fp32", "faults": "*i32", **_PLACES, **records}
                | {**places, "unit": "fp32", "share": "fp32"},
                {"DIM": dim, "SIZE": size, "STEPS": size.bit_length() - 1},
                wide_loads=False,
                max_registers=255,
                ones=("channel_stride",),
                divisible=("layer_stride", "head_stride", "block_stride", "token_stride"),
            ),
        ]
    return tuple(cases)


AOT = _cases()
