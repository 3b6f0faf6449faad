"""Pictures and videos as users give them."""

from pathlib import Path

import numpy as np
import pytest

from kvstrata.client.request import build_request
from kvstrata.client.visuals import to_visuals
from kvstrata.protos.errors import EmptyVideoError, ImageError, InvalidRequestError

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


def test_files_paths_and_arrays_become_pictures_and_lists_videos(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"png")
    visuals = to_visuals([b"jpeg", path, PIXELS, [b"one", PIXELS[:, ::2]]])
    assert [v.WhichOneof("kind") for v in visuals] == ["picture"] * 3 + ["video"]
    assert visuals[0].picture.file == b"jpeg"
    assert visuals[1].picture.file == b"png"
    assert visuals[2].picture.rgb == bytes(range(24))
    assert (visuals[2].picture.height, visuals[2].picture.width) == (2, 4)
    frames = visuals[3].video.frames
    assert frames[0].file == b"one"
    assert frames[1].rgb == PIXELS[:, ::2].tobytes()
    assert frames[1].width == 2


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[]], EmptyVideoError, "image 0 is a video without frames"),
        ([b"x", [b"x", 3]], ImageError, "frame 1 of image 1 is a int"),
        ([{"a": 1}], ImageError, "image 0 is a dict"),
        (["a.png"], ImageError, "image 0 is a str"),
        ([Path("/no/such/file.png")], ImageError, "cannot be read"),
        ([PIXELS.astype(np.float32)], ImageError, "format 'f'"),
        ([PIXELS[..., :2]], ImageError, r"shape \(2, 4, 2\)"),
        ([PIXELS[0]], ImageError, r"shape \(4, 3\)"),
        (b"one image", ImageError, "the images are one image"),
    ],
)
def test_what_is_no_picture_is_refused(
    images: object, error: type[InvalidRequestError], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_request("<image>", {"images": images})  # type: ignore[typeddict-item]
