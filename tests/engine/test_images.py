"""Which pictures are accepted, and that the others are refused before their pixels are decoded."""

import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image as PillowImage

from kvstrata.engine.images import MAX_PIXELS, Image, decode_image
from kvstrata.protos.errors import ImageError

RED = bytes([200, 10, 20])


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (6, 4), **how: Any) -> bytes:
    file = io.BytesIO()
    colour: Any = {"RGB": (200, 10, 20), "RGBA": (200, 10, 20, 255)}.get(mode, 100)
    PillowImage.new(mode, size, colour).save(file, kind, **how)
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, with hardly any pixels behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    made = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        made += struct.pack(">I", len(data)) + name + data
        made += struct.pack(">I", zlib.crc32(name + data))
    return made


def test_a_png_is_its_raw_pixels() -> None:
    raw = Image(4, 6, RED * 24)
    for mode in ("RGB", "RGBA"):
        found = decode_image(encoded("PNG", mode))
        assert found == raw
        assert found.digest == raw.digest
    assert decode_image(encoded("JPEG")).width == 6
    assert decode_image(encoded("PNG", "L")).pixels == bytes([100]) * 72


def test_a_turned_jpeg_is_turned_back() -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    found = decode_image(encoded("JPEG", exif=exif))
    assert (found.height, found.width) == (6, 4)


def test_size_takes_part_in_the_digest() -> None:
    assert Image(2, 3, RED * 6).digest != Image(3, 2, RED * 6).digest


@pytest.mark.parametrize(
    ("height", "width", "num_bytes", "message"),
    [
        (0, 5, 0, "0 x 5"),
        (5, 0, 0, "5 x 0"),
        (2, 2, 11, "are 12 bytes, not 11"),
        (2, 2, 16, "are 12 bytes, not 16"),
        (1 << 20, 1 << 20, 12, f"more than {MAX_PIXELS}"),
    ],
)
def test_raw_pixels_of_the_wrong_size_are_refused(
    height: int, width: int, num_bytes: int, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        Image(height, width, bytes(num_bytes))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no PNG or JPEG"),
        (b"GIF89a" + bytes(64), "no PNG or JPEG"),
        (encoded("GIF", "L"), "no PNG or JPEG"),
        (encoded("PNG")[:50], "no PNG or JPEG"),
        (encoded("JPEG")[:300], "no PNG or JPEG"),
        (encoded("PNG", "I;16"), "pixels of type I;16"),
        (png_that_claims(1 << 15, 1 << 15), "more than"),
        (png_that_claims(5000, 5000), "more than"),
        (png_that_claims(1 << 30, 1), "more than"),
    ],
    ids=["empty", "gif", "whole gif", "cut png", "cut jpeg", "16 bits", "bomb", "large", "wide"],
)
def test_files_that_are_no_pictures_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(data)
