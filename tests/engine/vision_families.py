"""Tiny random vision-language models, one per class that is served, and one that is not."""

from pathlib import Path
from typing import Any

import torch
import transformers

from kvstrata.engine.images import Image
from tests.engine.conftest import build_tokenizer

SIDE, PATCH = 32, 8
_TEXT = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SEEING = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
IMAGE_ID = 300
_SIZE = {"height": SIDE, "width": SIDE}


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_SEEING),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE_ID,
        image_seq_length=16,
    )


def _onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_SEEING),
        text_config=transformers.Qwen2Config(**_TEXT),
        image_token_id=IMAGE_ID,
        video_token_id=IMAGE_ID + 1,
        image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    )


def _smolvlm() -> Any:
    return transformers.SmolVLMConfig(
        vision_config=_SEEING,
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_id=IMAGE_ID,
        scale_factor=2,
    )


def _clip_processor() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SIZE)


def _onevision_processor() -> Any:
    pins = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    return transformers.LlavaOnevisionImageProcessorPil(size=_SIZE, image_grid_pinpoints=pins)


def _smolvlm_processor() -> Any:
    return transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}
    )


VISION_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llava": (_llava, _clip_processor),
    "llava_onevision": (_onevision, _onevision_processor),
    "smolvlm": (_smolvlm, _smolvlm_processor),
}
NUM_TOKENS = {"llava": 16, "llava_onevision": 17, "smolvlm": 4}


def build_vision_tokenizer() -> Any:
    """Return the byte-level tokenizer with a token for images."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<unused{i}>" for i in range(len(tokenizer), IMAGE_ID)]}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_ID
    return tokenizer


def save_vision_model(name: str, folder: Path) -> Path:
    """Write a model of a family, with its tokenizer and processor."""
    make_config, make_processor = VISION_FAMILIES[name]
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForImageTextToText.from_config(
        make_config(), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    build_vision_tokenizer().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> Image:
    """Return a picture of noise."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    return Image(height, width, pixels.numpy().tobytes())
