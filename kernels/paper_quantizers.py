"""The min/max quantisers of ZipCache: channelwise, tokenwise, groupwise, channel-separable.

All map a group of values to codes of 1 to 8 bits: step = (max - min) / (2 ** bits - 1),
code = round((x - min) / step), half to even; read as code * step + min. The zero point is the
float minimum itself. No clamp is needed: (max - min) / step rounds to the top code. A group of no
(or denormal) range gets step 1 and codes 0, so it reads as its minimum. 16 bits mean "do not
quantise" and are the caller's business.

Legend: S sequences (flattened leading dimensions), N tokens, D channels, U channels of a group.
"""

from typing import NamedTuple

import torch

from kvstrata.kernels.backend import FLOATS, backend_of

_TINY = 2.0**-126  # the least normal float32: below it quotients lose their precision


class Quantized(NamedTuple):
    """Codes uint8, shape of the input; float32 parameters, one per group.

    Channelwise: (..., D). Tokenwise and separable: (..., N). Groupwise: (..., N, D / U).
    """

    codes: torch.Tensor
    step: torch.Tensor
    minimum: torch.Tensor


def quantize_channelwise(values: torch.Tensor, bits: int) -> Quantized:
    """Return codes of ``values`` (..., N, D) with one group per channel and sequence.

    Sequences do not share parameters: one long sequence would set the range of the others.

    Raises:
        ValueError: Fewer than two dimensions, a dtype other than bf16, fp16 or fp32, bits not in 1
            to 8; on a CPU also values that are not finite or a range beyond float32's.

    Source:
        ZipCache, arXiv:2405.14256, section 4.1 (keys); no zero-range guard there.
    """
    _check(values, bits)
    num_tokens, dim = values.shape[-2:]
    shape = (*values.shape[:-2], dim)
    if values.numel() == 0:
        return _no_values(values, shape)
    flat = values.contiguous().view(-1, num_tokens, dim)
    backend = backend_of(values)
    if backend == "numba":
        from kvstrata.kernels.paper_quantizers_numba import quantize_channels_numba

        found = Quantized(*quantize_channels_numba(flat, bits))
    elif backend == "triton":
        from kvstrata.kernels.paper_quantizers_triton import quantize_channels_triton

        found = Quantized(*quantize_channels_triton(flat, bits))
    else:
        found = quantize_reference(flat, bits, -2)
    return Quantized(
        found.codes.view(values.shape), found.step.view(shape), found.minimum.view(shape)
    )


def quantize_groupwise(
    values: torch.Tensor, bits: int, group_size: int, channel_scale: torch.Tensor | None = None
) -> Quantized:
    """Return codes of ``values`` (..., N, D) with one group per ``group_size`` channels of a token.

    Args:
        values: bf16, fp16 or fp32.
        bits: 1 to 8.
        group_size: Must divide D.
        channel_scale: float32 (..., D), positive; values are divided by it first.

    Raises:
        ValueError: See ``quantize_channelwise``; also a group size or scale that does not fit.

    Source:
        ZipCache, arXiv:2405.14256, section 4.1; KIVI, arXiv:2402.02750 (values).
    """
    _check(values, bits)
    dim = values.shape[-1]
    if group_size < 1 or dim % group_size:
        raise ValueError(f"group_size must divide {dim}, and {group_size} does not")
    if channel_scale is not None:
        _check_scale(channel_scale, values.shape)
    backend = backend_of(*(t for t in (values, channel_scale) if t is not None))
    shape = (*values.shape[:-1], dim // group_size)
    if values.numel() == 0:
        return _no_values(values, shape)
    flat = values.contiguous().view(-1, values.shape[-2], dim)
    scale = None if channel_scale is None else channel_scale.contiguous().view(-1, dim)
    if backend == "numba":
        from kvstrata.kernels.paper_quantizers_numba import quantize_groups_numba

        found = Quantized(*quantize_groups_numba(flat, bits, group_size, scale))
    elif backend == "triton":
        from kvstrata.kernels.paper_quantizers_triton import quantize_groups_triton

        found = Quantized(*quantize_groups_triton(flat, bits, group_size, scale))
    else:
        scaled = flat.float() if scale is None else flat.float() / scale[:, None]
        found = quantize_reference(scaled.unflatten(-1, (-1, group_size)), bits, -1)
    return Quantized(
        found.codes.view(values.shape), found.step.view(shape), found.minimum.view(shape)
    )


def quantize_tokenwise(values: torch.Tensor, bits: int) -> Quantized:
    """Return codes of ``values`` (..., N, D) with one group per token; see the channelwise one."""
    _check(values, bits)
    found = quantize_groupwise(values, bits, values.shape[-1])
    return _one_group(found)


def quantize_separable(
    values: torch.Tensor, bits: int, channel_scale: torch.Tensor | None = None
) -> tuple[Quantized, torch.Tensor]:
    """Return tokenwise codes of ``values`` (..., N, D) / channel scale, and the scale (..., D).

    The scale evens out channels, so that one loud channel does not cost the others their precision
    and still one step per token is enough. Error: at most scale * step / 2, and rounding.

    Args:
        values: bf16, fp16 or fp32; flatten the heads of a token into D to follow the paper.
        bits: 1 to 8.
        channel_scale: float32 (..., D), positive; without it, ``channel_scales(values)``.

    Raises:
        ValueError: See ``quantize_groupwise``.

    Source:
        ZipCache, arXiv:2405.14256, section 4.1, channel-separable tokenwise quantisation.
    """
    _check(values, bits)
    if channel_scale is None:
        channel_scale = channel_scales(values)
    found = quantize_groupwise(values, bits, values.shape[-1], channel_scale)
    return _one_group(found), channel_scale


def channel_scales(values: torch.Tensor) -> torch.Tensor:
    """Return sqrt(max |x|) of each channel of ``values`` (..., N, D), float32 (..., D).

    A channel of zeros only has scale 1.
    """
    if values.shape[-2] == 0:
        return torch.ones((*values.shape[:-2], values.shape[-1]), device=values.device)
    scale = values.abs().amax(-2).float().sqrt()
    return torch.where(scale == 0, 1.0, scale)


def quantize_reference(values: torch.Tensor, bits: int, dim: int) -> Quantized:
    """Return the codes with one group along ``dim``; the definition. Checks that all is finite."""
    values = values.float()
    minimum, maximum = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    step = (maximum - minimum) / (2**bits - 1)
    if not torch.isfinite(step).all():
        raise ValueError(NOT_FINITE)
    step = torch.where(step < _TINY, 1.0, step)
    codes = ((values - minimum) / step).round_().to(torch.uint8)
    return Quantized(codes, step.squeeze(dim), minimum.squeeze(dim))


def requantize(
    values: torch.Tensor, step: torch.Tensor, minimum: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return uint8 codes of ``values`` under parameters that they did not set, clamped to ``bits``.

    With the parameters and values of a reading, the codes that were read come back.

    Args:
        values: Of any shape, divided by the channel scale if there is one.
        step: Broadcastable to ``values``: unsqueeze the group's dimension.
        minimum: Likewise.
        bits: 1 to 8.
    """
    codes = ((values.float() - minimum) / step).round_()
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def dequantize_channelwise(
    quantized: Quantized, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values (..., N, D) of ``quantize_channelwise``."""
    codes, step, minimum = quantized
    return _dequantize(codes, step[..., None, :], minimum[..., None, :], None, dtype)


def dequantize_groupwise(
    quantized: Quantized,
    channel_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the values (..., N, D) of ``quantize_groupwise``."""
    codes, step, minimum = quantized
    return _dequantize(codes, step, minimum, channel_scale, dtype)


def dequantize_tokenwise(quantized: Quantized, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the values (..., N, D) of ``quantize_tokenwise``."""
    codes, step, minimum = quantized
    return _dequantize(codes, step[..., None], minimum[..., None], None, dtype)


def dequantize_separable(
    quantized: Quantized, channel_scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the values (..., N, D) of ``quantize_separable``."""
    codes, step, minimum = quantized
    return _dequantize(codes, step[..., None], minimum[..., None], channel_scale, dtype)


def _dequantize(
    codes: torch.Tensor,
    step: torch.Tensor,
    minimum: torch.Tensor,
    channel_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return code * step + minimum, times the scale; parameters (..., N or 1, groups or D)."""
    _check_codes(codes, step, minimum, channel_scale, dtype)
    num_tokens, dim = codes.shape[-2:]
    tensors = [codes, step, minimum] + ([] if channel_scale is None else [channel_scale])
    backend = backend_of(*tensors)
    if codes.numel() == 0:
        return torch.empty(codes.shape, dtype=dtype, device=codes.device)
    flat = codes.contiguous().view(-1, num_tokens, dim)
    step = step.float().contiguous().view(flat.shape[0], -1, step.shape[-1])
    minimum = minimum.float().contiguous().view(step.shape)
    scale = None if channel_scale is None else channel_scale.float().contiguous().view(-1, dim)
    if backend == "numba":
        from kvstrata.kernels.paper_quantizers_numba import dequantize_numba

        read = dequantize_numba(flat, step, minimum, scale, dtype)
    elif backend == "triton":
        from kvstrata.kernels.paper_quantizers_triton import dequantize_triton

        read = dequantize_triton(flat, step, minimum, scale, dtype)
    else:
        read = dequantize_reference(flat, step, minimum, scale, dtype)
    return read.view(codes.shape)


def dequantize_reference(
    codes: torch.Tensor,
    step: torch.Tensor,
    minimum: torch.Tensor,
    channel_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the values of codes (S, N, D); parameters (S, N or 1, groups); the definition."""
    grouped = codes.float().unflatten(-1, (step.shape[-1], -1))
    read: torch.Tensor = (grouped * step[..., None] + minimum[..., None]).flatten(-2)
    if channel_scale is not None:
        read *= channel_scale[:, None]
    return read.to(dtype)


def num_parameters(
    scheme: str, batch: int, num_tokens: int, width: int, group_size: int = 32
) -> int:
    """Return how many numbers a scheme stores beside the codes of one tensor (K or V).

    Args:
        scheme: ``channelwise``, ``tokenwise``, ``separable`` or ``groupwise``. As in the paper,
            ``channelwise`` shares parameters across the batch; ours has them per sequence.
        batch: Sequences.
        num_tokens: Tokens of each.
        width: Channels of a token over all heads.
        group_size: Of ``groupwise`` only.

    Raises:
        ValueError: Another scheme, or a group size that does not divide ``width``.

    Source:
        ZipCache, arXiv:2405.14256, section 4.1.
    """
    if scheme == "groupwise" and width % group_size:
        raise ValueError(f"group_size must divide {width}, and {group_size} does not")
    tokens = batch * num_tokens
    counts = {
        "channelwise": 2 * width,
        "tokenwise": 2 * tokens,
        "separable": width + 2 * tokens,
        "groupwise": 2 * tokens * (width // group_size),
    }
    if scheme not in counts:
        raise ValueError(f"scheme must be one of {', '.join(counts)}, not {scheme!r}")
    return counts[scheme]


def compression_ratio(
    num_elements: int, mean_bits: float, parameters: int, parameter_bits: int = 16
) -> float:
    """Return bytes in 16 bits over bytes compressed: codes and parameters, not the token ids.

    Args:
        num_elements: Values of K and V together, 2 * batch * tokens * width.
        mean_bits: Bits per code, e.g. .6 * 4 + .4 * 2.
        parameters: Numbers beside the codes, of K and V together.
        parameter_bits: Of each.
    """
    return 16 * num_elements / (num_elements * mean_bits + parameter_bits * parameters)


NOT_FINITE = "values are not finite, or their range exceeds that of float32"


def _check(values: torch.Tensor, bits: int) -> None:
    if bits not in range(1, 9):
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    if values.ndim < 2 or not values.shape[-1] or values.dtype not in FLOATS:
        raise ValueError(
            f"values must be bf16, fp16 or fp32 (..., tokens, channels), "
            f"not {values.dtype} of shape {tuple(values.shape)}"
        )


def _check_scale(channel_scale: torch.Tensor, shape: torch.Size) -> None:
    if channel_scale.dtype != torch.float32 or channel_scale.shape != shape[:-2] + shape[-1:]:
        raise ValueError(
            f"values of shape {tuple(shape)} need one float32 scale per channel, "
            f"not {channel_scale.dtype} of shape {tuple(channel_scale.shape)}"
        )


def _check_codes(
    codes: torch.Tensor,
    step: torch.Tensor,
    minimum: torch.Tensor,
    channel_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    if codes.dtype != torch.uint8 or codes.ndim < 2 or dtype not in FLOATS:
        raise ValueError(
            f"codes must be uint8 (..., tokens, channels) and be read as bf16, fp16 or fp32, "
            f"not {codes.dtype} of shape {tuple(codes.shape)} as {dtype}"
        )
    *leading, num_tokens, dim = codes.shape
    fits = (
        step.shape == minimum.shape
        and step.ndim == codes.ndim
        and list(step.shape[:-2]) == leading
        and step.shape[-2] in (1, num_tokens)
        and (step.shape[-1] and dim % step.shape[-1] == 0)
    )
    if codes.numel() and not fits:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} do not fit steps {tuple(step.shape)} "
            f"and minima {tuple(minimum.shape)}"
        )
    if channel_scale is not None:
        _check_scale(channel_scale, codes.shape)


def _one_group(quantized: Quantized) -> Quantized:
    codes, step, minimum = quantized
    shape = codes.shape[:-1]
    return Quantized(codes, step.reshape(shape), minimum.reshape(shape))


def _no_values(values: torch.Tensor, shape: tuple[int, ...]) -> Quantized:
    """Return what an empty tensor quantises to: parameters, if any, of a group of zeros."""
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    step = torch.ones(shape, device=values.device)
    return Quantized(codes, step, torch.zeros_like(step))
