"""Pictures as users send them: raw RGB, or a PNG or JPEG file; checked before memory is taken."""

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass

from PIL import Image as PillowImage
from PIL import ImageOps

from kvstrata.protos.errors import ImageError

MAX_PIXELS = 1 << 24  # 4096 x 4096
_FORMATS = ("PNG", "JPEG")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel at most


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, or a frame of a video.

    Attributes:
        height: Rows.
        width: Pixels of a row.
        pixels: uint8, height * width * 3, RGB, row by row.
    """

    height: int
    width: int
    pixels: bytes

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ImageError: They do not fit together, or are beyond the limit.
        """
        check_size(self.height, self.width)
        expected = self.height * self.width * 3
        if len(self.pixels) != expected:
            raise ImageError(
                f"{self.height} x {self.width} pixels of RGB are {expected} bytes, not "
                f"{len(self.pixels)}",
                "send 8-bit RGB rows without padding, and height before width",
            )

    @property
    def digest(self) -> bytes:
        """SHA-256 of size and pixels: what the image is, however it was sent."""
        head = struct.pack("<QQ", self.height, self.width)
        return hashlib.sha256(head + self.pixels).digest()


def check_size(height: int, width: int) -> None:
    """Raise unless a picture of this size is accepted.

    Raises:
        ImageError: It has no pixels, or more than ``MAX_PIXELS``.
    """
    if height < 1 or width < 1:
        raise ImageError(f"an image of {height} x {width} pixels", "send at least one pixel")
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"an image of {height} x {width} pixels, more than {MAX_PIXELS} pixels",
            "scale it down before sending it: models see far fewer",
        )


def decode_image(data: bytes) -> Image:
    """Return the picture in a PNG or JPEG file, turned as its EXIF data say.

    The size is read and checked before any pixel is decoded. Transparency is dropped.

    Raises:
        ImageError: No such file, damaged, too large, or of more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with PillowImage.open(io.BytesIO(data), formats=_FORMATS) as opened:
                check_size(opened.height, opened.width)
                if opened.mode not in _MODES:
                    raise ImageError(
                        f"an image with pixels of type {opened.mode}", "send 8 bits a channel"
                    )
                turned = ImageOps.exif_transpose(opened).convert("RGB")
    except ImageError:
        raise
    except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning):
        raise ImageError(f"an image of more than {MAX_PIXELS} pixels", "scale it down") from None
    except Exception as error:  # whatever a decoder says of bytes that come from anywhere
        raise ImageError(
            f"an image is no PNG or JPEG file: {error}"[:300], "send a whole PNG or JPEG file"
        ) from error
    return Image(turned.height, turned.width, turned.tobytes())
