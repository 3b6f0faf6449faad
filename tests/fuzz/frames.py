"""Frames: damaged ones are found; forged ones, whose checksums hold, break nothing."""

import random
from typing import Any

import torch
import xxhash
from google.protobuf.message import DecodeError

from kvstrata.kvstore_service.commit_rule import BlockRejectedError, check_block
from kvstrata.kvstore_service.representative_index import Representative
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.methods import BlockCodec, ExactCodec, FallbackCodec, UnusableBlockError
from kvstrata.methods.framing import usable
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import PRELUDE_BYTES, Frame, head_size, under_scope
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.representatives import ATTACHMENT, pack_representatives
from tests.fuzz.campaign import Target
from tests.fuzz.mutation import mutate
from tests.methods.blocks import SCOPE, identities, random_blocks, seal_all, shape_of
from tests.protos.forging import forge

CODECS: list[BlockCodec] = [FallbackCodec(), ExactCodec()]
BLOCKS = random_blocks(2, 1, 8, 1, torch.bfloat16)
SHAPE = shape_of(BLOCKS)
(IDENTITY,) = identities(1)
SEALED = [(codec, s, f) for codec in CODECS for s, f in seal_all(codec, BLOCKS)[0].frames.items()]
SAMPLE_KEY, SAMPLE = sample_block(
    SCOPE,
    strata={1: 800, 2: 400},
    attachments={ATTACHMENT: pack_representatives({0: bytes(16), 3: bytes(16)})},
)
CORPUS = [f for _, _, f in SEALED] + list(SAMPLE.values())
KNOWN = set(CORPUS)


def damage(source: random.Random) -> bytes:
    return mutate(source.choice(CORPUS), source, CORPUS)


def check_damaged(data: bytes) -> str:
    """A frame that passes is one of those that were written, byte for byte."""
    try:
        frame = Frame.open(data)
        frame.verify()
    except CorruptFrameError:
        _open_parts(data)
        return "refused"
    assert data in KNOWN, "a changed frame passed"
    return "unchanged"


def _open_parts(data: bytes) -> None:
    """A reader that got some layers sees the head alone, and trusts no segment without its sum."""
    try:
        frame = Frame.open_parts(data[: head_size(data)], 0, data[:-1])
    except CorruptFrameError:
        return
    for entry in frame.header.segments:
        try:
            frame.segment(entry.layer)
        except (CorruptFrameError, KeyError):
            continue


def forge_one(source: random.Random) -> bytes:
    """Return a frame whose header or segments were changed, every checksum made to hold."""
    data = source.choice(CORPUS)
    header, body = data[PRELUDE_BYTES : head_size(data)], data[head_size(data) :]
    if source.random() < 0.5:
        header = mutate(header, source, [header])
    if source.random() < 0.5:
        body = mutate(body, source, CORPUS)
    try:
        told = FrameHeader.FromString(header)
    except DecodeError:
        return forge(header, body)
    whole = forge(told, body)
    for entry in (*told.segments, *told.attachments):
        if source.random() < 0.9:
            part = whole[entry.offset : entry.offset + entry.length]
            entry.checksum = xxhash.xxh3_64_intdigest(part)
    return forge(told, body)


def check_forged(data: bytes) -> str:
    """Whoever opens a frame that some writer made up gets an error of the tree, or an answer."""
    try:
        frame = Frame.open(data)
        frame.verify()
    except CorruptFrameError:
        return "refused"
    assert Representative.of(data).values.nbytes <= len(data)
    try:
        moved = under_scope(data, frame.header.scope, b"x" * 16)
        assert under_scope(moved, b"x" * 16, frame.header.scope) == data
    except CorruptFrameError:
        pass  # a header that is not as we write it
    outcome = "opened"
    try:
        check_block(SAMPLE_KEY, {int(frame.header.stratum): data})
        outcome = "committed"
    except BlockRejectedError:
        pass
    for codec in CODECS:
        if frame.header.codec == codec.name:
            outcome = _decode(codec, frame) or outcome
    return outcome


def _decode(codec: BlockCodec, frame: Frame) -> str:
    strata: Any = {frame.header.stratum: frame}
    try:
        chosen = usable(strata, IDENTITY, codec, num_layers=len(BLOCKS.keys) - codec.first_layer)
        keys, values = codec.decode([chosen], SHAPE)
    except (UnusableBlockError, CorruptFrameError):
        return ""
    assert keys.shape == values.shape
    assert keys.shape[1:] == (1, 1, 64, 8)
    return "decoded"


TARGETS = [
    Target("frames", 400, damage, check_damaged, wanted=["refused"]),
    Target("forged", 150, forge_one, check_forged, wanted=["refused", "opened", "decoded"]),
]
