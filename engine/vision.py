"""Vision-language models: a language model of a verified family, and a tower that sees for it.

The two are taken apart at load. The language model is served as any other; the tower turns each
image into as many embeddings as it has tokens, which take the places of its token ids' embeddings.
Every image is one tile: no cutting into further tiles, so all images have equally many tokens.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from kvstrata.engine.attention import ATTENTION_NAME
from kvstrata.engine.errors import ModelNotFoundError, UnsupportedModelError
from kvstrata.engine.images import Image
from kvstrata.protos.errors import ImageError

Prepare = Callable[[Any, Any], dict[str, Any]]


def _one_picture(processor: Any, pixels: Any) -> dict[str, Any]:
    return _prepared(processor, pixels)


def _unsplit(processor: Any, pixels: Any) -> dict[str, Any]:
    return _prepared(processor, pixels, do_image_splitting=False)


def _first_tile(processor: Any, pixels: Any) -> dict[str, Any]:
    """As one of several images, of which transformers sees the whole and no tiles."""
    return _prepared(processor, pixels) | {"batch_num_images": [2]}


def _prepared(processor: Any, pixels: Any, **settings: Any) -> dict[str, Any]:
    last = {"input_data_format": "channels_last", "return_tensors": "pt"}
    found = dict(processor(images=[pixels], **last, **settings))
    return {name: value for name, value in found.items() if name not in ("rows", "cols")}


_PREPARE: dict[str, Prepare] = {
    "llava": _one_picture,
    "llava_onevision": _first_tile,
    "smolvlm": _unsplit,
    "idefics3": _unsplit,
}


class VisionTower:
    """Sees images for one language model. Thread-safe.

    Attributes:
        num_tokens: That an image is.
        placeholder_id: The token that marks an image's place in a prompt.
    """

    def __init__(self, vlm: Any, processor: Any, name: str) -> None:
        """Take what sees out of a transformers model, and see what it makes of an image.

        Raises:
            UnsupportedModelError: The number of tokens depends on the image.
        """
        self._inner = vlm.model
        self._processor = processor
        self._prepare = _PREPARE[vlm.config.model_type]
        self.placeholder_id = int(vlm.config.image_token_id)
        shapes = ((64, 64), (48, 96))
        counts = {len(self.see(Image(h, w, bytes(h * w * 3)))) for h, w in shapes}
        if len(counts) > 1:
            raise UnsupportedModelError(
                f"{name}: images of other shapes become other numbers of tokens {sorted(counts)}"
            )
        self.num_tokens = counts.pop()

    def to(self, device: torch.device) -> "VisionTower":
        """Move to a device; returns itself."""
        self._inner = self._inner.to(device)
        return self

    @torch.inference_mode()
    def see(self, image: Image) -> torch.Tensor:
        """Return the embeddings of an image's tokens, (num_tokens, width).

        Raises:
            ImageError: The model's processor refuses the image.
        """
        shape = (image.height, image.width, 3)
        pixels = np.frombuffer(image.pixels, np.uint8).reshape(shape)
        try:
            prepared = self._prepare(self._processor, pixels)
        except Exception as error:  # a processor is a program of the model's makers
            raise ImageError(
                f"the model's processor refuses an image of {image.height} x {image.width} "
                f"pixels: {error}"[:300],
                "send an image whose sides differ less",
            ) from error
        like = next(self._inner.parameters())
        inputs = {
            key: value.to(like.device, like.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in prepared.items()
        }
        (seen,) = self._inner.get_image_features(**inputs, return_dict=True).pooler_output
        return torch.as_tensor(seen)


def take_apart(vlm: Any, processor: Any, name: str) -> tuple[Any, VisionTower]:
    """Return the language model of a vision-language model, and its tower.

    Raises:
        UnsupportedModelError: See ``VisionTower``.
    """
    inner = vlm.model
    part = "text_model" if hasattr(inner, "text_model") else "language_model"
    decoder = getattr(inner, part)
    with torch.device("meta"):
        language: Any = transformers.AutoModelForCausalLM.from_config(
            decoder.config, attn_implementation=ATTENTION_NAME
        )
    language.model, language.lm_head = decoder, vlm.lm_head
    language.generation_config = vlm.generation_config
    setattr(inner, part, None)
    return language, VisionTower(vlm.eval(), processor, name)


def load_processor(source: str) -> Any:
    """Return the image processor of a model, in the form that needs Pillow only.

    Raises:
        ModelNotFoundError: There is none beside the weights.
    """
    try:
        return transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise ModelNotFoundError(f"{source}: cannot load its image processor: {error}") from error
