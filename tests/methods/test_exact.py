"""The exact codec: every bit comes back, and nothing else is accepted."""

import struct
import tracemalloc

import pytest
import torch
import zstandard

from kvstrata.methods import BlockShape, ExactCodec, KVBlocks
from kvstrata.methods.saliency_tag import decode_tags
from kvstrata.protos import BLOCK_TOKENS, Frame, encode_frame
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame_pb2 import FrameHeader
from tests.methods.blocks import (
    EXACT,
    bits,
    identities,
    open_all,
    random_blocks,
    round_trip,
    seal_all,
    shape_of,
)

CODEC = ExactCodec()
SPECIALS = {
    # quiet and signalling NaNs with payloads of both signs, infinities, -0.0, subnormals, extremes
    torch.float32: [0x7FC00001, 0x7F800001, -1, -0x7FFFFF, 0x7F800000, -0x800000, -(2**31), 1,
                    0x007FFFFF, -(2**31) + 1, 0x7F7FFFFF],
    torch.bfloat16: [0x7FC1, 0x7F81, -1, -0x7F, 0x7F80, -0x80, -(2**15), 1, 0x007F, -(2**15) + 1,
                     0x7F7F],
    torch.float16: [0x7E01, 0x7C01, -1, -0x3FF, 0x7C00, -0x400, -(2**15), 1, 0x03FF, -(2**15) + 1,
                    0x7BFF],
}  # fmt: skip
INTEGERS = {2: torch.int16, 4: torch.int32}

SHAPES = [
    # layers, heads, head_dim, blocks, dtype
    (2, 1, 32, 1, torch.float32),
    (3, 2, 64, 3, torch.bfloat16),
    (2, 3, 80, 1, torch.float16),
    (4, 1, 128, 1, torch.bfloat16),
    (2, 3, 64, 3, torch.float16),
    (2, 2, 80, 1, torch.float32),
]


def _assert_same(blocks: KVBlocks, read: tuple[torch.Tensor, torch.Tensor]) -> None:
    for got, put in zip(read, (blocks.keys, blocks.values), strict=True):
        assert (got.shape, got.dtype) == (put.shape, put.dtype)
        assert torch.equal(bits(got), bits(put))


@pytest.mark.parametrize(("layers", "heads", "dim", "count", "dtype"), SHAPES, ids=str)
def test_blocks_come_back_bit_for_bit(
    layers: int, heads: int, dim: int, count: int, dtype: torch.dtype
) -> None:
    blocks = random_blocks(layers, heads, dim, count, dtype)
    _assert_same(blocks, round_trip(CODEC, blocks))


@pytest.mark.parametrize("dtype", SPECIALS, ids=str)
def test_nans_with_payloads_infinities_and_subnormals_come_back(dtype: torch.dtype) -> None:
    blocks = random_blocks(2, 2, 32, 1, dtype)
    for tensor in (blocks.keys, blocks.values):
        raw = tensor.view(INTEGERS[dtype.itemsize]).view(-1)
        raw[: len(SPECIALS[dtype])] = torch.tensor(SPECIALS[dtype])
        raw[-len(SPECIALS[dtype]) :] = torch.tensor(SPECIALS[dtype])
    assert blocks.keys.isnan().sum() == 8
    _assert_same(blocks, round_trip(CODEC, blocks))


@pytest.mark.parametrize("dtype", SPECIALS, ids=str)
def test_random_bits_and_constants_come_back(dtype: torch.dtype) -> None:
    shape = (2, 1, 1, BLOCK_TOKENS, 32 * dtype.itemsize)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)
    for values in (noise, torch.zeros_like(noise), torch.full_like(noise, -0.0)):
        blocks = KVBlocks(noise, values, torch.zeros(2, 1, 1, BLOCK_TOKENS), 0)
        _assert_same(blocks, round_trip(CODEC, blocks))


def test_strided_blocks_come_back() -> None:
    whole = random_blocks(2, 2, 64, 3, torch.bfloat16)
    blocks = KVBlocks(
        whole.keys[..., ::2], whole.values.flip(0)[..., 32:], whole.saliency, whole.first_position
    )
    _assert_same(blocks, round_trip(CODEC, blocks))


def test_the_same_blocks_give_the_same_bytes_alone_and_together() -> None:
    blocks = random_blocks(2, 2, 64, 3, torch.bfloat16)
    together = CODEC.encode(blocks)
    assert CODEC.encode(blocks) == together
    for n in range(3):
        one = KVBlocks(
            blocks.keys[:, :, n : n + 1],
            blocks.values[:, :, n : n + 1],
            blocks.saliency[:, :, n : n + 1],
            64 * n,
        )
        assert CODEC.encode(one) == [together[n]]


def test_blocks_decode_in_any_company() -> None:
    blocks = random_blocks(2, 1, 32, 3, torch.float16)
    frames = open_all(seal_all(CODEC, blocks))
    keys, _ = CODEC.decode([frames[2], frames[0]], shape_of(blocks))
    assert torch.equal(keys, blocks.keys[:, :, [2, 0]])


def test_compressible_planes_are_smaller_and_noise_costs_only_its_framing() -> None:
    quiet = random_blocks(1, 2, 64, 1, torch.float32)
    raw_bytes = 2 * quiet.keys.nbytes
    coarse = KVBlocks(quiet.keys.bfloat16().float(), quiet.values, quiet.saliency, 0)
    assert len(CODEC.encode(coarse)[0][EXACT][0]) < 0.9 * raw_bytes
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(0, 256, (1, 2, 1, 64, 256), dtype=torch.uint8, generator=generator)
    noisy = KVBlocks(noise.view(torch.float32), noise.view(torch.float32), quiet.saliency, 0)
    assert len(CODEC.encode(noisy)[0][EXACT][0]) == BLOCK_TOKENS + 4 * 5 + raw_bytes


def test_every_segment_begins_with_the_saliency_of_its_tokens() -> None:
    blocks = random_blocks(2, 1, 32, 2)
    for n, strata in enumerate(CODEC.encode(blocks)):
        for layer, segment in strata[EXACT].items():
            tags = torch.frombuffer(bytearray(segment[:BLOCK_TOKENS]), dtype=torch.uint8)
            ratio = decode_tags(tags) / blocks.saliency[layer, :, n].mean(0)
            assert (ratio.log2().abs() <= 1 / 16 + 1e-4).all()


def test_it_has_no_settings_and_stores_every_layer_as_attention_reads_it() -> None:
    assert (CODEC.settings(), CODEC.first_layer, CODEC.lossless) == ("", 0, True)
    assert CODEC.strata == (EXACT,)


# --- hostile segments: the frame's checksums hold, the codec's bytes do not ---

SHAPE = BlockShape(1, 8, torch.bfloat16)
PLANE_BYTES = 2 * 64 * 8
TAGS = bytes(BLOCK_TOKENS)
RAW_PLANE = struct.pack("<BI", 0, PLANE_BYTES) + bytes(PLANE_BYTES)
BOMB_BYTES = 16 << 20


def _plane(data: bytes, flag: int = 1) -> bytes:
    return struct.pack("<BI", flag, len(data)) + data


def _decode(*segments: bytes, num_layers: int | None = None) -> torch.Tensor:
    identity = identities(1)[0]
    header = FrameHeader(
        scope=identity.scope,
        block_hash=identity.block_hash,
        stratum=EXACT,
        codec="exact",
        codec_version=1,
        num_layers=len(segments) if num_layers is None else num_layers,
    )
    frame = Frame.open(encode_frame(header, dict(enumerate(segments))))
    return CODEC.decode([{EXACT: frame}], SHAPE)[0]


def _bombs() -> dict[str, bytes]:
    zeros = bytes(BOMB_BYTES)
    told = zstandard.ZstdCompressor(level=1).compress(zeros)
    untold = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(zeros)
    assert zstandard.frame_content_size(told) == BOMB_BYTES
    at = told.index(struct.pack("<I", BOMB_BYTES))
    lying = told[:at] + struct.pack("<I", PLANE_BYTES) + told[at + 4 :]
    assert zstandard.frame_content_size(lying) == PLANE_BYTES
    return {"told": told, "untold": untold, "lying": lying}


BOMBS = _bombs()
GOOD = zstandard.compress(bytes(PLANE_BYTES))


def test_planes_put_together_by_hand_are_read() -> None:
    assert (_decode(TAGS + RAW_PLANE + _plane(GOOD)) == 0).all()


@pytest.mark.parametrize(
    "segment",
    [
        b"",
        TAGS[:-1],
        TAGS,
        TAGS + RAW_PLANE,
        TAGS + RAW_PLANE + RAW_PLANE[:4],
        TAGS + RAW_PLANE + RAW_PLANE[:-1],
        TAGS + RAW_PLANE + RAW_PLANE + b"\x00",
        TAGS + RAW_PLANE * 3,
        TAGS + RAW_PLANE + _plane(bytes(PLANE_BYTES), flag=2),
        TAGS + RAW_PLANE + _plane(bytes(PLANE_BYTES), flag=255),
        TAGS + RAW_PLANE + _plane(bytes(PLANE_BYTES), flag=1),
        TAGS + RAW_PLANE + _plane(b"", flag=1),
        TAGS + RAW_PLANE + _plane(b"", flag=0),
        TAGS + RAW_PLANE + _plane(bytes(PLANE_BYTES - 1), flag=0),
        TAGS + RAW_PLANE + _plane(GOOD, flag=0),
        TAGS + RAW_PLANE + _plane(GOOD[:-1]),
        TAGS + RAW_PLANE + _plane(GOOD[:5]),
        TAGS + RAW_PLANE + _plane(zstandard.compress(bytes(PLANE_BYTES - 1))),
        TAGS + RAW_PLANE + struct.pack("<BI", 0, 2**32 - 1) + bytes(PLANE_BYTES),
        TAGS + RAW_PLANE + _plane(BOMBS["told"]),
        TAGS + RAW_PLANE + _plane(BOMBS["untold"]),
        TAGS + RAW_PLANE + _plane(BOMBS["lying"]),
    ],
    ids=[
        "empty", "short-tags", "no-planes", "one-plane", "cut-in-prefix", "cut-in-plane",
        "one-byte-more", "one-plane-more", "flag-2", "flag-255", "raw-as-zstd", "empty-zstd",
        "empty-raw", "short-raw", "zstd-as-raw", "cut-zstd", "zstd-header-only", "short-zstd",
        "huge-size", "bomb", "bomb-of-unknown-size", "bomb-that-lies",
    ],
)  # fmt: skip
def test_a_hostile_segment_is_corrupt_and_allocates_little(segment: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CorruptFrameError):
            _decode(segment)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("num_layers", [0, 1, 3, 2**32 - 1])
def test_a_frame_with_other_layers_than_it_tells_is_corrupt(num_layers: int) -> None:
    segment = TAGS + RAW_PLANE * 2
    with pytest.raises(CorruptFrameError, match="layers"):
        _decode(segment, segment, num_layers=num_layers)


def test_a_frame_of_which_only_some_layers_came_is_corrupt() -> None:
    blocks = random_blocks(3, 1, 8, 1, torch.bfloat16)
    data = seal_all(CODEC, blocks)[0].frames[EXACT]
    whole = Frame.open(data)
    begin, end = whole.layer_run(0, 2)
    part = Frame.open_parts(data[: whole.head_bytes], begin, data[begin:end])
    with pytest.raises(CorruptFrameError, match="layers"):
        CODEC.decode([{EXACT: part}], SHAPE)


@pytest.mark.parametrize(
    "shape",
    [
        BlockShape(2, 8, torch.bfloat16),
        BlockShape(1, 16, torch.bfloat16),
        BlockShape(1, 8, torch.float32),
    ],
    ids=["heads", "head_dim", "dtype"],
)
def test_blocks_of_another_shape_are_corrupt(shape: BlockShape) -> None:
    frames = open_all(seal_all(CODEC, random_blocks(1, 1, 8, 1, torch.bfloat16)))
    with pytest.raises(CorruptFrameError):
        CODEC.decode(frames, shape)
