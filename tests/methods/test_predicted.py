"""The predicted codec: fewer bytes for the same error, one loop at both ends, and bad input."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvstrata.kernels.token_masks import to_flags
from kvstrata.methods import BlockShape, KVBlocks, predicted
from kvstrata.methods.calibrated import SINK_TOKENS, CalibratedCodec
from kvstrata.methods.codec import SelectiveCodec
from kvstrata.methods.framing import UnusableBlockError, usable
from kvstrata.methods.predicted import PredictedCodec, predicted_codec
from kvstrata.methods.profile import PROFILES, ProfileError, ProfileStore
from kvstrata.protos import Frame
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame_pb2 import RopeForm, Stratum
from tests.methods.blocks import BASE, MID, identities, open_all, round_trip, seal_all, shape_of
from tests.methods.predictions import kin_of, predicting_profile
from tests.methods.profiles import blocks_of, make_profile

THRESHOLD = 0.05
SHAPES = [
    # stored layers, heads, head_dim, blocks, dtype
    (1, 1, 32, 1, torch.float32),
    (3, 2, 64, 3, torch.bfloat16),
    (2, 3, 64, 2, torch.float16),
    (2, 1, 80, 2, torch.float32),
    (3, 2, 12, 1, torch.float32),
]
each_shape = pytest.mark.parametrize(("layers", "heads", "dim", "count", "dtype"), SHAPES, ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _blocks(codec: PredictedCodec, count: int = 2, dtype=torch.float32, **options) -> KVBlocks:
    return kin_of(blocks_of(codec.profile, count, dtype, **options))


def _codec(layers: int = 3, heads: int = 2, dim: int = 32) -> PredictedCodec:
    return predicted_codec(predicting_profile(layers, heads, dim), THRESHOLD)


def _cost(codec: CalibratedCodec, blocks: KVBlocks, read: tuple[torch.Tensor, ...]) -> float:
    """Return what the errors of a reading cost, summed over all layers, by the plain transforms."""
    plain = CalibratedCodec(codec.profile, codec.threshold).sides
    total = 0.0
    for side, put, got in zip(plain, (blocks.keys, blocks.values), read, strict=True):
        error = (got.double() - put.double()).flatten(0, 1).flatten(1, 2)
        y = error @ side.basis.forward.double()
        total += float((y.square() * side.variance.double()[:, None]).sum())
    return total


def _size(codec: CalibratedCodec, blocks: KVBlocks) -> int:
    return sum(block.num_bytes for block in seal_all(codec, blocks))


@each_shape
def test_blocks_come_back_and_mid_refines_base(
    layers: int, heads: int, dim: int, count: int, dtype: torch.dtype
) -> None:
    codec = _codec(layers, heads, dim)
    blocks = _blocks(codec, count, dtype, first_position=64)
    fine, coarse = round_trip(codec, blocks), round_trip(codec, blocks, [BASE])
    for put, both, base in zip((blocks.keys, blocks.values), fine, coarse, strict=True):
        assert both.shape == base.shape == put.shape
        assert both.dtype == base.dtype == dtype
        assert both.isfinite().all()
        assert base.isfinite().all()
    plain = CalibratedCodec(codec.profile, THRESHOLD)
    costs = [_cost(codec, blocks, read) for read in (fine, coarse)]
    assert costs[0] < costs[1]
    assert costs[0] < 1.5 * _cost(codec, blocks, round_trip(plain, blocks))


def test_what_can_be_predicted_takes_fewer_bytes_at_no_larger_error() -> None:
    codec = _codec(3, 2, 64)
    blocks = _blocks(codec, 4, first_position=64, outliers=0.0)
    plain = CalibratedCodec(codec.profile, THRESHOLD)
    assert _size(codec, blocks) < 0.8 * _size(plain, blocks)
    errors = [_cost(codec, blocks, round_trip(c, blocks)) for c in (codec, plain)]
    assert errors[0] < 1.2 * errors[1]


def test_a_reader_of_base_gets_what_the_encoder_predicted_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ends of the loop see the same vectors to the last bit, in a batch and one by one."""
    codec = _codec(30, 2, 32)
    blocks = _blocks(codec, 5)
    written: list[torch.Tensor] = []
    encode_head = predicted._encode_head

    def noted(*args: Any, **options: Any) -> Any:
        made = encode_head(*args, **options)
        written.append(made.read)
        return made

    monkeypatch.setattr(predicted, "_encode_head", noted)
    sealed = seal_all(codec, blocks)
    assert len(written) == 30 * 4
    keys, values = codec.decode(open_all(sealed, [BASE]), shape_of(blocks))
    of_layer = torch.cat([values, keys], 1).flatten(0, 1)
    assert torch.equal(torch.cat(written), of_layer)
    singly = [codec.decode(open_all([block], [BASE]), shape_of(blocks)) for block in sealed]
    for whole, parts in ((keys, [k for k, _ in singly]), (values, [v for _, v in singly])):
        assert torch.equal(torch.cat(parts, 2), whole)


def test_threads_change_no_byte_and_no_number() -> None:
    codec = _codec(4, 3, 64)
    blocks = _blocks(codec, 6)
    sealed = seal_all(codec, blocks)
    read = codec.decode(open_all(sealed), shape_of(blocks))
    torch.set_num_threads(2)
    again = codec.decode(open_all(sealed), shape_of(blocks))
    for one, two in zip(read, again, strict=True):
        assert torch.equal(one, two)
    assert [b.frames for b in seal_all(codec, blocks)] == [b.frames for b in sealed]


def test_equal_input_gives_equal_bytes() -> None:
    profile = predicting_profile(2, 2, 32)
    blocks = kin_of(blocks_of(profile, 2))
    first, second = (PredictedCodec(profile, THRESHOLD).encode(blocks) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("strata", [[BASE], [BASE, MID]], ids=["base", "base and mid"])
def test_decoding_is_what_the_formula_says(strata: list[Stratum]) -> None:
    """The readable reference, token by token and in float64, from what the segments hold."""
    codec = _codec(3, 2, 32)
    layers, heads, dim = codec.profile.shape
    frames = open_all(seal_all(codec, _blocks(codec, 2, outliers=0.1)), strata)
    read = codec.decode(frames, BlockShape(heads, dim, torch.float32))
    stored = codec.layout.read(
        [codec.segments_of(f[BASE]) for f in frames],
        [codec.segments_of(f[MID]) for f in frames] if MID in strata else None,
    )
    fine, base = (
        [
            side.decode(part if with_mid else replace(part, mid_rows=None), torch.float32)
            for side, part in zip(codec.sides, stored, strict=True)
        ]
        for with_mid in (True, False)
    )
    escaped = [to_flags(part.escape & ~part.mid) for part in stored]
    assert any(flags.any() for flags in escaped)
    tables = codec.profile.prediction
    assert tables is not None
    across, within = tables.across.double(), tables.within.double()
    for n in range(2):
        for t in range(0, 64, 7):
            before = torch.zeros(2 * heads * dim, dtype=torch.float64)
            for layer in range(layers):
                own = torch.zeros_like(before)
                for part in range(2 * heads):
                    side, head = int(part < heads), layer * heads + part % heads
                    columns = slice(part * dim, (part + 1) * dim)
                    p = before @ across[layer, :, columns] + own @ within[layer, :, columns]
                    p = torch.zeros_like(p) if escaped[side][head, n, t] else p
                    own[columns] = base[side][head, n, t] + p
                    wanted = (fine[side][head, n, t] + p).float()
                    got = read[side].flatten(0, 1)[head, n, t]
                    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
                before = own


def test_sinks_are_escapes_which_no_prediction_touches() -> None:
    codec = _codec(3, 2, 32)
    blocks = _blocks(codec, 2)
    wild = blocks.keys.clone()
    wild[:, :, 0, :SINK_TOKENS] *= 40
    blocks = replace(blocks, keys=wild)
    keys, _ = round_trip(codec, blocks, [BASE])
    error = (keys - wild)[:, :, 0, :SINK_TOKENS].norm(dim=-1)
    peak = wild[:, :, 0, :SINK_TOKENS].norm(dim=-1)
    assert (error < 0.02 * peak).all()
    plain, _ = round_trip(CalibratedCodec(codec.profile, THRESHOLD), blocks, [BASE])
    assert torch.equal(keys[:, :, 0, :SINK_TOKENS], plain[:, :, 0, :SINK_TOKENS])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_tokens_that_are_left_out_are_told_and_harm_no_other(share: float) -> None:
    codec = _codec(3, 2, 32)
    assert isinstance(codec, SelectiveCodec)
    blocks = _blocks(codec, 2, first_position=64)
    kept = torch.rand(blocks.saliency.shape, generator=torch.Generator().manual_seed(1)) < share
    kept[0, 0, 0] = False
    given = replace(blocks, kept=kept)
    sealed = seal_all(codec, given)
    frames = open_all(sealed)
    assert torch.equal(codec.kept(frames, shape_of(blocks)), kept)
    read = codec.decode(frames, shape_of(blocks))
    for put, got in zip((blocks.keys, blocks.values), read, strict=True):
        assert got.isfinite().all()
        spread = put.flatten(2, 3).std(2).square().mean()
        assert (got - put)[kept].square().mean() < 0.3 * spread
    wild = replace(given, keys=blocks.keys.masked_fill(~kept[..., None], 1e3))
    assert [b.frames for b in seal_all(codec, wild)] == [b.frames for b in sealed]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_what_is_not_finite_is_refused(side: str, bad: float) -> None:
    codec = _codec()
    blocks = _blocks(codec)
    getattr(blocks, side)[1, 1, 1, 5, 3] = bad
    with pytest.raises(ValueError, match="NaN"):
        codec.encode(blocks)


def test_blocks_of_another_shape_and_none_at_all() -> None:
    codec = _codec()
    with pytest.raises(ValueError, match="profile"):
        codec.encode(blocks_of(make_profile(2, 2, 32)))
    blocks = _blocks(codec)
    none = replace(
        blocks,
        keys=blocks.keys[:, :, :0],
        values=blocks.values[:, :, :0],
        saliency=blocks.saliency[:, :, :0],
    )
    assert codec.encode(none) == []
    with pytest.raises(CorruptFrameError):
        codec.decode(open_all(seal_all(codec, blocks)), BlockShape(3, 32, torch.float32))


def test_every_flipped_or_cut_segment_is_refused() -> None:
    codec = _codec(2, 2, 32)
    sealed = seal_all(codec, _blocks(codec, 1))
    shape = BlockShape(2, 32, torch.float32)
    for stratum in (BASE, MID):
        whole = sealed[0].frames[stratum]
        for at in range(len(whole) // 2, len(whole), 97):
            damaged = bytearray(whole)
            damaged[at] ^= 1
            frames = {s: Frame.open(f) for s, f in sealed[0].frames.items()}
            try:
                frames[stratum] = Frame.open(bytes(damaged))
                read = codec.decode([frames], shape)
            except CorruptFrameError:
                continue
            assert all(  # padding between segments
                torch.equal(a, b)
                for a, b in zip(read, codec.decode(open_all(sealed), shape), strict=True)
            )


def test_frames_of_one_codec_are_no_use_to_the_other() -> None:
    codec = _codec(2, 2, 32)
    plain = CalibratedCodec(codec.profile, THRESHOLD)
    blocks = _blocks(codec, 1)
    for writer, reader in ((codec, plain), (plain, codec)):
        (frames,) = open_all(seal_all(writer, blocks))
        with pytest.raises(UnusableBlockError, match="other_codec"):
            usable(frames, identities(1)[0], reader, num_layers=2)


def test_settings_name_the_whole_profile_and_the_plain_codec_only_its_transforms() -> None:
    profile = predicting_profile(2, 2, 32)
    codec = PredictedCodec(profile, 0.0123)
    assert codec.settings() == f"profile={profile.profile_id},threshold=0.0123"
    without = replace(profile, prediction=None)
    assert without.profile_id == profile.transform_id == without.transform_id
    assert profile.profile_id != profile.transform_id
    plain = [CalibratedCodec(p, 0.0123).settings() for p in (profile, without)]
    assert plain[0] == plain[1]
    assert codec.rope is RopeForm.ROPE_FORM_PRE


def test_a_codec_travels_without_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = predicting_profile(2, 2, 32)
    store = ProfileStore()
    monkeypatch.setattr("kvstrata.methods.predicted.PROFILES", store)
    data = pickle.dumps(PredictedCodec(profile, 0.1))
    assert len(data) < 300
    with pytest.raises(ProfileError, match=profile.profile_id):
        pickle.loads(data)
    store.add(profile)
    again = pickle.loads(data)
    assert (again.profile, again.threshold) == (profile, 0.1)
    assert PROFILES is not store


def test_a_profile_that_cannot_predict_and_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match="calibrate"):
        PredictedCodec(make_profile(), 0.1)
    with pytest.raises(ValueError, match="frame"):
        PredictedCodec(predicting_profile(2, 2, 32), 0.1, "frame")
