"""Pictures and videos as users give them, to messages."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from kvstrata.protos import inference_pb2
from kvstrata.protos.errors import EmptyVideoError, ImageError


class Pixels(Protocol):
    """An array of 8-bit RGB pixels, (height, width, 3), such as a NumPy array."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """Return the pixels."""
        ...


Picture = bytes | Path | Pixels  # a PNG or JPEG file, where it lies, or pixels
Visual = Picture | Sequence[Picture]  # several are the frames of a video


def to_visuals(shown: Iterable[Visual]) -> list[inference_pb2.Visual]:
    """Return the messages of pictures and videos, in their order.

    Raises:
        EmptyVideoError: A video without frames.
        ImageError: Neither of them, or of the wrong type or shape.
    """
    if isinstance(shown, bytes | bytearray | str | Path):
        raise ImageError("the images are one image", "give a list, also of one")
    return [_visual(f"image {index}", visual) for index, visual in enumerate(shown)]


def _visual(name: str, visual: Visual) -> inference_pb2.Visual:
    if not isinstance(visual, list | tuple):
        return inference_pb2.Visual(picture=_picture(name, visual))
    if not visual:
        raise EmptyVideoError(f"{name} is a video without frames", "give at least one frame")
    frames = [_picture(f"frame {i} of {name}", frame) for i, frame in enumerate(visual)]
    return inference_pb2.Visual(video=inference_pb2.Video(frames=frames))


def _picture(name: str, picture: object) -> inference_pb2.Picture:
    if isinstance(picture, Path):
        try:
            return inference_pb2.Picture(file=picture.read_bytes())
        except OSError as error:
            raise ImageError(f"{name} cannot be read: {error}", "check the path") from error
    if isinstance(picture, bytes | bytearray):
        return inference_pb2.Picture(file=bytes(picture))
    try:
        pixels = memoryview(picture)  # type: ignore[arg-type]
    except TypeError:
        raise ImageError(
            f"{name} is a {type(picture).__name__}",
            "give a PNG or JPEG file as bytes or Path, or an array of pixels",
        ) from None
    shape = pixels.shape or ()
    if pixels.format != "B" or len(shape) != 3 or shape[2] != 3:
        raise ImageError(
            f"{name} has pixels of format {pixels.format!r} and shape {shape}",
            "give 8-bit RGB pixels, (height, width, 3)",
        )
    height, width, _ = shape
    return inference_pb2.Picture(rgb=pixels.tobytes(), height=height, width=width)
