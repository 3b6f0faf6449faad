"""Tokens to planes and back: fast as in the reference, and every class reads as it was stored."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvstrata.kernels.block_planes import PlaneLayout, encode_block_planes
from kvstrata.kernels.component_basis import (
    ComponentBasis,
    encode_tokens,
    expand,
    expand_reference,
    to_components,
)
from kvstrata.kernels.escape_rows import pack_escape_rows, scatter_escape_rows
from kvstrata.kernels.mid_rows import pack_mid_rows
from kvstrata.kernels.token_masks import to_flags, token_classes
from kvstrata.kernels.value_bias import (
    ValueBias,
    decode_value_bias,
    encode_value_bias,
    mean_errors_reference,
)
from tests.kernels.calibrated_layer import DIMS, Layer, make_layer

SHAPES = [(1, 1, dim) for dim in DIMS] + [(3, 5, 64)]
# One rounding of the output, and for halves the product's of y, table and sum.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 1.5e-2}


def stored(layer: Layer) -> dict[str, Any]:
    y, words, _ = encode_tokens(layer.tokens, layer.basis, layer.weights)
    layout, classes = layer.basis.layout, layer.classes
    bias = encode_value_bias(
        y,
        words,
        layout,
        weights=torch.rand(y.shape[:3]),
        base=classes.base,
        deviation=layer.basis.deviation,
    )
    return {
        "words": words,
        "mid": pack_mid_rows(y, classes.mid, layout),
        "bias": bias,
        "escapes": pack_escape_rows(layer.tokens, classes.escape),
    }


def tables(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(tokens)[:, None] * torch.exp(-0.2 * torch.arange(dim // 2))
    angle = torch.cat([angle, angle], 1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "blocks", "dim"), SHAPES)
def test_expanding_is_the_reference_s(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    layer = make_layer(heads, blocks, dim, dtype)
    parts = stored(layer)
    shift = torch.baddbmm(
        layer.basis.mean[:, None],
        decode_value_bias(parts["bias"]).transpose(0, 1) / layer.basis.deviation[:, None],
        layer.basis.inverse,
    )
    for rotation in (None, tables(blocks * 64, dim)):
        for names in ((), ("mid",), ("mid", "bias", "escapes"), ("escapes",)):
            chosen = {name: parts[name] for name in names}
            found = expand(
                parts["words"], layer.basis, layer.classes, rotation=rotation, dtype=dtype, **chosen
            )
            expected = torch.empty(found.shape)
            expand_reference(
                parts["words"],
                layer.basis,
                layer.classes,
                chosen.get("mid"),
                shift if "bias" in names else None,
                chosen.get("escapes"),
                rotation,
                expected,
            )
            assert found.dtype == dtype
            error = (found.float() - expected).abs().max()
            assert error <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "blocks", "dim"), SHAPES)
def test_encoding_is_that_of_its_components(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    layer = make_layer(heads, blocks, dim, dtype)
    strided = layer.tokens.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    y, words, error = encode_tokens(strided, layer.basis, layer.weights)
    for found in (y, to_components(layer.tokens, layer.basis)):
        assert (_error(found, layer) <= 1).all()
    expected_words, expected_error = encode_block_planes(y, layer.basis.layout, layer.weights)
    assert torch.equal(words, expected_words)
    assert torch.equal(error, expected_error)


def _error(y: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Return how far components are from the exact ones, in what the formats may cost.

    That is half a last place of each table entry and centred token, and of the result.
    """
    centred = layer.tokens.double() - layer.basis.mean[:, None, None]
    forward = layer.basis.forward.double()[:, None]
    exact = centred @ forward
    step = 2**-8 if y.dtype == torch.bfloat16 else 2**-20
    return (y - exact).abs() / (step * (centred.abs() @ forward.abs() + exact.abs()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 80])
def test_bytes_do_not_depend_on_what_is_encoded_together(dim: int, dtype: torch.dtype) -> None:
    layer = make_layer(3, 9, dim, dtype)
    basis, weights = layer.basis, layer.weights
    y, words, error = encode_tokens(layer.tokens, basis, weights)
    masks = layer.classes.mid
    rows = pack_mid_rows(y, masks, basis.layout)
    for first, last in ((0, 4), (0, 1), (8, 9), (2, 7)):
        part = encode_tokens(layer.tokens[:, first:last], basis, weights)
        assert torch.equal(part[0], y[:, first:last])
        assert torch.equal(part[1], words[first:last])
        assert torch.equal(part[2], error[:, first:last])
        told = pack_mid_rows(part[0], masks[:, first:last].contiguous(), basis.layout)
        start, end = rows.block_offsets[[first, last]].tolist()
        assert torch.equal(told.rows, rows.rows[start:end])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    layer = make_layer(3, 40, 64, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            parts = stored(layer)
            found = expand(layer_words := parts.pop("words"), layer.basis, layer.classes, **parts)
            results.append((layer_words, found))
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


def test_each_class_reads_as_it_was_stored() -> None:
    layer = make_layer(3, 4, 64)
    full = PlaneLayout(layer.basis.layout.widths, torch.full((3,), 64))
    layer.basis = replace(layer.basis, layout=full)
    parts, classes, x = stored(layer), layer.classes, layer.tokens
    found = expand(layer_words := parts.pop("words"), layer.basis, classes, dtype=x.dtype, **parts)
    plain = expand(layer_words, layer.basis, classes, dtype=x.dtype)

    def loss(out: torch.Tensor, masks: torch.Tensor) -> float:
        return float((out - x)[to_flags(masks)].square().mean())

    mean = layer.basis.mean[:, None, None].expand(x.shape)
    dropped = to_flags(classes.dropped)
    assert torch.equal(found[dropped], mean[dropped])
    assert loss(found, classes.escape) < 1e-3 * loss(plain, classes.escape)
    assert loss(found, classes.mid) < 0.3 * loss(plain, classes.mid)
    assert loss(found, classes.base) < loss(plain, classes.base)


@pytest.mark.parametrize("escape", [0, -1])
@pytest.mark.parametrize("mid", [0, -1])
def test_blocks_of_one_class_work(mid: int, escape: int) -> None:
    layer = make_layer(2, 2, 64)
    masks = torch.full((2, 2), mid), torch.full((2, 2), escape)
    layer.classes = token_classes(*masks)
    parts = stored(layer)
    if mid or escape:
        assert not parts["bias"].scales.any()
    found = expand(parts.pop("words"), layer.basis, layer.classes, dtype=torch.float32, **parts)
    assert torch.isfinite(found).all()
    if escape and not mid:
        peak = layer.tokens.abs().max()
        assert (found - layer.tokens).abs().max() < peak * 64**0.5 / 127


def test_escapes_come_back_in_their_places() -> None:
    layer = make_layer(3, 4, 80)
    rows = pack_escape_rows(layer.tokens, layer.classes.escape)
    out = torch.zeros_like(layer.tokens)
    scatter_escape_rows(rows, out)
    flags = to_flags(layer.classes.escape)
    assert not out[~flags].any()
    assert rows.block_offsets.tolist()[-1] == int(flags.sum()) == len(rows.scales)
    # An int8 step is at most norm / 127, and half of it in each of D turned channels.
    norm = layer.tokens[flags].norm(dim=-1)
    assert ((out - layer.tokens)[flags].norm(dim=-1) <= norm / 127 * 0.51 * 80**0.5).all()


@pytest.mark.parametrize("dim", [64, 80])
def test_bias_is_the_weighted_mean_error_within_half_a_step(dim: int) -> None:
    layer = make_layer(3, 5, dim, torch.bfloat16)
    y, words, _ = encode_tokens(layer.tokens, layer.basis, layer.weights)
    layout, deviation = layer.basis.layout, layer.basis.deviation
    weights = torch.rand(y.shape[:3])
    weights[0, 0] = 0
    bias = encode_value_bias(
        y, words, layout, weights=weights, base=layer.classes.base, deviation=deviation
    )
    told = mean_errors_reference(y, words, layout, weights, layer.classes.base)
    told = (told * deviation[:, None]).transpose(0, 1)
    read = decode_value_bias(bias)
    assert int(bias.scales[0, 0]) == 0
    assert not read[0, 0].any()
    told[0, 0] = 0
    step = told.abs().amax(-1, keepdim=True) / 7 * 2 ** (1 / 32)
    # the largest may be cut off by up to half a sixteenth of an octave
    assert ((read - told).abs() <= step * 0.5 + told.abs() * (1 - 2 ** (-1 / 32)) + 1e-6).all()


def test_every_bias_byte_decodes_to_its_step() -> None:
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    nibbles = torch.full((256, 1, 1), 0x9 | 0x0 << 4, dtype=torch.uint8)
    read = decode_value_bias(ValueBias(nibbles, scales))
    assert not read[0].any()
    assert read[192, 0].tolist() == [1.0, -8.0]
    torch.testing.assert_close(read[208, 0], torch.tensor([2.0, -16.0]))
    assert torch.isfinite(read).all()


def test_parts_that_do_not_belong_together_are_refused() -> None:
    layer = make_layer(2, 3, 64)
    parts = stored(layer)
    words, basis, classes = parts["words"], layer.basis, layer.classes
    escapes, mid = parts["escapes"], parts["mid"]
    other = token_classes(classes.base, classes.base)
    cos, sin = tables(3 * 64, 64)
    broken: dict[str, dict[str, Any]] = {
        "escape codes": {"escapes": replace(escapes, codes=escapes.codes[:-1])},
        "escape scales": {"escapes": replace(escapes, scales=escapes.scales[:-1])},
        "escape block offsets": {"escapes": replace(escapes, block_offsets=mid.block_offsets)},
        "bias must": {"bias": ValueBias(parts["bias"].nibbles[:1], parts["bias"].scales[:1])},
        "cos and sin": {"rotation": (cos[:-1], sin)},
        "expanded to": {"dtype": torch.float64},
        "out must": {"out": torch.empty(2, 3, 64, 64)},
    }
    for match, wrong in broken.items():
        with pytest.raises(ValueError, match=match):
            expand(words, basis, classes, **wrong)
    for match, right in {"mid rows": {"mid": mid}, "escape rows": {"escapes": escapes}}.items():
        with pytest.raises(ValueError, match=f"{match} are of other"):
            expand(words, basis, other, **right)
    with pytest.raises(ValueError, match="tokens must be"):
        encode_tokens(layer.tokens[:1], basis, layer.weights)
    for weights in (layer.weights[:1], layer.weights[:, :16], layer.weights.double()):
        with pytest.raises(ValueError, match="weights must be"):
            encode_tokens(layer.tokens, basis, weights)
    with pytest.raises(ValueError, match="above zero"):
        replace(basis, deviation=basis.deviation * 0)
    with pytest.raises(ValueError, match="mean must"):
        ComponentBasis(basis.layout, basis.mean[:1], basis.forward, basis.inverse, basis.deviation)
    bad = layer.tokens.clone()
    bad[1, 2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        encode_tokens(bad, basis, layer.weights)
