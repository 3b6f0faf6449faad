"""Frames that were written once and must be read for ever. See golden/README.md."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from google.protobuf.json_format import MessageToDict

from kvstrata.kernels.hadamard import hadamard
from kvstrata.kernels.quantize import (
    LEVELS_PER_SIGMA,
    THRESHOLDS,
    decode_scales,
    quantize_channels,
    quantize_gaussian,
)
from kvstrata.methods import BlockCodec, BlockShape, ExactCodec, FallbackCodec, KVBlocks
from kvstrata.protos import BLOCK_TOKENS, Frame, encode_frame
from kvstrata.protos.frame_pb2 import Stratum
from tests.methods.blocks import BASE, EXACT, MID, bits, seal_all

GOLDEN = Path(__file__).parent / "golden"
CODECS: dict[Stratum, BlockCodec] = {
    BASE: FallbackCodec(),
    MID: FallbackCodec(),
    EXACT: ExactCodec(),
}
NAMES = {BASE: "base", MID: "mid", EXACT: "exact"}
LAYERS, HEADS, DIM = 2, 2, 16

each_stratum = pytest.mark.parametrize("stratum", CODECS, ids=NAMES.get)


def _noise() -> torch.Tensor:
    """Return keys' and values' random bytes, the same under every release of everything."""
    count = 2 * LAYERS * HEADS * BLOCK_TOKENS * DIM
    noise = torch.tensor(list(hashlib.shake_256(b"golden").digest(count)), dtype=torch.int16)
    return noise.view(2, LAYERS, HEADS, 1, BLOCK_TOKENS, DIM)


def _block(stratum: Stratum) -> KVBlocks:
    """Return floats from 0.5 to 2 of any mantissa, or small integers, far from any rounding."""
    if stratum == EXACT:
        keys, values = (_noise() + 0x3F00).view(torch.bfloat16)
    else:
        keys, values = (_noise() % 31 - 15).bfloat16()
        keys = keys * torch.tensor([1, 2, 4, 8] * (DIM // 4)).bfloat16() + 16
    ages = torch.arange(LAYERS * BLOCK_TOKENS).view(LAYERS, 1, BLOCK_TOKENS) % 33
    return KVBlocks(keys, values, torch.exp2(-ages.float())[:, None].expand(-1, HEADS, -1, -1), 0)


def _encode(stratum: Stratum) -> bytes:
    return seal_all(CODECS[stratum], _block(stratum))[0].frames[stratum]


def _read(stratum: Stratum) -> bytes:
    return (GOLDEN / f"{NAMES[stratum]}.kvf").read_bytes()


def _sums(tensor: torch.Tensor) -> list[list[float]]:
    """Return per layer the sum, the sum of squares, and a sum that depends on the order."""
    rows = tensor.double().flatten(1)
    ramp = torch.arange(rows.shape[1]) % 97
    return torch.stack([rows.sum(1), rows.square().sum(1), (rows * ramp).sum(1)], 1).tolist()


def _decode(*strata: Stratum) -> dict[str, list[list[float]]]:
    frames = {stratum: Frame.open(_read(stratum)) for stratum in strata}
    exact = strata == (EXACT,)
    shape = BlockShape(HEADS, DIM, torch.bfloat16 if exact else torch.float32)
    keys, values = CODECS[strata[0]].decode([frames], shape)
    return {"keys": _sums(keys), "values": _sums(values)}


def _describe(data: bytes) -> dict[str, Any]:
    frame = Frame.open(data)
    header = MessageToDict(frame.header, preserving_proto_field_name=True)
    header["token_ids"] = list(frame.header.token_ids)  # JSON has 64-bit integers as text
    return {
        "header": header,
        "segments": {
            str(layer): hashlib.sha256(segment).hexdigest()
            for layer, segment in frame.segments().items()
        },
    }


READS: list[tuple[Stratum, ...]] = [(BASE,), (BASE, MID), (EXACT,)]


@pytest.fixture(scope="module")
def expected(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.config.getoption("--write-golden", default=False):
        for stratum in CODECS:
            (GOLDEN / f"{NAMES[stratum]}.kvf").write_bytes(_encode(stratum))
        told: dict[str, Any] = {NAMES[stratum]: _describe(_read(stratum)) for stratum in CODECS}
        told["decoded"] = {"+".join(NAMES[s] for s in read): _decode(*read) for read in READS}
        told["zstd"] = list(zstandard.ZSTD_VERSION)
        (GOLDEN / "expected.json").write_text(json.dumps(told, indent=1) + "\n")
    loaded: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
    return loaded


@each_stratum
def test_a_golden_frame_reads_to_the_same_header_and_bytes(
    stratum: Stratum, expected: dict[str, Any]
) -> None:
    assert _describe(_read(stratum)) == expected[NAMES[stratum]]


@each_stratum
def test_a_golden_frame_is_what_its_header_and_segments_encode_to(
    stratum: Stratum, expected: dict[str, Any]
) -> None:
    frame = Frame.open(_read(stratum))
    assert encode_frame(frame.header, frame.segments()) == _read(stratum)


@pytest.mark.parametrize("stratum", [BASE, MID], ids=NAMES.get)
def test_the_codec_writes_the_golden_frames_byte_for_byte(
    stratum: Stratum, expected: dict[str, Any]
) -> None:
    assert _encode(stratum) == _read(stratum)


def test_no_rounding_of_the_golden_block_is_close() -> None:
    """A last bit that another machine computes otherwise must not change the golden bytes."""
    block = _block(BASE)
    keys = block.keys[..., 4:, :].double()  # without sinks
    minimum, step = quantize_channels(keys.float(), torch.zeros(keys.shape[:-1], dtype=torch.bool))[
        1:
    ]
    scaled = (keys - minimum.double()[..., None, :]) / step.double()[..., None, :]
    assert (scaled.remainder(1) - 0.5).abs().min() > 1e-4
    values = block.values.double() @ hadamard(DIM).double()
    _, peak, scale_codes = quantize_gaussian(values.float())
    assert (peak > 1).all()
    octaves = (peak.double()[..., None] / values.square().mean(-1).sqrt()).log2()
    assert ((16 * octaves).remainder(1) - 0.5).abs().min() > 1e-4
    unit = values / decode_scales(peak, scale_codes).double()[..., None]
    borders = torch.tensor(THRESHOLDS, dtype=torch.float64) / LEVELS_PER_SIGMA
    distance = (unit.abs()[..., None] - borders).abs()
    assert distance[distance > 0].min() > 1e-5  # zero is exact: sums of integers
    sinks = torch.cat(
        [block.keys[..., :4, :].double() @ hadamard(DIM).double(), values[..., :4, :]]
    )
    scale = (sinks.abs().amax(-1) / 127).bfloat16().double()
    assert ((sinks / scale[..., None]).remainder(1) - 0.5).abs().min() > 1e-5


def test_the_exact_codec_writes_the_golden_planes(expected: dict[str, Any]) -> None:
    if list(zstandard.ZSTD_VERSION) == expected["zstd"]:
        assert _encode(EXACT) == _read(EXACT)
    written, golden = Frame.open(_encode(EXACT)).segments(), Frame.open(_read(EXACT)).segments()
    assert [_planes(s) for s in written.values()] == [_planes(s) for s in golden.values()]


def _planes(segment: memoryview) -> list[bytes]:
    """Return tags and planes of an exact segment, read independently of the codec."""
    parts, rest = [bytes(segment[:BLOCK_TOKENS])], segment[BLOCK_TOKENS:]
    while rest:
        flag, size = struct.unpack_from("<BI", rest)
        plane = bytes(rest[5 : 5 + size])
        parts.append(zstandard.decompress(plane) if flag else plane)
        rest = rest[5 + size :]
    return parts


def test_golden_planes_are_of_both_kinds() -> None:
    segment = Frame.open(_read(EXACT)).segment(0)
    first, size = struct.unpack_from("<BI", segment, BLOCK_TOKENS)
    second, _ = struct.unpack_from("<BI", segment, BLOCK_TOKENS + 5 + size)
    assert {first, second} == {0, 1}


@pytest.mark.parametrize("read", READS, ids=lambda read: "+".join(NAMES[s] for s in read))
def test_golden_frames_decode_to_the_same_numbers(
    read: tuple[Stratum, ...], expected: dict[str, Any]
) -> None:
    decoded, told = _decode(*read), expected["decoded"]["+".join(NAMES[s] for s in read)]
    for side in ("keys", "values"):
        for layer, sums in enumerate(told[side]):
            assert decoded[side][layer] == pytest.approx(sums, rel=1e-5, abs=1e-2)


def test_the_exact_golden_frame_is_the_block_bit_for_bit() -> None:
    block = _block(EXACT)
    frame = Frame.open(_read(EXACT))
    keys, values = ExactCodec().decode([{EXACT: frame}], BlockShape(HEADS, DIM, torch.bfloat16))
    assert torch.equal(bits(keys), bits(block.keys))
    assert torch.equal(bits(values), bits(block.values))


def test_golden_files_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 40_000
