"""The nested block codec: equal bytes from every version, errors as scales say, bad input."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvstrata.kernels.nested_block import (
    decode_blocks,
    decode_blocks_reference,
    encode_blocks,
    encode_blocks_reference,
)
from kvstrata.kernels.nested_block_triton import decode_blocks_triton, encode_blocks_triton
from kvstrata.kernels.nested_decode_numba import STREAMED_BYTES
from kvstrata.kernels.nested_layout import NestedLayout, Rows

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    # layers, heads, blocks, head_dim, sinks
    (1, 1, 1, 64, 0),
    (2, 3, 2, 64, 4),
    (2, 2, 2, 80, 70),
    (1, 2, 3, 96, 3),
    (1, 2, 1, 128, 64),
    (1, 1, 2, 256, 62),
    (2, 1, 1, 8, 2),
    (1, 2, 1, 32, 5),
]
INTERPRETED = [(1, 2, 1, 64, 3), (2, 1, 2, 80, 70), (1, 1, 1, 32, 64), (1, 1, 1, 128, 0)]

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
each_shape = pytest.mark.parametrize(("layers", "heads", "count", "dim", "sinks"), SHAPES, ids=str)


def _blocks(
    layers: int, heads: int, count: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys with constant and signed-zero channels, values with silent and quiet tokens."""
    shape = (layers, heads, count, 64, dim)
    keys, values = torch.randn(shape) * 3 + 1, torch.randn(shape)
    keys[..., 1], keys[..., 2] = 0, 5
    keys[..., ::2, 3], keys[..., 1::2, 3] = 0.0, -0.0
    keys[..., 4] *= 1000
    values[..., 3, :] = 0
    values[..., 7, :] *= 1e-5
    values[..., 9, :] *= 300
    return keys.to(dtype), values.to(dtype)


def _rows(records: torch.Tensor) -> list[Rows]:
    return list(records.numpy())


def _ulps(read: torch.Tensor, told: torch.Tensor) -> int:
    """Return the largest distance of two tensors in units of the last place."""
    kind = torch.int32 if read.dtype == torch.float32 else torch.int16
    assert torch.equal(read.signbit() & (read != 0), told.signbit() & (told != 0))
    steps = read.abs().view(kind).long() - told.abs().view(kind).long()
    return int(steps.abs().max())


@each_dtype
@each_shape
def test_the_cpu_version_equals_the_reference_bit_for_bit(
    layers: int, heads: int, count: int, dim: int, sinks: int, dtype: torch.dtype
) -> None:
    keys, values = _blocks(layers, heads, count, dim, dtype)
    base, mid = encode_blocks(keys, values, sinks, lead_bytes=6)
    told_base, told_mid = encode_blocks_reference(keys, values, sinks)
    assert torch.equal(base[..., 6:], told_base)
    assert torch.equal(mid, told_mid)
    layout = NestedLayout.of(heads, dim)
    for fine in (told_mid, None):
        rows = None if fine is None else _rows(fine)
        read = decode_blocks([r[:, 6:] for r in _rows(base)], rows, layout, dtype)
        told = decode_blocks_reference(told_base, fine, layout)
        for one, other in zip(read, told, strict=True):
            assert one.shape == keys.shape
            assert one.is_contiguous()
            assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"), list(zip(INTERPRETED, [*FLOATS, torch.bfloat16], strict=True))
)
def test_the_gpu_version_equals_the_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    *sizes, sinks = shape
    keys, values = _blocks(*sizes, dtype=dtype)
    layout = NestedLayout.of(shape[1], shape[3])
    told_base, told_mid = encode_blocks_reference(keys, values, sinks)
    base, mid = torch.full_like(told_base, 99), torch.full_like(told_mid, 99)
    assert encode_blocks_triton(keys, values, sinks, layout, base, mid) == 0
    assert torch.equal(base, told_base)
    assert torch.equal(mid, told_mid)
    for fine in (mid, None):
        read = torch.full_like(keys, torch.nan), torch.full_like(keys, torch.nan)
        decode_blocks_triton(base, fine, layout, *read)
        told = decode_blocks_reference(base, fine, layout)
        for one, other in zip(read, told, strict=True):
            # Triton's interpreter cuts bf16 off where a GPU rounds it.
            assert _ulps(one, other.to(dtype)) <= (dtype == torch.bfloat16)


@each_shape
def test_errors_stay_within_what_scales_say(
    layers: int, heads: int, count: int, dim: int, sinks: int
) -> None:
    keys, values = _blocks(layers, heads, count, dim, torch.float32)
    base, mid = encode_blocks(keys, values)
    layout = NestedLayout.of(heads, dim)
    for fine, key_steps, value_error in ((_rows(mid), 0.5, 0.0098), (None, 4.0, 0.119)):
        read_keys, read_values = decode_blocks(_rows(base), fine, layout, torch.float32)
        low, high = keys.amin(-2, keepdim=True), keys.amax(-2, keepdim=True)
        step = (high - low) / 31 + low.abs() * 2.0**-11
        bound = key_steps * step + (low.abs() + 2 * (high - low)) * 2.0**-10 + 2.0**-18
        assert ((read_keys - keys).abs() <= bound).all()
        loud = [t for t in range(64) if t not in (3, 7, 9)]
        error = (read_values - values)[..., loud, :].square().mean((-1, -2))
        power = values[..., loud, :].square().mean((-1, -2))
        if dim >= 64:
            assert (error <= 1.35 * value_error * power).all()
        # A silent token reads as the smallest level at the smallest scale, all in one channel.
        scale = values.square().mean(-1).sqrt().max() * 2.0 ** (-255 / 16)
        assert read_values[..., 3, :].abs().max() <= 0.5 * scale * dim**0.5


def test_results_too_large_for_a_cache_are_the_same() -> None:
    for heads, dim in ((4, 128), (4, 96), (6, 80)):
        keys, values = _blocks(1, heads, 2, dim, torch.bfloat16)
        base, mid = (_rows(records) * 100 for records in encode_blocks(keys, values))
        layout = NestedLayout.of(heads, dim)
        read = decode_blocks(base, mid, layout, torch.bfloat16)
        assert sum(tensor.nbytes for tensor in read) > STREAMED_BYTES
        told = decode_blocks(base[:2], mid[:2], layout, torch.bfloat16)
        for one, other in zip(read, told, strict=True):
            assert torch.equal(one, other.repeat(1, 1, 100, 1, 1))


def test_equal_blocks_give_equal_bytes_in_any_company() -> None:
    keys, values = _blocks(2, 3, 3, 80, torch.bfloat16)
    base, mid = encode_blocks(keys, values)
    for n in range(3):
        one_base, one_mid = encode_blocks(keys[:, :, n : n + 1], values[:, :, n : n + 1])
        assert torch.equal(one_base[0], base[n])
        assert torch.equal(one_mid[0], mid[n])


STRIDED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    lambda x: torch.stack([x, x], -1)[..., 0],
    lambda x: x.permute(2, 1, 0, 3, 4).contiguous().permute(2, 1, 0, 3, 4),
    lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    lambda x: x[:1].expand(x.shape),
]


@pytest.mark.parametrize("stride", STRIDED)
def test_strides_do_not_matter(stride: Callable[[torch.Tensor], torch.Tensor]) -> None:
    keys, values = (stride(x) for x in _blocks(2, 3, 2, 32, torch.bfloat16))
    for read, told in zip(
        encode_blocks(keys, values, 4),
        encode_blocks(keys.contiguous(), values.contiguous(), 4),
        strict=True,
    ):
        assert torch.equal(read, told)


def test_rows_are_read_in_place_at_any_distance_even_an_odd_one() -> None:
    keys, values = _blocks(3, 2, 1, 32, torch.float32)
    base, mid = encode_blocks(keys, values)
    layout = NestedLayout.of(2, 32)
    told = decode_blocks(_rows(base), _rows(mid), layout, torch.float32)
    for gap in (1, 2, 64):
        wide = np.zeros((3, layout.base_bytes + gap), np.uint8)
        wide[:, : layout.base_bytes] = base[0].numpy()
        wide.flags.writeable = False
        for read, expected in zip(
            decode_blocks([wide], _rows(mid), layout, torch.float32), told, strict=True
        ):
            assert torch.equal(read, expected)


def test_no_blocks_give_no_records() -> None:
    keys = torch.empty(2, 3, 0, 64, 32)
    base, mid = encode_blocks(keys, keys, lead_bytes=8)
    layout = NestedLayout.of(3, 32)
    assert base.shape == (0, 2, 8 + layout.base_bytes)
    assert mid.shape == (0, 2, layout.mid_bytes)


BAD = [float("nan"), float("inf"), float("-inf")]


@each_dtype
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("what", "sinks"), [("keys", 0), ("keys", 64), ("values", 0), ("values", 64)]
)
def test_what_is_not_finite_is_refused(
    what: str, sinks: int, bad: float, dtype: torch.dtype
) -> None:
    keys, values = _blocks(2, 2, 2, 32, dtype)
    (keys if what == "keys" else values)[1, 1, 1, 63, 5] = bad
    for encode in (encode_blocks, encode_blocks_reference):
        with pytest.raises(ValueError, match=f"{what} are not finite"):
            encode(keys, values, sinks)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_the_gpu_version_tells_what_is_not_finite() -> None:
    layout = NestedLayout.of(1, 32)
    for bad in (*BAD, 1e6):
        keys, values = torch.randn(2, 1, 1, 1, 64, 32)
        records = (
            torch.empty(1, 1, layout.base_bytes, dtype=torch.uint8),
            torch.empty(1, 1, layout.mid_bytes, dtype=torch.uint8),
        )
        for tensor, fault in ((keys, 1), (values, 2)):
            wrong = tensor.clone()
            wrong[0, 0, 0, 9, 5] = bad * (40 if bad == 1e6 else 1)
            pair = (wrong, values) if fault == 1 else (keys, wrong)
            assert encode_blocks_triton(*pair, 0, layout, *records) == fault


def test_sinks_may_exceed_fp16_and_others_may_not() -> None:
    keys, values = _blocks(1, 1, 1, 32, torch.float32)
    keys[0, 0, 0, 0, 3] = 1e30
    quiet, _ = encode_blocks(keys, values, 1)
    keys[0, 0, 0, 0, 3] = 0
    assert torch.equal(quiet[..., :132], encode_blocks(keys, values, 1)[0][..., :132])
    keys[0, 0, 0, 0, 3] = 1e30
    with pytest.raises(ValueError, match="keys are not finite or exceed"):
        encode_blocks(keys, values, 0)


def test_other_shapes_and_dtypes_are_refused() -> None:
    good = torch.zeros(1, 1, 1, 64, 32)
    for keys, values in (
        (good[0], good[0]),
        (good[..., :63, :], good[..., :63, :]),
        (good, good[..., :16]),
    ):
        with pytest.raises(ValueError, match="keys and values must both be"):
            encode_blocks(keys, values)
    for keys, values in ((good.double(), good.double()), (good, good.half())):
        with pytest.raises(ValueError, match="bfloat16, float16 or float32"):
            encode_blocks(keys, values)
    for lead_bytes in (-2, 1, 3):
        with pytest.raises(ValueError, match="lead_bytes must be even"):
            encode_blocks(good, good, lead_bytes=lead_bytes)
    for dim in (4, 12, 264):
        with pytest.raises(ValueError, match="multiple of 8 up to 256"):
            encode_blocks(torch.zeros(1, 1, 1, 64, dim), torch.zeros(1, 1, 1, 64, dim))


def test_records_of_another_size_are_refused() -> None:
    layout = NestedLayout.of(2, 32)
    base = np.zeros((3, layout.base_bytes), np.uint8)
    mid = np.zeros((3, layout.mid_bytes), np.uint8)
    decode_blocks([base], [mid], layout, torch.float32)
    wrong: list[tuple[list[Rows], list[Rows] | None]] = [
        ([], None),
        ([base[:, :-1]], None),
        ([base.reshape(-1)], None),
        ([base, base[:2]], None),
        ([base.astype(np.int8)], None),  # type: ignore[list-item]
        ([base[:, ::-1]], None),
        ([base], [mid[:, 1:]]),
        ([base], [mid[:2]]),
        ([base], []),
    ]
    for bad_base, bad_mid in wrong:
        with pytest.raises(ValueError, match="must"):
            decode_blocks(bad_base, bad_mid, layout, torch.float32)
    with pytest.raises(ValueError, match="dtype must be"):
        decode_blocks([base], None, layout, torch.float64)
