"""The calibrated codec: errors as its prices say, sinks apart, and a layout read back by hand."""

import pickle

import numpy as np
import pytest
import torch

from kvstrata.kernels.hadamard import hadamard
from kvstrata.methods import BlockShape, KVBlocks, calibrated
from kvstrata.methods.bit_allocation import DISTORTION, MID_REMAINDER
from kvstrata.methods.calibrated import SINK_TOKENS, CalibratedCodec
from kvstrata.methods.profile import Profile, ProfileError, ProfileStore
from kvstrata.methods.saliency_tag import encode_tags
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame_pb2 import RopeForm
from tests.methods.blocks import BASE, MID, open_all, round_trip, seal_all, shape_of
from tests.methods.profiles import blocks_of, make_profile

THRESHOLD = 0.05
SHAPES = [
    # stored layers, heads, head_dim, blocks, dtype
    (1, 1, 32, 1, torch.float32),
    (2, 2, 64, 3, torch.bfloat16),
    (3, 3, 64, 1, torch.float16),
    (1, 3, 80, 2, torch.float32),
    (2, 1, 128, 1, torch.bfloat16),
    (1, 2, 12, 2, torch.float32),
]
each_shape = pytest.mark.parametrize(("layers", "heads", "dim", "count", "dtype"), SHAPES, ids=str)
ROUNDING = {torch.float32: 1.02, torch.bfloat16: 1.3, torch.float16: 1.1}  # also of components


@pytest.fixture(scope="module")
def profile() -> Profile:
    return make_profile()


@pytest.fixture(scope="module")
def codec(profile: Profile) -> CalibratedCodec:
    return CalibratedCodec(profile, THRESHOLD)


def _costs(
    codec: CalibratedCodec, read: torch.Tensor, put: torch.Tensor, side: int
) -> torch.Tensor:
    """Return what each token's error costs, float64 (L, H, N, T)."""
    tables = codec.sides[side]
    shape = codec.profile.shape
    forward = tables.basis.forward.double().unflatten(0, shape[:2])
    y = (read.double() - put.double()).flatten(2, 3) @ forward
    cost = (y.square() * tables.variance.double().unflatten(0, shape[:2])[:, :, None]).sum(-1)
    return cost.unflatten(2, (-1, 64))


def _expected(codec: CalibratedCodec, side: int) -> torch.Tensor:
    """Return the base cost of a Gaussian token, float64 (L, H)."""
    tables = codec.sides[side]
    distortion = torch.tensor(DISTORTION).double()[tables.basis.layout.widths.long()]
    return (tables.variance * distortion).sum(-1).unflatten(0, codec.profile.shape[:2])


def _masks(codec: CalibratedCodec, blocks: KVBlocks) -> torch.Tensor:
    """Return the stored flags, bool (N, L, kind, side, H, T), kinds being escape and mid."""
    layers, heads, _ = codec.profile.shape
    rows = [
        [np.frombuffer(block[BASE][i], "<u8", 4 * heads) for i in range(layers)]
        for block in codec.encode(blocks)
    ]
    masks = torch.from_numpy(np.array(rows).view(np.int64)).view(-1, layers, 2, 2, heads)
    return (masks[..., None] >> torch.arange(64) & 1).bool()


def _flags(codec: CalibratedCodec, blocks: KVBlocks, side: int) -> tuple[torch.Tensor, ...]:
    """Return which tokens are base, mid and escapes, bool (L, H, N, T) each."""
    flags = _masks(codec, blocks)[:, :, :, side].permute(2, 1, 3, 0, 4)
    assert not (flags[0] & flags[1]).any()
    return ~(flags[0] | flags[1]), flags[1], flags[0]


def _check_prices(codec: CalibratedCodec, blocks: KVBlocks, side: int, slack: float) -> None:
    """Assert that no token loses more than what the next better class costs; weights are one."""
    layers, heads, dim = codec.profile.shape
    put = (blocks.keys, blocks.values)[side]
    base, mid, escape = _flags(codec, blocks, side)
    fine, coarse = round_trip(codec, blocks)[side], round_trip(codec, blocks, [BASE])[side]
    tables = codec.sides[side]
    for read in (fine, coarse):
        assert read.isfinite().all()
        costs = _costs(codec, read, put, side)
        base_price = tables.mid_price.view(layers, heads, 1, 1).expand(costs.shape)
        top_price = tables.escape_price.view(layers, heads, 1, 1).expand(costs.shape)
        assert (costs[base] <= slack * base_price[base]).all()
        assert (costs[mid] <= slack * top_price[mid]).all()
    # Escapes: half a step of 1/127 of the largest turned channel, and a bf16 scale's rounding.
    turned = put.float() @ hadamard(dim)
    bound = turned.abs().amax(-1) * dim**0.5 * (1 / 127 + 2.0**-8)
    if put.dtype != torch.float32:
        bound += put.float().norm(dim=-1) * 2.0**-8
    errors = (fine.float() - put.float()).norm(dim=-1)
    assert (errors[escape] <= bound[escape]).all()
    torch.testing.assert_close(coarse[escape], fine[escape])  # escapes are in base


@each_shape
def test_base_costs_what_theory_says_and_mid_refines_it(
    layers: int, heads: int, dim: int, count: int, dtype: torch.dtype
) -> None:
    profile = make_profile(layers, heads, dim)
    codec = CalibratedCodec(profile, THRESHOLD)
    blocks = blocks_of(profile, count, dtype, outliers=0.02, first_position=64)
    blocks.saliency.zero_()  # every token weighs one
    fine, coarse = round_trip(codec, blocks), round_trip(codec, blocks, [BASE])
    for side, put in enumerate((blocks.keys, blocks.values)):
        assert fine[side].shape == put.shape
        assert fine[side].dtype == dtype
        base, mid, _ = _flags(codec, blocks, side)
        better = _costs(codec, fine[side], put, side)
        worse = _costs(codec, coarse[side], put, side)
        expected = _expected(codec, side)[..., None, None].expand(worse.shape)
        # The costliest tokens are mid or escapes, so what is left is a little below theory.
        ratio = worse[base].mean() / expected[base].mean()
        assert 0.8 / ROUNDING[dtype] < ratio < ROUNDING[dtype]
        assert torch.equal(fine[side][base], coarse[side][base])
        if side == 0:  # at this threshold some shapes have no mid token of the values
            assert better[mid].mean() < 1.5 * MID_REMAINDER * worse[mid].mean()


@each_shape
def test_no_token_of_the_keys_costs_more_than_its_price(
    layers: int, heads: int, dim: int, count: int, dtype: torch.dtype
) -> None:
    profile = make_profile(layers, heads, dim)
    codec = CalibratedCodec(profile, THRESHOLD)
    blocks = blocks_of(profile, count, dtype, outliers=0.1, first_position=64)
    blocks.saliency.zero_()  # every token weighs one
    assert _flags(codec, blocks, 0)[2].any()
    _check_prices(codec, blocks, 0, ROUNDING[dtype])


def test_tokens_that_matter_and_tokens_that_quantise_badly_get_more(profile: Profile) -> None:
    codec = CalibratedCodec(profile, 0.2)
    blocks = blocks_of(profile, 2, outliers=0.0, first_position=64)
    blocks.saliency[:] = 1e-4
    blocks.saliency[..., 10:20] = 1.0
    # The weights' mean is taken over all tokens.
    flags = _masks(codec, blocks)
    more = flags.any(2).float().mean((0, 1, 2, 3))  # (T,)
    assert more[10:20].mean() > 0.9
    assert more[30:].mean() < 0.1
    blocks.saliency.zero_()
    wild = KVBlocks(blocks.keys.clone(), blocks.values.clone(), blocks.saliency, 64)
    wild.keys[..., 5, :] += 30
    wild.values[..., 6, :] += 30
    flags = _masks(codec, wild)
    assert flags[:, :, 0, 0, :, 5].all()
    assert flags[:, :, 0, 1, :, 6].all()
    assert not flags[:, :, 0, 0, :, 6].any()


def test_a_smaller_threshold_stores_more_and_costs_less(profile: Profile) -> None:
    blocks = blocks_of(profile, 2)
    sizes, costs = [], []
    for threshold in (0.001, 0.01, 0.1, 1.0):
        codec = CalibratedCodec(profile, threshold)
        sizes.append(sum(block.num_bytes for block in seal_all(codec, blocks)))
        costs.append(float(_costs(codec, round_trip(codec, blocks)[0], blocks.keys, 0).mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert costs == sorted(costs)


@pytest.mark.parametrize("first_position", [0, 64, 128])
def test_sinks_are_always_escapes_and_only_at_the_start(
    profile: Profile, first_position: int
) -> None:
    codec = CalibratedCodec(profile, 1e9)  # so dear that nothing else is one
    blocks = blocks_of(profile, 2, first_position=first_position)
    escape = _masks(codec, blocks)[:, :, 0]
    expected = torch.zeros_like(escape)
    if first_position == 0:
        expected[0, ..., :SINK_TOKENS] = True
    assert torch.equal(escape, expected)
    keys, values = round_trip(codec, blocks)
    assert keys.isfinite().all()
    if first_position == 0:
        for read, put in ((keys, blocks.keys), (values, blocks.values)):
            relative = (read - put)[:, :, 0, :SINK_TOKENS].norm() / put[
                :, :, 0, :SINK_TOKENS
            ].norm()
            assert relative < 0.02


@pytest.mark.parametrize("saliency", ["unknown", "partly known", "huge", "tiny"])
def test_any_saliency_works(codec: CalibratedCodec, profile: Profile, saliency: str) -> None:
    blocks = blocks_of(profile)
    if saliency == "unknown":
        blocks.saliency.zero_()
    elif saliency == "partly known":
        blocks.saliency[..., ::3] = 0
        blocks.saliency[0, 1] = 0
    else:
        blocks.saliency.mul_(1e20 if saliency == "huge" else 1e-25)
    for read, put in zip(round_trip(codec, blocks), (blocks.keys, blocks.values), strict=True):
        assert (read - put).square().mean() < 0.1 * put.var()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_saliency_that_is_no_number_counts_as_unknown(
    codec: CalibratedCodec, profile: Profile, bad: float
) -> None:
    blocks = blocks_of(profile)
    blocks.saliency[..., ::3] = 0
    expected, masks = round_trip(codec, blocks), _masks(codec, blocks)
    blocks.saliency[..., ::3] = bad
    assert torch.equal(_masks(codec, blocks), masks)
    assert all(map(torch.equal, round_trip(codec, blocks), expected))


def test_saliency_is_stored_with_base_as_the_mean_over_heads(profile: Profile) -> None:
    codec = CalibratedCodec(profile, THRESHOLD)
    blocks = blocks_of(profile)
    layers, heads, _ = profile.shape
    words = [side.basis.layout.words_per_head.view(layers, heads).sum(1) for side in codec.sides]
    tags = encode_tags(blocks.saliency.mean(1))
    for n, block in enumerate(codec.encode(blocks)):
        for layer in range(layers):
            at = 8 * (4 * heads + int(words[0][layer]) + int(words[1][layer]))
            assert block[BASE][layer][at : at + 64] == tags[layer, n].numpy().tobytes()


@each_shape
def test_segments_have_the_sizes_that_their_masks_tell(
    layers: int, heads: int, dim: int, count: int, dtype: torch.dtype
) -> None:
    profile = make_profile(layers, heads, dim)
    codec = CalibratedCodec(profile, THRESHOLD)
    blocks = blocks_of(profile, count, dtype)
    flags = _masks(codec, blocks)
    for n, block in enumerate(codec.encode(blocks)):
        for layer in range(layers):
            base = 32 * heads + 64 + heads * dim // 2 + heads
            mid = 0
            for side, tables in enumerate(codec.sides):
                layout = tables.basis.layout
                mine = slice(layer * heads, (layer + 1) * heads)
                base += 8 * int(layout.widths[mine].sum())
                base += (2 + dim) * int(flags[n, layer, 0, side].sum())
                tokens = flags[n, layer, 1, side].sum(-1)
                mid += int((tokens * layout.mid_counts[mine] // 4).sum())
            assert (len(block[BASE][layer]), len(block[MID][layer])) == (base, mid)


def test_escapes_are_read_back_by_hand(codec: CalibratedCodec, profile: Profile) -> None:
    blocks = blocks_of(profile)
    layers, _, dim = profile.shape
    flags = _masks(codec, blocks)
    read = round_trip(codec, blocks)
    for n, block in enumerate(codec.encode(blocks)):
        for layer in range(layers):
            places = flags[n, layer, 0].nonzero().tolist()  # side, head, token ascending
            tail = bytearray(block[BASE][layer])[-len(places) * (2 + dim) :]
            scales = torch.frombuffer(tail[: 2 * len(places)], dtype=torch.bfloat16)
            codes = torch.frombuffer(tail[2 * len(places) :], dtype=torch.int8).view(-1, dim)
            rows = (codes.float() * scales.float()[:, None]) @ hadamard(dim)
            for row, (side, head, token) in zip(rows, places, strict=True):
                torch.testing.assert_close(read[side][layer, head, n, token], row)


def test_one_bit_of_a_plane_moves_one_token_along_one_component(
    codec: CalibratedCodec, profile: Profile
) -> None:
    blocks = blocks_of(profile, 1, outliers=0.0, first_position=64)
    (segments,) = codec.encode(blocks)
    widths = codec.sides[0].basis.layout.widths
    before = round_trip(codec, blocks)[0]
    flags = _masks(codec, blocks)[0, 0, :, 0, 0].any(0)
    token = int((~flags).nonzero()[0])  # a base token of layer 0, head 0
    changed = bytearray(segments[BASE][0])
    changed[8 * 4 * profile.shape[1] + token // 8] ^= 1 << token % 8  # plane 0, component 0
    base, mid = ([segments[s][i] for i in range(profile.shape[0])] for s in (BASE, MID))
    keys, values = codec.layout.read([[bytes(changed), *base[1:]]], [mid])
    after = codec.sides[0].decode(keys, torch.float32).view(before.shape)
    moved = (after - before).abs().amax(-1) > 1e-6
    assert moved.nonzero().tolist() == [[0, 0, 0, token]]
    step = (after - before)[0, 0, 0, token]
    row = profile.keys["pre"].basis[0, 0, 0].float()
    assert widths[0, 0] > 0
    assert torch.cosine_similarity(step, row, dim=0).abs() > 0.9999
    assert values.mid_rows is not None


@pytest.mark.parametrize("form", ["pre", "frame"])
def test_the_form_is_that_of_the_keys(profile: Profile, form: str) -> None:
    codec = CalibratedCodec(profile, THRESHOLD, form)
    rope = {"pre": RopeForm.ROPE_FORM_PRE, "frame": RopeForm.ROPE_FORM_FRAME}[form]
    assert codec.rope is rope
    blocks = blocks_of(profile, form=form)
    blocks.saliency.zero_()  # every token weighs one
    frames = open_all(seal_all(codec, blocks))
    assert {frame.header.rope for block in frames for frame in block.values()} == {rope}
    fitting = _costs(codec, round_trip(codec, blocks)[0], blocks.keys, 0).mean()
    assert fitting < _expected(codec, 0).mean()
    other = blocks_of(profile, form={"pre": "frame", "frame": "pre"}[form])
    other.saliency.zero_()
    assert _flags(codec, other, 0)[2].sum() > 5 * _flags(codec, blocks, 0)[2].sum()


def test_settings_name_all_that_changes_the_bytes(profile: Profile) -> None:
    codec = CalibratedCodec(profile, 0.0123, "frame")
    assert codec.settings() == f"profile={profile.profile_id},threshold=0.0123,form=frame"
    assert (codec.name, codec.version, codec.lossless) == ("calibrated", 1, False)
    assert codec.first_layer == profile.first_layer == 1
    assert CalibratedCodec(make_profile(first_layer=3), 0.1).first_layer == 3


def test_a_codec_travels_without_its_tables(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = CalibratedCodec(profile, THRESHOLD, "frame")
    blocks = blocks_of(profile, form="frame")
    before = codec.encode(blocks)
    sent = pickle.dumps(codec)
    assert len(sent) < 1000
    store = ProfileStore()
    monkeypatch.setattr(calibrated, "PROFILES", store)
    with pytest.raises(ProfileError, match=profile.profile_id):
        pickle.loads(sent)
    store.add(profile)
    restored = pickle.loads(sent)
    assert restored.settings() == codec.settings()
    assert restored.encode(blocks) == before


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_that_is_not_positive_is_refused(profile: Profile, threshold: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        CalibratedCodec(profile, threshold)


def test_a_form_that_the_profile_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no form 'frame'; use one of pre"):
        CalibratedCodec(make_profile(forms=("pre",)), 0.1, "frame")


@pytest.mark.parametrize("shape", [(1, 2, 32), (2, 1, 32), (2, 2, 64)])
def test_blocks_of_another_shape_are_refused_by_name(
    codec: CalibratedCodec, profile: Profile, shape: tuple[int, int, int]
) -> None:
    blocks = blocks_of(make_profile(*shape))
    with pytest.raises(ValueError, match=r"\(2, 2, 32\)") as refusal:
        codec.encode(blocks)
    assert str(shape) in str(refusal.value)
    frames = open_all(seal_all(codec, blocks_of(profile)))
    if shape[1:] != (2, 32):
        with pytest.raises(CorruptFrameError, match="another shape"):
            codec.decode(frames, BlockShape(shape[1], shape[2], torch.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("dim", [32, 12])
def test_what_is_no_number_is_refused(bad: float, part: str, dim: int) -> None:
    profile = make_profile(1, 2, dim)
    codec = CalibratedCodec(profile, THRESHOLD)
    for dtype in (torch.float32, torch.bfloat16):
        for token in (1, 70):  # a sink, and any
            blocks = blocks_of(profile, 2, dtype)
            getattr(blocks, part)[0, 1, token // 64, token % 64, 3] = bad
            with pytest.raises(ValueError, match=r"finite|NaN|infinite"):
                codec.encode(blocks)


@pytest.mark.parametrize("case", ["zero", "constant", "constant channel", "mean", "huge"])
def test_degenerate_values_come_back(codec: CalibratedCodec, profile: Profile, case: str) -> None:
    blocks = blocks_of(profile)
    blocks.saliency.zero_()  # every token weighs one
    for part, tables in ((blocks.keys, profile.keys["pre"]), (blocks.values, profile.values)):
        if case == "zero":
            part.zero_()
        elif case == "constant":
            part.fill_(7.5)
        elif case == "constant channel":
            part[..., 3] = -2.0
        elif case == "mean":
            part.copy_(tables.mean[:, :, None, None].expand(part.shape))
        else:
            part.mul_(1e4)
    _check_prices(codec, blocks, 0, ROUNDING[torch.float32])
    # The bias moves values by their mean error, so that one may lose up to twice the distance.
    _check_prices(codec, blocks, 1, 4 * ROUNDING[torch.float32])


def test_a_decoder_does_not_need_the_dtype_of_the_encoder(
    codec: CalibratedCodec, profile: Profile
) -> None:
    blocks = blocks_of(profile)
    frames = open_all(seal_all(codec, blocks))
    exact = codec.decode(frames, shape_of(blocks))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = codec.decode(frames, BlockShape(2, 32, dtype))
        for a, b in zip(rounded, exact, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.05)
