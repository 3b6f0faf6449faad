"""Pictures and videos of a request: checked, decoded, and put in their places in the prompt."""

from collections.abc import Iterable, Sequence

from kvstrata.engine.images import Image, decode_image
from kvstrata.prefill_node.worker import WorkerInfo
from kvstrata.protos.errors import (
    EmptyVideoError,
    ImageCountError,
    ImageError,
    PromptTooLongError,
    TextOnlyModelError,
)
from kvstrata.protos.identity import image_token_ids
from kvstrata.protos.inference_pb2 import Picture, Visual

MAX_REQUEST_PIXELS = 1 << 26  # of all pictures and frames of a request


def place_visuals(
    prompt_ids: Sequence[int], visuals: Iterable[Visual], info: WorkerInfo
) -> tuple[list[int], tuple[Image, ...]]:
    """Return the prompt with tokens of images in place of each placeholder, and the images.

    Whatever can be told without decoding a pixel is told first.

    Raises:
        TextOnlyModelError: The model sees nothing.
        ImageCountError: There are more placeholders than visuals, or fewer.
        EmptyVideoError: A video without frames.
        PromptTooLongError: They take more tokens than the model's context has.
        ImageError: A picture of the wrong size or type, or too many pixels in all.
    """
    shown = [_frames(visual) for visual in visuals]
    if not info.image_tokens:
        if shown:
            raise TextOnlyModelError(
                f"{info.model} reads text alone, the request has {len(shown)} pictures or videos",
                "leave them out, or ask a vision-language model",
            )
        return list(prompt_ids), ()
    places = [i for i, token_id in enumerate(prompt_ids) if token_id == info.placeholder_id]
    if len(places) != len(shown):
        raise ImageCountError(
            f"the prompt has {len(places)} placeholders for {len(shown)} pictures or videos",
            "put the model's placeholder once where each belongs",
        )
    num_tokens = sum(map(len, shown)) * info.image_tokens
    if num_tokens >= info.max_positions:
        raise PromptTooLongError(
            f"the images take {num_tokens} tokens, the model's context is {info.max_positions}",
            f"send fewer: each picture or frame takes {info.image_tokens} tokens",
        )
    images: dict[bytes, Image] = {}
    placed: list[int] = []
    num_pixels = begin = 0
    for place, frames in zip(places, shown, strict=True):
        placed += prompt_ids[begin:place]
        begin = place + 1
        for frame in frames:
            image = _decoded(frame)
            num_pixels += image.height * image.width
            if num_pixels > MAX_REQUEST_PIXELS:
                raise ImageError(
                    f"the request's images have more than {MAX_REQUEST_PIXELS} pixels in all",
                    "scale them down before sending them: models see far fewer",
                )
            images[image.digest] = image
            placed += image_token_ids(image.digest, info.image_tokens)
    return [*placed, *prompt_ids[begin:]], tuple(images.values())


def _frames(visual: Visual) -> Sequence[Picture]:
    kind = visual.WhichOneof("kind")
    if kind == "picture":
        return [visual.picture]
    if not visual.video.frames:
        if kind is None:
            raise ImageError("a visual is neither picture nor video", "set one of the two")
        raise EmptyVideoError("a video has no frames", "send at least one frame")
    return visual.video.frames


def _decoded(picture: Picture) -> Image:
    kind = picture.WhichOneof("data")
    if kind == "rgb":
        return Image(picture.height, picture.width, picture.rgb)
    if kind is None:
        raise ImageError("a picture has no data", "send RGB rows, or a PNG or JPEG file")
    return decode_image(picture.file)
