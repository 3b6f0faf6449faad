"""Tokens to planes and back: fast as in the reference, and every class reads as it was stored."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvstrata.kernels import (
    block_planes,
    component_basis,
    component_basis_triton,
    escape_rows,
    mid_rows,
    value_bias,
)
from kvstrata.kernels.block_planes import PlaneLayout, encode_block_planes
from kvstrata.kernels.component_basis import (
    ComponentBasis,
    encode_tokens,
    expand,
    expand_reference,
    to_components,
)
from kvstrata.kernels.component_basis_triton import encode_tokens_triton, expand_triton
from kvstrata.kernels.escape_rows import pack_escape_rows, scatter_escape_rows
from kvstrata.kernels.mid_rows import pack_mid_rows
from kvstrata.kernels.token_masks import to_flags, token_classes
from kvstrata.kernels.value_bias import (
    ValueBias,
    decode_value_bias,
    encode_value_bias,
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
        layer.basis.mean[:, None].double(),
        decode_value_bias(parts["bias"]).transpose(0, 1) / layer.basis.deviation[:, None].double(),
        layer.basis.inverse.double(),
    ).float()
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


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter multiply float32: it takes bf16 for integers."""
    monkeypatch.setattr(component_basis_triton, "product_dtype", lambda _: torch.float32)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("heads", "blocks", "dim", "dtype"),
    [
        (1, 1, 32, torch.float32),
        (3, 1, 64, torch.bfloat16),
        (2, 3, 80, torch.float16),
        (1, 2, 96, torch.float32),
        (1, 1, 128, torch.bfloat16),
        (1, 1, 256, torch.float32),
    ],
    ids=str,
)
def test_triton_expands_like_the_reference(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    layer = make_layer(heads, blocks, dim, dtype)
    parts = stored(layer)
    shift = layer.basis.mean[:, None] + torch.randn(heads, blocks, dim)
    turns = tables(blocks * 64, dim)
    for mid, bias, escapes, rotation in (
        (None, None, None, None),
        (parts["mid"], shift, parts["escapes"], turns),
        (None, shift, None, turns),
        (parts["mid"], None, parts["escapes"], None),
    ):
        arguments = parts["words"], layer.basis, layer.classes, mid, bias, escapes, rotation
        expected = torch.empty(layer.tokens.shape)
        expand_reference(*arguments, expected)
        found = torch.full_like(layer.tokens, torch.nan)
        expand_triton(*arguments, found)
        error = (found.float() - expected).abs().max()
        assert error <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("escape", [0, -1])
@pytest.mark.parametrize("mid", [0, -1])
def test_triton_expands_blocks_of_one_class(mid: int, escape: int) -> None:
    layer = make_layer(2, 1, 32)
    layer.classes = token_classes(torch.full((2, 1), mid), torch.full((2, 1), escape))
    parts = stored(layer)
    arguments = parts["words"], layer.basis, layer.classes, parts["mid"], None, parts["escapes"]
    expected, found = torch.empty(2, 2, 1, 64, 32).fill_(torch.nan)
    expand_reference(*arguments, None, expected)
    expand_triton(*arguments, None, found)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("interpreted")
def test_a_gpu_stores_and_reads_what_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op of the codec finds its kernel, and they fit together."""
    layer = make_layer(2, 2, 64)

    def store_and_read() -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        parts = stored(layer)
        y = block_planes.decode_block_planes(parts["words"], layer.basis.layout, parts["mid"])
        rotation, dtype = tables(2 * 64, 64), torch.float32
        found = expand(
            basis=layer.basis, classes=layer.classes, rotation=rotation, dtype=dtype, **parts
        )
        scatter_escape_rows(parts["escapes"], found)
        return parts, y, found

    of_cpu, of_planes, expected = store_and_read()
    called = []
    for module in (block_planes, component_basis, escape_rows, mid_rows, value_bias):
        monkeypatch.setattr(
            module, "backend_of", lambda *_, name=module.__name__: called.append(name) or "triton"
        )
    of_gpu, y, found = store_and_read()
    assert len(set(called)) == 5
    # Sums of components differ in the last bits, and so may what lies next to a border.
    for cpu, gpu in ((of_cpu["words"], of_gpu["words"]), (of_cpu["mid"].rows, of_gpu["mid"].rows)):
        assert cpu.shape == gpu.shape
        assert (cpu != gpu).float().mean() < 0.01
    assert torch.equal(of_cpu["bias"].scales, of_gpu["bias"].scales)
    assert (y - of_planes).square().mean() < 1e-4
    assert (found - expected).square().mean() < 1e-4 * expected.square().mean()


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


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("heads", "blocks", "dim", "dtype"),
    [
        (1, 1, 32, torch.float32),
        (2, 2, 80, torch.bfloat16),
        (1, 1, 96, torch.float16),
        (1, 1, 256, torch.float32),
    ],
    ids=str,
)
def test_triton_encodes_what_are_its_components(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    layer = make_layer(heads, blocks, dim, dtype)
    strided = layer.tokens.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    room = torch.full(strided.shape, torch.nan)
    y, words, error = encode_tokens_triton(strided, layer.basis, layer.weights, room)
    assert y is room
    assert (_error(y, layer) <= 1).all()
    expected_words, expected_error = encode_block_planes(y, layer.basis.layout, layer.weights)
    assert torch.equal(words, expected_words)
    torch.testing.assert_close(error, expected_error, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_triton_refuses_tokens_that_are_not_finite() -> None:
    layer = make_layer(1, 1, 32)
    layer.tokens[0, 0, 63, 31] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        encode_tokens_triton(layer.tokens, layer.basis, layer.weights, None)


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
