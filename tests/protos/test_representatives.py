"""The attachment that blocks are searched by: what goes in comes out, and nothing else."""

import struct

import pytest

from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame, encode_frame
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.representatives import ATTACHMENT, pack_representatives, unpack_representatives

HEADER = FrameHeader(num_kv_heads=2, head_dim=3)
ROWS = {5: bytes(range(12)), 2: bytes(range(12, 24))}


def _frame(attachment: bytes | None) -> Frame:
    attached = {} if attachment is None else {ATTACHMENT: attachment, "other": b"x"}
    return Frame.open(encode_frame(HEADER, {0: b"segment"}, attached))


def test_rows_come_back_in_ascending_layers() -> None:
    packed = pack_representatives(ROWS)
    assert packed == struct.pack("<3I", 2, 2, 5) + ROWS[2] + ROWS[5]
    found = unpack_representatives(_frame(packed))
    assert {layer: bytes(row) for layer, row in found.items()} == ROWS
    assert list(found) == [2, 5]


def test_a_frame_without_them_has_none() -> None:
    assert unpack_representatives(_frame(None)) == {}
    assert unpack_representatives(_frame(pack_representatives({}))) == {}


def test_rows_of_different_lengths_are_not_packed() -> None:
    with pytest.raises(ValueError, match="one length"):
        pack_representatives({0: bytes(12), 1: bytes(13)})


GOOD = pack_representatives(ROWS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00\x00",
        GOOD[:-1],
        GOOD + b"\x00",
        struct.pack("<I", 1 << 31) + GOOD[4:],
        struct.pack("<I", 1) + GOOD[4:],
        struct.pack("<3I", 2, 5, 2) + GOOD[12:],
        struct.pack("<3I", 2, 5, 5) + GOOD[12:],
        pack_representatives({0: bytes(10)}),
    ],
    ids=["empty", "short", "cut", "long", "huge", "fewer", "descending", "twice", "other-model"],
)
def test_what_does_not_fit_the_frame_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptFrameError) as caught:
        unpack_representatives(_frame(data))
    assert caught.value.remedy
