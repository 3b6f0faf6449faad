"""ZipCache's quantisers on a GPU.

Divisions are rounded correctly and nothing is fused, so codes equal the reference's; rounding adds
and subtracts 1.5 * 2 ** 23, which is half to even. NaN and infinity are not looked for: that would
wait for the GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import torch
import triton
import triton.language as tl

from kvstrata.kernels.aot import AotCase

ROWS = 16
ELEMENTS = 2048  # that a program quantises, 16 a thread
TOKENS = 64
CHANNELS = 32
_UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def codes_of(values, minimum, step):
    """Return round((values - minimum) / step), half to even, as uint8."""
    quotient = tl.div_rn(values - minimum, step)
    return (quotient + 12582912.0 - 12582912.0).to(tl.uint8)


@triton.jit
def step_of(minimum, maximum, top):
    """Return the step of a range, 1 where there is none or only a denormal one."""
    step = tl.div_rn(maximum - minimum, top)
    return tl.where(step < 1.1754943508222875e-38, 1.0, step)


@triton.jit
def quantize_groups(
    values, scale, codes, step, minimum, num_groups, groups_per_token, num_tokens, top,
    GROUP: tl.constexpr, PADDED: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Quantise ROWS groups of GROUP neighbouring channels; a whole token is one group of all.

    Roofline, per bf16 element: 2 bytes read, 1 written, about 8 operations and a division. 8 heads,
    131072 tokens, 128 channels: 403 MB, floor 0.12 ms on an H100.
    """
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, PADDED)
    inside = (group < num_groups)[:, None] & (i < GROUP)[None, :]
    at = group[:, None] * GROUP + i[None, :]
    x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        sequence = group // groups_per_token // num_tokens
        channel = (sequence * groups_per_token + group % groups_per_token) * GROUP
        factor = tl.load(scale + channel[:, None] + i[None, :], mask=inside, other=1.0)
        x = tl.div_rn(x, factor)
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    low = tl.where(group < num_groups, low, 0.0)
    high = tl.where(group < num_groups, high, 0.0)
    width = step_of(low, high, top)
    x = tl.where(inside, x, low[:, None])
    tl.store(codes + at, codes_of(x, low[:, None], width[:, None]), mask=inside)
    tl.store(step + group, width, mask=group < num_groups)
    tl.store(minimum + group, low, mask=group < num_groups)


@triton.jit
def quantize_channels(
    values, codes, step, minimum, num_tokens, dim, top,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Quantise 32 channels of a sequence, each its own group, in two passes over the tokens.

    Roofline, per bf16 element: 2 bytes read twice, 1 written. 8 heads, 131072 tokens, 128 channels:
    671 MB, floor 0.20 ms on an H100, if enough sequences and channels fill it.
    """
    sequence = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.arange(0, TOKENS)
    first = (sequence * num_tokens + token)[:, None] * dim + channel[None, :]
    low = tl.full((CHANNELS,), float("inf"), tl.float32)
    high = tl.full((CHANNELS,), float("-inf"), tl.float32)
    for start in range(0, num_tokens, TOKENS):
        inside = (start + token < num_tokens)[:, None] & (channel < dim)[None, :]
        at = first + tl.cast(start, tl.int64) * dim
        x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, x, float("-inf")), 0))
    low = tl.where(channel < dim, low, 0.0)
    high = tl.where(channel < dim, high, 0.0)
    width = step_of(low, high, top)
    for start in range(0, num_tokens, TOKENS):
        inside = (start + token < num_tokens)[:, None] & (channel < dim)[None, :]
        at = first + tl.cast(start, tl.int64) * dim
        x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x, low[None, :])
        tl.store(codes + at, codes_of(x, low[None, :], width[None, :]), mask=inside)
    tl.store(step + sequence * dim + channel, width, mask=channel < dim)
    tl.store(minimum + sequence * dim + channel, low, mask=channel < dim)


@triton.jit
def dequantize(
    codes, step, minimum, scale, out, num_rows, num_tokens, groups,
    DIM: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
    HAS_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write code * step + minimum, times the channel's scale, for 16 tokens.

    Roofline, per element read as bf16: 1 byte read, 2 written, 3 operations; parameters come from
    the cache. 8 heads, 131072 tokens, 128 channels: 403 MB, floor 0.12 ms on an H100.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    inside = (row < num_rows)[:, None] & (d < DIM)[None, :]
    at = row[:, None] * DIM + d[None, :]
    sequence = row // num_tokens
    place = row if PER_TOKEN else sequence
    parameter = place[:, None] * groups + (d // GROUP)[None, :]
    code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    value = code * tl.load(step + parameter, mask=inside, other=0.0)
    value += tl.load(minimum + parameter, mask=inside, other=0.0)
    if HAS_SCALE:
        value *= tl.load(scale + sequence[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def quantize_channels_triton(
    values: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, steps and minima of contiguous (S, N, D), one group per channel."""
    sequences, num_tokens, dim = values.shape
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    step = torch.empty((sequences, dim), dtype=torch.float32, device=values.device)
    minimum = torch.empty_like(step)
    quantize_channels[triton.cdiv(dim, CHANNELS), sequences](
        values, codes, step, minimum, num_tokens, dim, float(2**bits - 1),
        TOKENS=TOKENS, CHANNELS=CHANNELS, **_UNFUSED,
    )  # fmt: skip
    return codes, step, minimum


def quantize_groups_triton(
    values: torch.Tensor, bits: int, group_size: int, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, steps and minima of contiguous (S, N, D), one per group of a token."""
    sequences, num_tokens, dim = values.shape
    groups = dim // group_size
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    step = torch.empty((sequences, num_tokens, groups), dtype=torch.float32, device=values.device)
    minimum = torch.empty_like(step)
    padded = triton.next_power_of_2(group_size)
    rows = max(1, ELEMENTS // padded)
    quantize_groups[(triton.cdiv(step.numel(), rows),)](
        values, scale, codes, step, minimum, step.numel(), groups, num_tokens,
        float(2**bits - 1), GROUP=group_size, PADDED=padded,
        HAS_SCALE=scale is not None, ROWS=rows, **_UNFUSED,
    )  # fmt: skip
    return codes, step, minimum


def dequantize_triton(
    codes: torch.Tensor,
    step: torch.Tensor,
    minimum: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the values of contiguous codes (S, N, D); parameters (S, N or 1, groups)."""
    sequences, num_tokens, dim = codes.shape
    rows = sequences * num_tokens
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    dequantize[(triton.cdiv(rows, ROWS),)](
        codes, step, minimum, scale, out, rows, num_tokens, step.shape[2],
        DIM=dim, PADDED=triton.next_power_of_2(dim), GROUP=dim // step.shape[2],
        PER_TOKEN=step.shape[1] == num_tokens, HAS_SCALE=scale is not None, ROWS=ROWS,
        **_UNFUSED,
    )  # fmt: skip
    return out


def _cases():
    parameters = {"codes": "*u8", "step": "*fp32", "minimum": "*fp32"}
    sizes = {"num_tokens": "i32", "top": "fp32"}
    for dtype, size in (("bf16", 64), ("bf16", 32), ("fp16", 192), ("fp32", 128)):
        yield AotCase(
            f"quantize_groups_{dtype}_{size}", quantize_groups,
            {"values": f"*{dtype}", "scale": "*fp32", "num_groups": "i32",
             "groups_per_token": "i32"} | parameters | sizes,
            {"GROUP": size, "PADDED": triton.next_power_of_2(size), "HAS_SCALE": True,
             "ROWS": ELEMENTS // triton.next_power_of_2(size)},
        )  # fmt: skip
    for dtype in ("bf16", "fp32"):
        yield AotCase(
            f"quantize_channels_{dtype}", quantize_channels,
            {"values": f"*{dtype}", "dim": "i32"} | parameters | sizes,
            {"TOKENS": TOKENS, "CHANNELS": CHANNELS}, divisible=("dim",),
        )  # fmt: skip
    for dtype, dim, group, per_token in (
        ("bf16", 64, 1, False), ("bf16", 192, 192, True), ("fp32", 128, 32, True),
    ):  # fmt: skip
        yield AotCase(
            f"dequantize_{dtype}_{dim}_{group}", dequantize,
            {"scale": "*fp32", "out": f"*{dtype}", "num_rows": "i32", "num_tokens": "i32",
             "groups": "i32"} | parameters,
            {"DIM": dim, "PADDED": triton.next_power_of_2(dim), "GROUP": group,
             "PER_TOKEN": per_token, "HAS_SCALE": group > 1, "ROWS": ROWS},
            divisible=("groups",) if group == 1 else (), wide_loads=True,
        )  # fmt: skip


AOT: tuple[AotCase, ...] = tuple(_cases())
