"""ZipCache's quantisers: golden numbers, error bounds, and every version bit for bit."""

import pytest
import torch

from kvstrata.kernels.byte_planes import merge_bytes, split_bytes
from kvstrata.kernels.paper_quantizers import (
    channel_scales,
    compression_ratio,
    dequantize_channelwise,
    dequantize_groupwise,
    dequantize_reference,
    dequantize_separable,
    dequantize_tokenwise,
    num_parameters,
    quantize_channelwise,
    quantize_groupwise,
    quantize_reference,
    quantize_separable,
    quantize_tokenwise,
    requantize,
)
from kvstrata.kernels.paper_quantizers_numba import (
    dequantize_numba,
    quantize_channels_numba,
    quantize_groups_numba,
)
from kvstrata.kernels.paper_quantizers_triton import (
    dequantize_triton,
    quantize_channels_triton,
    quantize_groups_triton,
)
from kvstrata.kernels.planes import pack_planar, unpack_planar

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "one": (1, 1, 32),
    "small": (1, 3, 64),
    "odd": (3, 37, 80),
    "long": (1, 130, 96),
    "common": (2, 2, 128),
    "wide": (2, 5, 256),
}
HALF_ULP = 2.0**-24
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_width = pytest.mark.parametrize("bits", [1, 2, 4, 8])

GOLDEN = torch.tensor([[1, -2, 4, 0.25], [0.5, 8, -4, 1], [-1, 0.5, 2, -0.5]])


def test_separable_codes_of_the_golden_tokens():
    (codes, step, minimum), scale = quantize_separable(GOLDEN, 2)
    torch.testing.assert_close(scale, torch.tensor([1, 8**0.5, 2, 1]))
    assert codes.tolist() == [[2, 0, 3, 1], [2, 3, 0, 2], [0, 2, 3, 1]]
    assert minimum.tolist() == pytest.approx([-0.707107, -2, -1], abs=1e-6)
    assert step.tolist() == pytest.approx([0.902369, 1.609476, 0.666667], abs=1e-6)
    read = dequantize_separable(quantize_separable(GOLDEN, 2)[0], scale)
    assert (read - GOLDEN).square().mean().item() == pytest.approx(0.066768, abs=1e-6)
    plain = dequantize_tokenwise(quantize_tokenwise(GOLDEN, 2))
    assert (plain - GOLDEN).square().mean().item() == pytest.approx(0.234375, abs=1e-6)
    four, scale = quantize_separable(GOLDEN, 4)
    assert four.codes.tolist() == [[9, 0, 15, 5], [8, 15, 0, 9], [0, 9, 15, 4]]
    error = (dequantize_separable(four, scale) - GOLDEN).square().mean()
    assert error.item() == pytest.approx(0.0026276, abs=1e-7)
    plain = dequantize_tokenwise(quantize_tokenwise(GOLDEN, 4))
    assert (plain - GOLDEN).square().mean().item() == pytest.approx(0.0177083, abs=1e-7)


@each_dtype
@each_width
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiled_codes_and_values_equal_the_reference_bit_for_bit(shape, bits, dtype):
    values = (torch.randn(shape) * 3 + torch.randn(shape[-1])).to(dtype)
    scale = channel_scales(values)
    group = 16
    versions = (
        (quantize_channels_numba, quantize_groups_numba, dequantize_numba),
        (quantize_channels_triton, quantize_groups_triton, dequantize_triton),
    )
    by_channel = quantize_reference(values, bits, -2)
    scaled = (values.float() / scale[:, None]).unflatten(-1, (-1, group))
    by_group = quantize_reference(scaled, bits, -1)
    for channels, groups, dequantize in versions:
        for found, expected in zip(channels(values, bits), by_channel, strict=True):
            assert torch.equal(found, expected)
        codes, step, minimum = groups(values, bits, group, scale)
        assert torch.equal(codes, by_group.codes.flatten(-2))
        assert torch.equal(step, by_group.step)
        assert torch.equal(minimum, by_group.minimum)
        parameters = by_channel.step[:, None], by_channel.minimum[:, None], None
        for arguments in ((by_channel.codes, *parameters), (codes, step, minimum, scale)):
            read = dequantize(*arguments, dtype)
            expected = dequantize_reference(*arguments, dtype)
            if dequantize is dequantize_triton and dtype == torch.bfloat16:
                # Triton's interpreter cuts bf16 off instead of rounding.
                assert (
                    (read.float() - expected.float()).abs() <= expected.float().abs() / 128
                ).all()
            else:
                assert torch.equal(read, expected)


@each_dtype
@each_width
def test_errors_are_at_most_half_a_step(bits, dtype):
    values = (torch.randn(2, 50, 96) * 20 - 7).to(dtype)
    wide = values.double()
    slack = 8 * wide.abs().amax() * HALF_ULP * 2
    by_channel = quantize_channelwise(values, bits)
    error = (dequantize_channelwise(by_channel).double() - wide).abs()
    assert (error <= by_channel.step[:, None] / 2 + slack).all()
    by_token = quantize_tokenwise(values, bits)
    assert by_token.step.shape == (2, 50)
    error = (dequantize_tokenwise(by_token).double() - wide).abs()
    assert (error <= by_token.step[..., None] / 2 + slack).all()
    by_group = quantize_groupwise(values, bits, 32)
    assert by_group.step.shape == (2, 50, 3)
    error = (dequantize_groupwise(by_group).double() - wide).abs().unflatten(-1, (3, 32))
    assert (error <= by_group.step[..., None] / 2 + slack).all()
    separable, scale = quantize_separable(values, bits)
    error = (dequantize_separable(separable, scale).double() - wide).abs()
    assert (error <= scale[:, None] * separable.step[..., None] / 2 + slack).all()
    for quantized in (by_channel, by_token, by_group, separable):
        assert quantized.codes.max() == 2**bits - 1
        assert quantized.codes.min() == 0


@each_width
def test_requantising_a_reading_is_the_identity(bits):
    values = torch.randn(2, 40, 64)
    by_channel = quantize_channelwise(values, bits)
    parameters = by_channel.step[:, None], by_channel.minimum[:, None]
    again = requantize(dequantize_channelwise(by_channel), *parameters, bits)
    assert torch.equal(again, by_channel.codes)
    separable, scale = quantize_separable(values, bits)
    read = dequantize_separable(separable, scale)
    once_more, _ = quantize_separable(read, bits, scale)
    assert torch.equal(once_more.codes, separable.codes)
    beyond = requantize(torch.tensor([-9.0, 9.0]), torch.ones(2), torch.zeros(2), bits)
    assert beyond.tolist() == [0, min(9, 2**bits - 1)]


def test_one_loud_channel_costs_the_others_less_when_it_is_scaled():
    values = torch.randn(1, 512, 64)
    values[..., 7] *= 30
    others = torch.arange(64) != 7

    def loss(read: torch.Tensor) -> float:
        return (read - values)[..., others].square().mean().item()

    for bits, times in ((2, 3), (4, 8)):
        plain = loss(dequantize_tokenwise(quantize_tokenwise(values, bits)))
        assert plain > times * loss(dequantize_separable(*quantize_separable(values, bits)))


@each_dtype
@each_width
def test_a_group_without_range_reads_as_its_value(bits, dtype):
    for value in (0.0, 1.5, -3.0, 2.0**-24):
        values = torch.full((2, 5, 32), value).to(dtype)
        for quantized in (
            quantize_channelwise(values, bits),
            quantize_tokenwise(values, bits),
            quantize_groupwise(values, bits, 8),
        ):
            assert (quantized.codes == 0).all()
            assert (quantized.step == 1).all()
        read = dequantize_tokenwise(quantize_tokenwise(values, bits), dtype)
        assert torch.equal(read, values)
    values = torch.zeros(1, 4, 8)
    values[..., 3] = torch.tensor([1.0, 2.0, -2.0, 0.5])
    separable, scale = quantize_separable(values, bits)
    assert scale[0, 0] == 1
    assert torch.isfinite(dequantize_separable(separable, scale)).all()


def test_a_denormal_range_counts_as_none():
    values = torch.tensor([[0.0, 300 * 2.0**-149], [0.0, 1.0]])
    for quantized in (
        quantize_tokenwise(values, 8),
        quantize_groups_triton(values[None], 8, 2, None),
    ):
        codes, step, _ = quantized
        assert codes.view(2, 2).tolist() == [[0, 0], [0, 255]]
        assert step.view(2)[0] == 1


def test_the_top_code_is_never_passed():
    values = torch.randn(20000, 2) * 10.0 ** torch.randint(-30, 30, (20000, 1))
    for bits in range(1, 9):
        codes = quantize_tokenwise(values, bits).codes
        assert torch.equal(codes.amax(-1), torch.full((20000,), 2**bits - 1, dtype=torch.uint8))


def test_halves_round_to_even():
    values = torch.tensor([[0.0, 0.5, 1.5, 2.5, 15.0]])
    assert quantize_tokenwise(values, 4).codes.tolist() == [[0, 0, 2, 2, 15]]


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    values = torch.randn(2, 9, 32)
    values[1, 4, 31] = bad
    for quantize in (quantize_channelwise, quantize_tokenwise):
        with pytest.raises(ValueError, match="not finite"):
            quantize(values, 4)
        with pytest.raises(ValueError, match="not finite"):
            quantize(values.bfloat16(), 4)
    with pytest.raises(ValueError, match="not finite"):
        quantize_reference(values, 4, -1)
    with pytest.raises(ValueError, match="not finite"):
        quantize_tokenwise(torch.tensor([[3e38, -3e38]]), 4)


def test_empty_and_strided_values():
    for quantize, shape in ((quantize_channelwise, (2, 8)), (quantize_tokenwise, (2, 0))):
        codes, step, minimum = quantize(torch.zeros(2, 0, 8), 4)
        assert codes.shape == (2, 0, 8)
        assert step.shape == minimum.shape == shape
    assert dequantize_channelwise(quantize_channelwise(torch.zeros(2, 0, 8), 4)).shape == (2, 0, 8)
    strided = torch.randn(6, 2, 32).transpose(0, 1)
    for quantize in (quantize_channelwise, quantize_tokenwise):
        plain = quantize(strided.contiguous(), 4)
        assert all(torch.equal(a, b) for a, b in zip(quantize(strided, 4), plain, strict=True))


def test_sequences_do_not_share_parameters():
    values = torch.randn(3, 20, 16)
    whole = quantize_channelwise(values, 4)
    for i in range(3):
        alone = quantize_channelwise(values[i], 4)
        assert torch.equal(alone.codes, whole.codes[i])
        assert torch.equal(alone.step, whole.step[i])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_pass_through_packing(bits):
    codes = quantize_tokenwise(torch.randn(3, 64), bits).codes
    assert torch.equal(unpack_planar(pack_planar(codes, bits), bits), codes)


def test_sixteen_bits_are_the_values_themselves():
    values = torch.randn(4, 80).bfloat16()
    assert torch.equal(merge_bytes(split_bytes(values), values.dtype).view(4, 80), values)
    with pytest.raises(ValueError, match="bits must be 1 to 8, not 16"):
        quantize_tokenwise(values, 16)


def test_parameters_are_counted_as_in_the_paper():
    sizes = (8, 4096, 4096)
    assert 2 * num_parameters("groupwise", *sizes, 32) == 16_777_216
    assert 2 * num_parameters("tokenwise", *sizes) == 131_072
    both = num_parameters("channelwise", *sizes) + num_parameters("separable", *sizes)
    assert both == 77_824
    assert num_parameters("groupwise", *sizes, 32) == 8_388_608
    assert num_parameters("separable", *sizes) == 69_632


@pytest.mark.parametrize(
    ("share", "batch", "num_tokens", "classes", "ratio"),
    [
        (1.0, 8, 4096, 1, 3.995),
        (0.6, 1, 4096, 1, 4.985),
        (0.6, 1, 4096, 2, 4.979),
        (0.6, 8, 840, 2, 4.985),
        (0.7, 1, 4096, 1, 4.692),
        (0.7, 1, 4096, 2, 4.687),
        (0.286, 1, 4096, 1, 6.197),
        (0.286, 1, 4096, 2, 6.188),
    ],
)
def test_the_ratio_of_mixed_precision(share, batch, num_tokens, classes, ratio):
    sizes = (batch, num_tokens, 4096)
    parameters = classes * num_parameters("channelwise", *sizes)
    parameters += num_parameters("separable", *sizes)
    elements = 2 * batch * num_tokens * 4096
    found = compression_ratio(elements, share * 4 + (1 - share) * 2, parameters)
    assert found == pytest.approx(ratio, abs=6e-4)


def test_the_ratio_of_one_precision():
    sizes, elements = (8, 4096, 4096), 2 * 8 * 4096 * 4096
    for scheme, group_size, ratio in (
        ("groupwise", 32, 3.2),
        ("groupwise", 128, 3.765),
        ("tokenwise", 1, 3.992),
    ):
        parameters = 2 * num_parameters(scheme, *sizes, group_size)
        assert compression_ratio(elements, 4, parameters) == pytest.approx(ratio, abs=6e-4)
    assert compression_ratio(elements, 16, 0) == 1  # nothing quantised


def test_inputs_that_make_no_sense_are_refused():
    values = torch.zeros(2, 5, 8)
    for call, said in (
        (lambda: quantize_tokenwise(values, 0), "not 0"),
        (lambda: quantize_channelwise(values, 9), "not 9"),
        (lambda: quantize_tokenwise(values.double(), 4), "bf16, fp16 or fp32"),
        (lambda: quantize_channelwise(values[0, 0], 4), "tokens, channels"),
        (lambda: quantize_channelwise(values[..., :0], 4), "tokens, channels"),
        (lambda: quantize_tokenwise(values[..., :0], 4), "tokens, channels"),
        (lambda: quantize_groupwise(values, 4, 3), "must divide 8, and 3"),
        (lambda: quantize_groupwise(values, 4, 0), "must divide 8, and 0"),
        (lambda: quantize_separable(values, 4, torch.ones(8)), "one float32 scale per channel"),
        (lambda: quantize_separable(values, 4, torch.ones(2, 8).to("meta")), "on one device"),
        (lambda: num_parameters("rowwise", 1, 1, 8), "'rowwise'"),
        (lambda: num_parameters("groupwise", 1, 1, 8, 3), "must divide 8"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    found = quantize_tokenwise(values, 4)
    with pytest.raises(ValueError, match="codes must be uint8"):
        dequantize_tokenwise(found._replace(codes=found.codes.int()))
    with pytest.raises(ValueError, match="do not fit steps"):
        dequantize_tokenwise(found._replace(step=found.step[:, :3], minimum=found.minimum[:, :3]))
    with pytest.raises(ValueError, match=r"as torch\.float64"):
        dequantize_tokenwise(found, torch.float64)
