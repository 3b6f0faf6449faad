"""ZipCache's quantisers on a CPU: ranges found as integers, divisions and roundings in vectors.

Floats are compared as integers in the floats' order: such minima vectorise, and NaN and infinity
show as the extremes. Quotients are rounded by adding and subtracting 1.5 * 2 ** 23, half to even.

Roofline, per bf16 element: 2 bytes read twice (once from memory), 1 written, about 10 operations;
the division makes it 1.5 cycles an element on AVX-512, about 2 GB/s a core of bf16 input.
Dequantising: 1 byte read, 2 to 4 written, 3 operations: the speed of a copy.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.floats_numba import as_numpy, bits_of, float_of, from_float, to_float
from kvstrata.kernels.paper_quantizers import NOT_FINITE
from kvstrata.kernels.threads import for_ranges

_ELEMENTS_PER_THREAD = 1 << 15
_CHANNELS = 64  # of a token that one piece of channelwise work takes
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_TINY = np.float32(2.0**-126)
_ROUND = np.float32(1.5 * 2**23)
_ONE = np.float32(1)
_NO_SCALE = np.empty((0, 0), dtype=np.float32)


def quantize_channels_numba(
    values: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, steps and minima of contiguous (S, N, D), one group per channel."""
    sequences, num_tokens, dim = values.shape
    codes = torch.empty(values.shape, dtype=torch.uint8)
    step = torch.empty((sequences, dim), dtype=torch.float32)
    minimum = torch.empty_like(step)
    pieces = (dim + _CHANNELS - 1) // _CHANNELS
    fine = np.ones(sequences * pieces, dtype=np.bool_)
    arrays = as_numpy(values), codes.numpy(), step.numpy(), minimum.numpy()

    def work(a: int, b: int) -> None:
        _quantize_channels(*arrays, np.float32(2**bits - 1), pieces, fine, a, b)

    for_ranges(work, fine.size, _ELEMENTS_PER_THREAD // (num_tokens * _CHANNELS) + 1)
    if not fine.all():
        raise ValueError(NOT_FINITE)
    return codes, step, minimum


def quantize_groups_numba(
    values: torch.Tensor, bits: int, group_size: int, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, steps and minima of contiguous (S, N, D), one per group of a token."""
    sequences, num_tokens, dim = values.shape
    codes = torch.empty(values.shape, dtype=torch.uint8)
    step = torch.empty((sequences, num_tokens, dim // group_size), dtype=torch.float32)
    minimum = torch.empty_like(step)
    fine = np.ones(sequences * num_tokens, dtype=np.bool_)
    arrays = as_numpy(values), codes.numpy(), step.numpy(), minimum.numpy()
    divisors = _NO_SCALE if scale is None else scale.numpy()

    def work(a: int, b: int) -> None:
        _quantize_groups(*arrays, np.float32(2**bits - 1), divisors, fine, a, b)

    for_ranges(work, fine.size, _ELEMENTS_PER_THREAD // dim + 1)
    if not fine.all():
        raise ValueError(NOT_FINITE)
    return codes, step, minimum


def dequantize_numba(
    codes: torch.Tensor,
    step: torch.Tensor,
    minimum: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the values of contiguous codes (S, N, D); parameters (S, N or 1, groups)."""
    out = torch.empty(codes.shape, dtype=dtype)
    arrays = codes.numpy(), step.numpy(), minimum.numpy(), as_numpy(out)
    factors = _NO_SCALE if scale is None else scale.numpy()
    rows = codes.shape[0] * codes.shape[1]
    for_ranges(
        lambda a, b: _dequantize(*arrays, factors, a, b),
        rows,
        _ELEMENTS_PER_THREAD // codes.shape[2] + 1,
    )
    return out


@kernel()
def _ordered(value):
    """Return an int32 that orders like the float32; its own inverse on bits."""
    bits = bits_of(value)
    return bits ^ ((bits >> np.int32(31)) & _MAGNITUDE)


@kernel()
def _float(ordered):
    return float_of(ordered ^ ((ordered >> np.int32(31)) & _MAGNITUDE))


@kernel(error_model="numpy")
def _step(low, high, top):
    """Return the step of a range, 1 for no range, and whether it is usable."""
    step = (high - low) / top
    if not step < np.inf or not low > -np.inf:  # written so that NaN counts
        return _ONE, False
    return (_ONE if step < _TINY else step), True


@kernel(error_model="numpy")
def _encode_channels(row, step, minimum, codes):
    for d in range(row.size):
        quotient = (to_float(row[d]) - minimum[d]) / step[d]
        codes[d] = np.uint8(bits_of(quotient + _ROUND) & np.int32(0xFF))


@kernel()
def _widen_range(row, low, high):
    for d in range(row.size):
        key = _ordered(to_float(row[d]))
        low[d] = min(low[d], key)
        high[d] = max(high[d], key)


@kernel(error_model="numpy")
def _quantize_channels(values, codes, step, minimum, top, pieces, fine, start, stop):
    num_tokens, dim = values.shape[1:]
    low = np.empty(_CHANNELS, dtype=np.int32)
    high = np.empty(_CHANNELS, dtype=np.int32)
    for index in range(start, stop):
        sequence = index // pieces
        first = index % pieces * _CHANNELS
        last = min(first + _CHANNELS, dim)
        low[:] = _MAGNITUDE
        high[:] = -_MAGNITUDE - 1
        for token in range(num_tokens):
            row = values[sequence, token][first:last]
            _widen_range(row, low[: last - first], high[: last - first])
        for d in range(first, last):
            least = _float(low[d - first])
            size, usable = _step(least, _float(high[d - first]), top)
            fine[index] &= usable
            step[sequence, d] = size
            minimum[sequence, d] = least
        if not fine[index]:
            continue
        for token in range(num_tokens):
            _encode_channels(
                values[sequence, token][first:last],
                step[sequence][first:last],
                minimum[sequence][first:last],
                codes[sequence, token][first:last],
            )


@kernel()
def _range(row):
    """Return minimum and maximum of a float32 row; NaN and infinity win."""
    low = _MAGNITUDE
    high = -_MAGNITUDE - np.int32(1)
    for i in range(row.size):
        key = _ordered(row[i])
        low = min(low, key)
        high = max(high, key)
    return _float(low), _float(high)


@kernel(error_model="numpy")
def _encode_group(row, step, minimum, codes):
    for i in range(row.size):
        quotient = (row[i] - minimum) / step
        codes[i] = np.uint8(bits_of(quotient + _ROUND) & np.int32(0xFF))


@kernel(error_model="numpy")
def _quantize_groups(values, codes, step, minimum, top, scale, fine, start, stop):
    num_tokens, dim = values.shape[1:]
    size = dim // step.shape[2]
    row = np.empty(dim, dtype=np.float32)
    for index in range(start, stop):
        sequence, token = index // num_tokens, index % num_tokens
        source = values[sequence, token]
        if scale.size:
            divisors = scale[sequence]
            for d in range(dim):
                row[d] = to_float(source[d]) / divisors[d]
        else:
            for d in range(dim):
                row[d] = to_float(source[d])
        for group in range(step.shape[2]):
            part = row[group * size : (group + 1) * size]
            low, high = _range(part)
            width, usable = _step(low, high, top)
            fine[index] &= usable
            step[sequence, token, group] = width
            minimum[sequence, token, group] = low
            if usable:
                target = codes[sequence, token][group * size : (group + 1) * size]
                _encode_group(part, width, low, target)


@kernel()
def _read_group(codes, step, minimum, out):
    for i in range(codes.size):
        out[i] = np.float32(codes[i]) * step + minimum


@kernel()
def _read_channels(codes, step, minimum, out):
    for i in range(codes.size):
        out[i] = np.float32(codes[i]) * step[i] + minimum[i]


@kernel()
def _scale(row, factors):
    for i in range(row.size):
        row[i] *= factors[i]


@kernel()
def _store(row, out):
    for i in range(row.size):
        out[i] = from_float(row[i], out[i])


@kernel()
def _dequantize(codes, step, minimum, out, scale, start, stop):
    num_tokens, dim = codes.shape[1:]
    groups = step.shape[2]
    size = dim // groups
    row = np.empty(dim, dtype=np.float32)
    for index in range(start, stop):
        sequence, token = index // num_tokens, index % num_tokens
        place = token if step.shape[1] > 1 else 0
        if size == 1:
            _read_channels(codes[sequence, token], step[sequence, place],
                           minimum[sequence, place], row)  # fmt: skip
        else:
            for group in range(groups):
                a, b = group * size, (group + 1) * size
                _read_group(codes[sequence, token][a:b], step[sequence, place, group],
                            minimum[sequence, place, group], row[a:b])  # fmt: skip
        if scale.size:
            _scale(row, scale[sequence])
        _store(row, out[sequence, token])
