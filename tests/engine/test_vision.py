"""Vision-language models: what transformers computes, however their KV is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kvstrata.engine import Model, UnsupportedModelError
from kvstrata.engine.compatibility import check_config
from kvstrata.engine.held_images import MAX_IDLE, HeldImages
from kvstrata.engine.images import Image
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.new_sequence import new_sequence
from kvstrata.engine.sequence import RunningSequence
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import Method
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS, image_token_ids, is_of_image
from tests.engine.vision_families import (
    IMAGE_ID,
    NUM_TOKENS,
    VISION_FAMILIES,
    picture,
    save_vision_model,
)

FAMILY = pytest.mark.parametrize("family", VISION_FAMILIES)
WORDS = [3 + i * 7 % 250 for i in range(150)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_vision_model(name, tmp_path_factory.mktemp(name)) for name in NUM_TOKENS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: Model.load(str(f), dtype="float32", device="cpu") for name, f in folders.items()}


@pytest.fixture(scope="module")
def llava(models: dict[str, Model]) -> Model:
    return models["llava"]


def tokens_of(model: Model, image: Image) -> list[int]:
    assert model.vision is not None
    return image_token_ids(image.digest, model.vision.num_tokens)


def prompt_with(model: Model, *images: Image) -> list[int]:
    """Return a prompt of some 200 tokens, with the images one after the other in its middle."""
    seen = [token for image in images for token in tokens_of(model, image)]
    return [*WORDS[:50], *seen, *WORDS[50:]]


def reference_logits(folder: Path, ids: list[int], image: Image) -> Any:
    """Return what transformers computes of the same prompt by its own forward pass."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3)
    options: dict[str, Any] = {}
    if model.config.model_type == "smolvlm":
        options["do_image_splitting"] = False
    inputs = dict(processor(images=[pixels], return_tensors="pt", **options))
    if model.config.model_type == "llava_onevision":
        inputs["batch_num_images"] = torch.tensor([2])
    words = [IMAGE_ID if is_of_image(token) else token for token in ids]
    keep = {"pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images"}
    inputs = {name: value for name, value in inputs.items() if name in keep}
    with torch.inference_mode():
        return model(input_ids=torch.tensor([words]), **inputs).logits[0]


@FAMILY
@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
def test_logits_are_those_of_transformers(
    family: str, size: tuple[int, int], models: dict[str, Model], folders: dict[str, Path]
) -> None:
    model, image = models[family], picture(1, *size)
    assert model.vision is not None
    assert model.vision.num_tokens == NUM_TOKENS[family]
    assert model.vision.placeholder_id == IMAGE_ID
    ids = [5, 6, *tokens_of(model, image), 7, 8]
    expected = reference_logits(folders[family], ids, image)
    with model.images.hold([image]):
        plain = model.forward_all(model.new_cache(64), ids)
        packed_model = Model.load(str(folders[family]), dtype="float32", device="cpu")
        assert packed_model.pack()
        with packed_model.images.hold([image]):
            packed = packed_model.forward_all(packed_model.new_cache(64), ids)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.3


def stored(model: Model, method: Method, ids: list[int]) -> tuple[torch.Tensor, list[Any]]:
    """Return the logits after a prompt, its blocks settled as in a cold request; and the blocks."""
    sequence = new_sequence(model, method, ids)
    until = (len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    for _ in sequence.compute(until):
        pass
    sealed = sequence.seal(0, until // BLOCK_TOKENS)
    sequence.settle(sealed)
    logits, _ = sequence.extend(sequence.token_ids[until:])
    return logits, sealed


ZIPVL = Pipeline(attention=ZipVL(min_tokens=64))
METHODS = {
    "exact": Method(ExactCodec()),
    "fallback": Method(FallbackCodec()),
    "zipvl": Method(FallbackCodec(), pipeline=ZIPVL),
}


@FAMILY
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pooled", [False, True])
def test_cold_and_warm_requests_agree_bit_for_bit(
    family: str, name: str, pooled: bool, models: dict[str, Model]
) -> None:
    model, method, image = models[family], METHODS[name], picture(2)
    ids = prompt_with(model, image)
    pool = KVPool(model, 8 << 20) if pooled else None
    with model.images.hold([image]):
        cold, sealed = stored(model, method, ids)
        assert sealed
        warm = new_sequence(model, method, ids, pool=pool)
        frames = [{s: Frame.open(f) for s, f in b.frames.items()} for b in sealed]
        loaded = warm.load(frames)
        assert (loaded.num_blocks, loaded.reason) == (len(sealed), None)
        logits, _ = warm.extend(ids[warm.cache.length :])
    if pooled:  # pages are attended in another order of summation
        torch.testing.assert_close(logits, cold, atol=1e-4, rtol=0)
    else:
        assert torch.equal(logits, cold)


def test_layer_0_of_blocks_with_images_is_recomputed_from_the_image(llava: Model) -> None:
    image = picture(3)
    ids = prompt_with(llava, image)
    with llava.images.hold([image]):
        cache = llava.new_cache(256)
        llava.forward(cache, ids)
        keys, values = llava.first_layer_kv(ids[40:90], 40)
    own_keys, own_values = cache.read(40, 90)
    torch.testing.assert_close(keys, own_keys[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(values, own_values[0], atol=1e-6, rtol=0)


def test_an_image_that_is_not_held_is_no_token(llava: Model) -> None:
    ids = tokens_of(llava, picture(4))
    with pytest.raises(ValueError, match="16 tokens are of images that are not held"):
        llava.forward(llava.new_cache(64), ids)
    with pytest.raises(ValueError, match="token ids must be in"):
        llava.forward(llava.new_cache(64), [1 << 40])


def test_images_are_seen_once_and_the_oldest_idle_ones_are_forgotten(llava: Model) -> None:
    images = HeldImages(llava.vision)
    first = picture(0)
    ids = tokens_of(llava, first)
    with images.hold([first, first]), images.hold([first]):
        assert images.num_seen == 1
        words, rows = images.split([9, *ids])
        assert words == [9] + [0] * len(ids)
        assert rows is not None
        assert rows.at.tolist() == list(range(1, 1 + len(ids)))
        for seed in range(1, MAX_IDLE + 2):
            with images.hold([picture(seed)]):
                pass
        assert images.split(ids)[1] is not None  # held, however many came after it
    with images.hold([picture(1)]):  # the oldest of those that nobody holds
        assert images.num_seen == MAX_IDLE + 3
    assert images.split([1, 2]) == ([1, 2], None)


def test_equal_tokens_around_another_image_share_the_blocks_before_it_alone(llava: Model) -> None:
    ids = [prompt_with(llava, picture(seed)) for seed in (5, 5, 6)]
    hashes = [RunningSequence(llava, METHODS["exact"], each).hashes for each in ids]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])  # the image begins in the first block
    late = [WORDS[:70] + each for each in ids]
    hashes = [RunningSequence(llava, METHODS["exact"], each).hashes for each in late]
    assert hashes[0][0] == hashes[2][0]
    assert not set(hashes[0][1:]) & set(hashes[2][1:])


def test_the_processor_and_the_tower_are_part_of_the_fingerprint(
    folders: dict[str, Path], llava: Model, tmp_path: Path
) -> None:
    for file in folders["llava"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "preprocessor_config.json"
    text = settings.read_text()
    assert '"do_normalize": true' in text
    settings.write_text(text.replace('"do_normalize": true', '"do_normalize": false'))
    assert Model.load(str(tmp_path), device="cpu").fingerprint != llava.fingerprint
    settings.write_text(text)
    assert Model.load(str(tmp_path), device="cpu").fingerprint == llava.fingerprint


def test_qwen2_vl_is_refused_by_its_positions() -> None:
    with pytest.raises(UnsupportedModelError, match="three-dimensional positions"):
        check_config(transformers.Qwen2VLConfig(), "some/qwen2-vl")
