# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The operations of ``decoder_ops`` on CPU: rows are split over threads, 16 lanes at a time.

Each is bound by memory: it reads its input once, from cache, and writes its output once.
"""

import numpy as np
import torch

from kvstrata.kernels.compiled import called, inlined, kernel
from kvstrata.kernels.exponential_numba import exponential
from kvstrata.kernels.floats_numba import as_numpy
from kvstrata.kernels.threads import for_ranges
from kvstrata.kernels.vectors_numba import (
    LANES,
    absolute,
    add,
    choose,
    divide,
    load,
    multiply,
    multiply_add,
    reaches,
    splat,
    store,
    subtract,
    sum_lanes,
)

_GRAIN_NUMBERS = 1 << 15  # numbers that are worth a thread
_ONE, _ZERO = np.float32(1.0), np.float32(0.0)


def add_rms_norm_numba(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``add_rms_norm_reference`` returns, up to the order of a sum."""
    x = x.contiguous()
    width = x.shape[1]
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    source, target = as_numpy(x.view(-1)), as_numpy(out.view(-1))
    scale = as_numpy(weight)
    sums = as_numpy(total.view(-1))
    other = sums if residual is None else as_numpy(residual.contiguous().view(-1))
    adds, epsilon = residual is not None, np.float32(eps)

    def work(first: int, stop: int) -> None:
        _norm(first, stop, width, source, other, adds, scale, epsilon, sums, target)

    for_ranges(work, x.shape[0], max(1, _GRAIN_NUMBERS // width))
    return out, total


@kernel(error_model="numpy")
def _norm(first, stop, width, x, residual, adds, weight, eps, total, out):
    for row in range(first, stop):
        start = row * width
        if adds:
            for i in range(start, start + width, LANES):
                store(total, i, add(load(x, i), load(residual, i)))
        norm_row(total, start, width, weight, eps, out, start)


@called
def norm_row(x, start, width, weight, eps, out, to):
    """Write a row divided by its root mean square, rounded, and times a weight."""
    squares = splat(_ZERO)
    for i in range(start, start + width, LANES):
        value = load(x, i)
        squares = multiply_add(value, value, squares)
    mean = sum_lanes(squares) / np.float32(width) + eps
    factor = splat(_ONE / np.sqrt(mean))
    for i in range(0, width, LANES):
        store(out, to + i, multiply(load(x, start + i), factor))
        store(out, to + i, multiply(load(weight, i), load(out, to + i)))


def rotate_heads_numba(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return what ``rotate_heads_reference`` returns, up to rounding."""
    count, heads, dim = x.shape
    out = torch.empty((count, heads, dim), dtype=x.dtype)
    step = x.stride(0)
    source = as_numpy(x.as_strided(((count - 1) * step + heads * dim,), (1,)))
    tables = cos.view(-1).numpy(), sin.view(-1).numpy()
    places, target = positions.numpy(), as_numpy(out.view(-1))

    def work(first: int, stop: int) -> None:
        _rotate(first, stop, heads, dim, step, source, *tables, places, target)

    for_ranges(work, count, max(1, _GRAIN_NUMBERS // (heads * dim)))
    return out


@kernel(error_model="numpy")
def _rotate(first, stop, heads, dim, step, x, cos, sin, positions, out):
    for row in range(first, stop):
        angle = positions[row] * dim
        for head in range(heads):
            source, target = row * step + head * dim, (row * heads + head) * dim
            turn_head(x, source, cos, sin, angle, dim, out, target)


@called
def turn_head(x, source, cos, sin, angle, dim, out, target):
    """Write a head rotated by a row of the tables; it may be written where it is."""
    half = dim // 2
    for i in range(0, half, LANES):
        low, high = load(x, source + i), load(x, source + half + i)
        c, s = load(cos, angle + i), load(sin, angle + i)
        store(out, target + i, subtract(multiply(low, c), multiply(high, s)))
        store(out, target + half + i, add(multiply(high, c), multiply(low, s)))


def silu_gate_numba(x: torch.Tensor) -> torch.Tensor:
    """Return what ``silu_gate_reference`` returns, up to rounding."""
    x = x.contiguous()
    width = x.shape[1] // 2
    out = torch.empty((x.shape[0], width), dtype=x.dtype)
    source, target = as_numpy(x.view(-1)), as_numpy(out.view(-1))

    def work(first: int, stop: int) -> None:
        _gate(first, stop, width, source, target)

    for_ranges(work, x.shape[0], max(1, _GRAIN_NUMBERS // (4 * width)))
    return out


@kernel(error_model="numpy")
def _gate(first, stop, width, x, out):
    for row in range(first, stop):
        start = 2 * row * width
        for i in range(0, width, LANES):
            up = load(x, start + width + i)
            store(out, row * width + i, gated(load(x, start + i), up))


@inlined
def gated(gate, up):
    """Return silu(gate) * up."""
    # 1 / (1 + e ** -x), with the exponential of what is not above zero.
    power = exponential(subtract(splat(_ZERO), absolute(gate)))
    top = choose(reaches(gate, splat(_ZERO)), splat(_ONE), power)
    return multiply(multiply(gate, divide(top, add(splat(_ONE), power))), up)
