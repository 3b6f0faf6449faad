"""The frame: what goes in comes out, in whole or in part, and nothing else is believed."""

import random
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import (
    ALIGNMENT,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    Frame,
    aligned,
    encode_frame,
    encoding_id,
    head_size,
    stratum_name,
)
from kvstrata.protos.frame_pb2 import Attachment, FrameHeader, RopeForm, Segment, Stratum
from tests.protos.forging import forge, prelude_of

UINT32 = st.integers(0, 2**32 - 1)
STRATA = st.sampled_from([s for s in Stratum.values() if s])
CONTENTS = st.one_of(
    st.binary(max_size=70),
    st.builds(lambda size, seed: random.Random(seed).randbytes(size), st.integers(0, 3000), UINT32),
)
HEADERS = st.builds(
    FrameHeader,
    scope=st.binary(max_size=16),
    block_hash=st.binary(max_size=16),
    parent_hash=st.binary(max_size=16),
    stratum=STRATA,
    encoding_id=st.binary(max_size=16),
    codec=st.text(max_size=12),
    codec_version=UINT32,
    profile=st.binary(max_size=16),
    rope=st.sampled_from(RopeForm.values()),
    kv_dtype=st.text(max_size=12),
    num_layers=UINT32,
    num_kv_heads=UINT32,
    head_dim=UINT32,
    first_position=UINT32,
    token_ids=st.lists(UINT32, max_size=64),
)
SEGMENTS = st.dictionaries(UINT32, CONTENTS, max_size=6)
ATTACHMENTS = st.dictionaries(st.text(max_size=8), CONTENTS, max_size=3)
RANDOMLY = settings(max_examples=150, deadline=None, derandomize=True)


def _without_tables(header: FrameHeader) -> FrameHeader:
    copy = FrameHeader()
    copy.CopyFrom(header)
    del copy.segments[:], copy.attachments[:]
    return copy


def _sample() -> bytes:
    header = FrameHeader(
        scope=bytes(16),
        block_hash=b"\x01" * 16,
        stratum=Stratum.STRATUM_BASE,
        codec="sample",
        token_ids=range(4),
    )
    return encode_frame(header, {1: b"\xab\xcd", 2: b"x" * 64, 5: b""}, {"tail": b"yz"})


@pytest.fixture
def small_memory() -> Iterator[None]:
    """Fail if the test allocates as much as a mebibyte at any time beyond what it began with."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@RANDOMLY
@given(header=HEADERS, segments=SEGMENTS, attachments=ATTACHMENTS)
def test_a_frame_returns_what_was_put_in(
    header: FrameHeader, segments: dict[int, bytes], attachments: dict[str, bytes]
) -> None:
    data = encode_frame(header, segments, attachments)
    frame = Frame.open(data)
    frame.verify()
    assert _without_tables(frame.header) == header
    assert frame.segments() == segments
    assert list(frame.segments()) == sorted(segments)
    assert {layer: frame.segment(layer) for layer in segments} == segments
    assert {name: frame.attachment(name) for name in attachments} == attachments
    assert frame.frame_bytes == len(data)
    assert head_size(data[:32]) == frame.head_bytes


@RANDOMLY
@given(header=HEADERS, segments=SEGMENTS, attachments=ATTACHMENTS)
def test_segments_are_aligned_and_everything_between_them_is_zero(
    header: FrameHeader, segments: dict[int, bytes], attachments: dict[str, bytes]
) -> None:
    data = bytearray(encode_frame(header, segments, attachments))
    frame = Frame.open(bytes(data))
    cursor = frame.head_bytes
    entries: list[Segment | Attachment] = [*frame.header.segments, *frame.header.attachments]
    for entry in entries:
        assert entry.offset % ALIGNMENT == 0
        assert not any(data[cursor : entry.offset])
        # At most one unit of padding between parts, and two where the header shrank.
        assert entry.offset - cursor < ALIGNMENT + (cursor == frame.head_bytes) * 1024
        cursor = entry.offset + entry.length
        assert xxhash.xxh3_64_intdigest(data[entry.offset : cursor]) == entry.checksum
    assert not any(data[cursor:])


@RANDOMLY
@given(
    header=HEADERS,
    strata=st.dictionaries(STRATA, SEGMENTS, min_size=1, max_size=3),
    draw=st.randoms(use_true_random=False),
)
def test_a_head_and_a_run_of_layers_hold_exactly_the_layers_asked_for(
    header: FrameHeader, strata: dict[Stratum, dict[int, bytes]], draw: random.Random
) -> None:
    for stratum, segments in strata.items():
        header.stratum = stratum
        data = encode_frame(header, segments, {"tail": b"never asked for"})
        whole = Frame.open(data)
        bounds = [0, 2**32, *segments, *(layer + 1 for layer in segments)]
        first, last = draw.choice(bounds), draw.choice(bounds)
        begin, end = whole.layer_run(first, last)
        part = Frame.open_parts(data[: whole.head_bytes], begin, data[begin:end])
        part.verify()
        assert part.header == whole.header
        assert part.header.stratum == stratum
        wanted = {layer: s for layer, s in segments.items() if first <= layer < last}
        held = part.segments()
        assert {layer: s for layer, s in held.items() if layer in wanted} == wanted
        # A segment of no bytes at the border of the run cannot be outside of it.
        assert not any(s for layer, s in held.items() if layer not in wanted)
        for layer in segments:
            if layer not in held:
                with pytest.raises(KeyError, match=f"layer {layer}"):
                    part.segment(layer)
        with pytest.raises(KeyError, match="tail"):
            part.attachment("tail")


def test_names_that_a_frame_does_not_have_are_key_errors() -> None:
    frame = Frame.open(_sample())
    with pytest.raises(KeyError, match="no layer 3"):
        frame.segment(3)
    with pytest.raises(KeyError, match="no attachment 'head'"):
        frame.attachment("head")


def test_a_head_without_any_segment_can_be_opened_and_asked_where_layers_lie() -> None:
    data = _sample()
    size = head_size(data[:32])
    head = Frame.open_parts(data[:size], 0, data[:size])
    begin, end = head.layer_run(1, 2)
    assert data[begin:end] == b"\xab\xcd"
    assert head.layer_run(3, 5) == (0, 0)
    with pytest.raises(KeyError, match="outside the part"):
        head.segment(1)


def test_a_part_that_lies_outside_its_frame_is_corrupt() -> None:
    data = _sample()
    head = data[: head_size(data)]
    for first_byte, payload in ((-1, b""), (len(data), b"x"), (1 << 62, b"x"), (1, data)):
        with pytest.raises(CorruptFrameError, match="outside its frame"):
            Frame.open_parts(head, first_byte, payload)


def test_the_bytes_of_a_frame_are_those_of_its_description() -> None:
    data = _sample()
    magic, version, flags, head_bytes, frame_bytes, checksum = struct.unpack_from("<8sHHIQQ", data)
    assert (magic, version, flags, frame_bytes) == (b"KVSTRATA", 1, 0, len(data))
    head = data[32 : 32 + head_bytes]
    assert checksum == xxhash.xxh3_64_intdigest(data[:24] + head)
    header = FrameHeader.FromString(head)
    # Segments in ascending layer order, then attachments; an empty one has a place too.
    first = header.segments[0].offset
    assert first >= 32 + head_bytes
    assert [(s.layer, s.offset - first, s.length) for s in header.segments] == [
        (1, 0, 2),
        (2, 64, 64),
        (5, 128, 0),
    ]
    assert [(a.name, a.offset - first, a.length) for a in header.attachments] == [("tail", 128, 2)]
    assert data[first : first + 2] == b"\xab\xcd"
    assert data[first + 64 : first + 130] == b"x" * 64 + b"yz"
    assert forge(head, data[32 + head_bytes :]) == data


def test_encoding_leaves_the_given_header_alone_and_replaces_its_tables() -> None:
    header = FrameHeader(codec="sample")
    header.segments.add(layer=9, offset=64, length=1)
    before = header.SerializeToString()
    frame = Frame.open(encode_frame(header, {3: bytearray(b"abc")}))
    assert header.SerializeToString() == before
    assert frame.segments() == {3: b"abc"}


def test_views_of_an_opened_frame_are_read_only_and_not_copies() -> None:
    buffer = bytearray(_sample())
    view = Frame.open(buffer).segment(2)
    assert view.readonly
    buffer[buffer.index(b"xxxx")] = ord("!")
    assert bytes(view[:2]) == b"!x"


def test_a_frame_beyond_the_limit_is_not_written() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return MAX_FRAME_BYTES

    with pytest.raises(ValueError, match="exceeds the limit"):
        encode_frame(FrameHeader(), {0: Huge()})


@pytest.mark.usefixtures("small_memory")
def test_a_small_frame_cut_at_any_length_is_corrupt() -> None:
    data = _sample()
    for size in range(len(data)):
        with pytest.raises(CorruptFrameError):
            Frame.open(data[:size])
    with pytest.raises(CorruptFrameError, match=f"came as {len(data) + 1}"):
        Frame.open(data + b"\x00")


def test_a_head_cut_at_any_length_is_corrupt() -> None:
    data = _sample()
    for size in range(head_size(data)):
        with pytest.raises(CorruptFrameError):
            Frame.open_parts(data[:size], 0, b"")


@pytest.mark.usefixtures("small_memory")
def test_garbage_is_corrupt() -> None:
    generator = random.Random(1)
    for size in [*range(100), 1000, 10_000]:
        for start in (b"", b"KVSTRATA", b"KVSTRATA\x01\x00\x00\x00"):
            with pytest.raises(CorruptFrameError):
                Frame.open(start + generator.randbytes(size))


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (forge(b"", magic=b"KVSTRATB"), "magic"),
        (forge(b"", version=2), "version 2"),
        (forge(b"", flags=1), "flags 0x1"),
        (forge(b"", head_bytes=2**32 - 1), "impossible sizes"),
        (forge(b"", head_bytes=MAX_HEADER_BYTES + 1, frame_bytes=MAX_FRAME_BYTES), "impossible"),
        (forge(b"", head_bytes=MAX_HEADER_BYTES, frame_bytes=MAX_FRAME_BYTES), "is cut at"),
        (forge(b"", head_bytes=1, frame_bytes=32), "impossible sizes"),
        (forge(b"", frame_bytes=0), "impossible sizes"),
        (forge(b"", frame_bytes=31), "impossible sizes"),
        (forge(b"", frame_bytes=33), "came as 32"),
        (forge(b"", frame_bytes=MAX_FRAME_BYTES), "came as 32"),
        (forge(b"", frame_bytes=MAX_FRAME_BYTES + 1), "impossible sizes"),
        (forge(b"", frame_bytes=2**64 - 1), "impossible sizes"),
        (forge(b"\xff\xff\xff\xff"), "unreadable header"),
        (forge(b"\x32\x02\xff\xfe"), "unreadable header"),  # codec: invalid UTF-8
        (prelude_of(b"", 32)[:24] + bytes(8), "checksum of the header"),
    ],
)
def test_a_prelude_or_header_that_lies_is_corrupt(frame: bytes, told: str) -> None:
    with pytest.raises(CorruptFrameError, match=told):
        Frame.open(frame)


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize(
    "table",
    [
        [(1 << 20, 1)],
        [(2**64 - 64, 1)],
        [(2**63, 2**63)],
        [(256, 2**64 - 1)],
        [(256, 2**64 - 256)],
        [(256, 257)],
        [(256, 1 << 40)],
        [(257, 1)],
        [(0, 1)],
        [(64, 1)],
        [(256, 65), (320, 1)],
        [(256, 64), (256, 64)],
        [(320, 64), (256, 64)],
    ],
    ids=lambda table: "+".join(f"{offset}:{length}" for offset, length in table),
)
@pytest.mark.parametrize("kind", ["segments", "attachments"])
def test_an_offset_table_that_does_not_fit_the_frame_is_corrupt(
    kind: str, table: list[tuple[int, int]]
) -> None:
    header = FrameHeader(scope=bytes(100))
    for offset, length in table:
        getattr(header, kind).add(offset=offset, length=length)
    body = bytes(512 - 32 - header.ByteSize())
    with pytest.raises(CorruptFrameError, match="offset table"):
        Frame.open(forge(header, body))
    head = forge(header, frame_bytes=512)
    with pytest.raises(CorruptFrameError, match="offset table"):
        Frame.open_parts(head, 0, head)


def test_a_forged_frame_with_a_table_that_fits_is_opened() -> None:
    header = FrameHeader(scope=bytes(100))
    header.segments.add(
        layer=4, offset=256, length=256, checksum=xxhash.xxh3_64_intdigest(bytes(256))
    )
    frame = Frame.open(forge(header, bytes(512 - 32 - header.ByteSize())))
    assert frame.segments() == {4: bytes(256)}


def test_a_wrong_segment_checksum_names_the_layer_and_spares_the_others() -> None:
    data = bytearray(_sample())
    data[Frame.open(data).header.segments[1].offset] ^= 1
    frame = Frame.open(bytes(data))
    assert bytes(frame.segment(1)) == b"\xab\xcd"
    with pytest.raises(CorruptFrameError, match="layer 2"):
        frame.segment(2)
    with pytest.raises(CorruptFrameError, match="layer 2"):
        frame.segments()
    with pytest.raises(CorruptFrameError, match="layer 2"):
        frame.verify()


def test_a_wrong_attachment_checksum_is_found_by_verify() -> None:
    data = bytearray(_sample())
    data[-1] ^= 0x80
    frame = Frame.open(bytes(data))
    assert list(frame.segments()) == [1, 2, 5]
    for read in (frame.verify, lambda: frame.attachment("tail")):
        with pytest.raises(CorruptFrameError, match="tail"):
            read()


def test_the_encoding_id_depends_on_codec_strata_and_the_borders_of_segments() -> None:
    base, mid = 1, 2
    writings: list[tuple[str, dict[int, list[bytes]]]] = [
        ("a/1", {base: [b"xy", b"z"]}),
        ("a/2", {base: [b"xy", b"z"]}),
        ("a/1", {base: [b"x", b"yz"]}),
        ("a/1", {base: [b"xyz"]}),
        ("a/1", {mid: [b"xy", b"z"]}),
        ("a/1", {base: [b"xy"], mid: [b"z"]}),
        ("a/1", {base: [b"xy", b"z", b""]}),
    ]
    ids = [encoding_id(codec, strata) for codec, strata in writings]
    assert len(set(ids)) == len(writings)
    assert {len(i) for i in ids} == {16}
    assert encoding_id("a/1", {mid: [b"z"], base: [b"xy"]}) == ids[5]
    assert encoding_id("a/1", {base: [bytearray(b"xy"), memoryview(b"z")]}) == ids[0]


def test_sizes_round_up_to_the_next_multiple_of_64() -> None:
    assert [aligned(n) for n in (0, 1, 63, 64, 65)] == [0, 64, 64, 64, 128]


def test_strata_have_short_names() -> None:
    assert [stratum_name(s) for s in (1, 2, 3, 4)] == ["base", "mid", "fine", "exact"]
    assert [stratum_name(s) for s in (-1, 66)] == ["-1", "66"]


def test_segments_are_verified_once_and_a_bad_one_each_time() -> None:
    raw = bytearray(encode_frame(FrameHeader(), {0: b"abc", 1: b"defg"}))
    good = Frame.open(bytes(raw))
    assert good.segments() is good.segments()
    assert good == Frame.open(bytes(raw))
    raw[raw.index(b"defg")] ^= 1
    bad = Frame.open(bytes(raw))
    for _ in range(2):
        with pytest.raises(CorruptFrameError, match="layer 1"):
            bad.segments()
