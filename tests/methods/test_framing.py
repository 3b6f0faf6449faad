"""Which frames may be decoded: only those of the very block, and of one writing."""

import dataclasses

import pytest
import torch

from kvstrata.methods import (
    BlockCodec,
    BlockIdentity,
    ExactCodec,
    FallbackCodec,
    SealedBlock,
    UnusableBlockError,
)
from kvstrata.methods.framing import usable
from kvstrata.protos import Frame, encode_frame
from kvstrata.protos.frame import encoding_id
from kvstrata.protos.frame_pb2 import RopeForm, Stratum
from kvstrata.protos.identity import BlockHash, ScopeDigest
from tests.methods.blocks import BASE, MID, identities, open_all, random_blocks, seal_all

Frames = dict[Stratum, Frame]
CODEC = FallbackCodec()
FINE = Stratum.STRATUM_FINE


def _sealed(codec: BlockCodec = CODEC, *, seed: int = 0, layers: int = 2) -> SealedBlock:
    return seal_all(codec, random_blocks(layers, 1, 32, 1, torch.bfloat16, seed=seed))[0]


def _opened(codec: BlockCodec = CODEC, *, seed: int = 0, layers: int = 2) -> Frames:
    return open_all([_sealed(codec, seed=seed, layers=layers)])[0]


def _changed(frame: Frame, **fields: object) -> Frame:
    """Return the frame written again with other header fields."""
    header = type(frame.header)()
    header.CopyFrom(frame.header)
    for name, value in fields.items():
        if name == "token_ids":
            del header.token_ids[:]
            header.token_ids.extend(value)  # type: ignore[arg-type]
        else:
            setattr(header, name, value)
    return Frame.open(encode_frame(header, frame.segments()))


def _reason(
    frames: Frames,
    identity: BlockIdentity | None = None,
    codec: BlockCodec = CODEC,
    num_layers: int = 2,
    finest: Stratum | None = None,
) -> str:
    with pytest.raises(UnusableBlockError) as refusal:
        usable(frames, identity or identities(1)[0], codec, num_layers=num_layers, finest=finest)
    assert str(refusal.value) == refusal.value.reason
    return refusal.value.reason


def test_a_sealed_block_says_who_it_is() -> None:
    sealed = _sealed()
    identity = identities(1)[0]
    assert sealed.identity == identity
    assert sealed.identity.key.encode() == f"{identity.scope.hex()}.{identity.block_hash.hex()}"
    assert sealed.num_bytes == sum(len(frame) for frame in sealed.frames.values())
    frames = open_all([sealed])[0]
    assert list(frames) == [BASE, MID]
    for stratum, frame in frames.items():
        header = frame.header
        assert header.stratum == stratum
        assert (header.scope, header.block_hash) == (identity.scope, identity.block_hash)
        assert header.parent_hash == identity.parent_hash == identity.scope
        assert tuple(header.token_ids) == identity.token_ids
        assert (header.codec, header.codec_version) == ("fallback", CODEC.version)
        assert (header.kv_dtype, header.rope) == ("bfloat16", RopeForm.ROPE_FORM_PRE)
        assert (header.num_layers, header.num_kv_heads, header.head_dim) == (2, 1, 32)
        assert header.first_position == 0
        assert [s.layer for s in header.segments] == [1, 2]  # layer 0 is never stored
    assert frames[BASE].header.encoding_id == frames[MID].header.encoding_id
    second = seal_all(CODEC, random_blocks(2, 1, 32, 2))[1].identity
    assert (second.first_position, second.parent_hash) == (64, identity.block_hash)


def test_one_writing_has_one_encoding_id_which_is_that_of_its_bytes_and_settings() -> None:
    frames = _opened()
    written: dict[int, list[memoryview]] = {
        stratum: list(frame.segments().values()) for stratum, frame in frames.items()
    }
    told = frames[BASE].header.encoding_id
    assert told == encoding_id(f"fallback/{CODEC.version}/sink_tokens=4", written)
    assert _opened()[BASE].header.encoding_id == told
    assert _opened(seed=1)[BASE].header.encoding_id != told
    assert _opened(FallbackCodec(5))[BASE].header.encoding_id != told
    # Nothing but the values differs here, and only in what MID holds.
    assert encoding_id(f"fallback/{CODEC.version}/sink_tokens=3", written) != told


def test_complete_frames_are_used_as_they_are() -> None:
    frames = _opened()
    chosen = usable(frames, identities(1)[0], CODEC, num_layers=2)
    assert list(chosen) == [BASE, MID]
    assert all(chosen[s] is frames[s] for s in chosen)
    exact = _opened(ExactCodec())
    assert usable(exact, identities(1)[0], ExactCodec(), num_layers=2) == exact


def test_nothing_or_only_a_refinement_is_absent() -> None:
    assert _reason({}) == "absent"
    assert _reason({MID: _opened()[MID]}) == "absent"


@pytest.mark.parametrize("finest", [Stratum.STRATUM_UNSPECIFIED, BASE])
def test_exact_alone_is_absent_for_a_reader_of_coarser_strata(finest: Stratum) -> None:
    assert _reason(_opened(ExactCodec()), codec=ExactCodec(), finest=finest) == "absent"


@pytest.mark.parametrize(
    "other",
    [
        {"block_hash": BlockHash(b"h" * 16)},
        {"scope": ScopeDigest(b"s" * 16)},
        {"first_position": 64},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_frames_of_another_block_are_foreign(other: dict[str, object]) -> None:
    identity = identities(1)[0]
    assert _reason(_opened(), dataclasses.replace(identity, **other)) == "foreign"  # type: ignore[arg-type]
    frames = _opened()
    moved = {stratum: _changed(frame, **other) for stratum, frame in frames.items()}
    assert _reason(moved) == "foreign"


@pytest.mark.parametrize("change", ["last", "shorter", "longer", "order"])
def test_equal_hashes_of_other_tokens_are_not_trusted(change: str) -> None:
    identity = identities(1)[0]
    tokens = list(identity.token_ids)
    other = {
        "last": [*tokens[:-1], tokens[-1] + 1],
        "shorter": tokens[:-1],
        "longer": [*tokens, 0],
        "order": [tokens[1], tokens[0], *tokens[2:]],
    }[change]
    wanted = dataclasses.replace(identity, token_ids=tuple(other))
    assert _reason(_opened(), wanted) == "token_mismatch"
    frames = {s: _changed(frame, token_ids=other) for s, frame in _opened().items()}
    assert _reason(frames) == "token_mismatch"


def test_another_codec_or_version_is_told() -> None:
    assert _reason(_opened(), codec=ExactCodec()) == "other_codec"
    assert _reason(_opened(ExactCodec()), codec=CODEC) == "other_codec"
    frames = {s: _changed(frame, codec_version=CODEC.version + 1) for s, frame in _opened().items()}
    assert _reason(frames) == "other_codec"


def test_a_block_that_lacks_layers_is_incomplete() -> None:
    frames = _opened()
    for num_layers in (1, 3):
        assert _reason(frames, num_layers=num_layers) == "incomplete"
    told = {s: _changed(frame, num_layers=3) for s, frame in frames.items()}
    for num_layers in (2, 3):
        assert _reason(told, num_layers=num_layers) == "incomplete"


@pytest.mark.parametrize("layers", [(0, 1), (1, 3), (5, 6)])
def test_a_block_of_other_layers_is_incomplete(layers: tuple[int, int]) -> None:
    frames = _opened()
    renamed = {
        s: Frame.open(
            encode_frame(frame.header, dict(zip(layers, frame.segments().values(), strict=True)))
        )
        for s, frame in frames.items()
    }
    assert _reason(renamed) == "incomplete"


def test_a_refinement_of_another_writing_is_ignored() -> None:
    frames, later = _opened(), _opened(seed=1)
    mixed = {BASE: frames[BASE], MID: later[MID]}
    assert list(usable(mixed, identities(1)[0], CODEC, num_layers=2)) == [BASE]


@pytest.mark.parametrize(
    "wrong", [{"block_hash": b"h" * 16}, {"stratum": BASE}], ids=["block", "stratum"]
)
def test_a_refinement_that_is_not_this_blocks_is_ignored(wrong: dict[str, object]) -> None:
    frames = _opened()
    frames[MID] = _changed(frames[MID], **wrong)
    assert list(usable(frames, identities(1)[0], CODEC, num_layers=2)) == [BASE]


def test_base_under_a_wrong_name_is_absent() -> None:
    frames = _opened()
    assert _reason({BASE: frames[MID]}) == "absent"


@pytest.mark.parametrize(
    ("finest", "chosen"),
    [(BASE, [BASE]), (MID, [BASE, MID]), (FINE, [BASE, MID]), (None, [BASE, MID])],
)
def test_strata_finer_than_wanted_are_left_out(
    finest: Stratum | None, chosen: list[Stratum]
) -> None:
    read = usable(_opened(), identities(1)[0], CODEC, num_layers=2, finest=finest)
    assert list(read) == chosen
