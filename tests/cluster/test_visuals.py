"""Pictures and videos on their way from the client to the model, and those that are refused."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PillowImage

from kvstrata.client import AsyncClient
from kvstrata.cluster.visuals import MAX_REQUEST_PIXELS, place_visuals
from kvstrata.engine.images import Image
from kvstrata.prefill_node.worker import WorkerInfo
from kvstrata.protos.errors import (
    EmptyVideoError,
    ImageCountError,
    ImageError,
    KVStrataError,
    PromptTooLongError,
    TextOnlyModelError,
)
from kvstrata.protos.identity import image_token_ids
from kvstrata.protos.inference_pb2 import GenerateRequest, Picture, Video, Visual
from tests.cluster.local_workers import Cluster
from tests.engine.vision_families import IMAGE_ID, NUM_TOKENS, picture, save_vision_model

TOKENS = NUM_TOKENS["llava"]
TEXT_ONLY = WorkerInfo("tiny", b"f" * 16, "float32", 512, 320, 64, 1)
INFO = replace(TEXT_ONLY, placeholder_id=IMAGE_ID, image_tokens=TOKENS)
QUESTION = "What is to be seen here? " * 4


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nodes of this module see."""
    return save_vision_model("llava", tmp_path_factory.mktemp("llava"))


def png(image: Image) -> bytes:
    file = io.BytesIO()
    PillowImage.frombytes("RGB", (image.width, image.height), image.pixels).save(file, "PNG")
    return file.getvalue()


def raw(image: Image) -> Picture:
    return Picture(rgb=image.pixels, height=image.height, width=image.width)


def shown(*pictures: Picture) -> list[Visual]:
    return [Visual(picture=each) for each in pictures]


@pytest.fixture
def asked(cluster: Cluster) -> Iterator[Any]:
    async def ask(prompt: str, images: list[Any], **options: Any) -> Any:
        async with AsyncClient(cluster.server.address) as client:
            return await client.generate(
                prompt, images=images, max_tokens=10, ignore_eos=True, **options
            )

    return ask


@pytest.mark.parametrize("preset", ["balanced", "exact", "zipvl", "h2o"])
async def test_cold_warm_and_replayed_requests_with_images_give_the_same_tokens(
    cluster: Cluster, asked: Any, preset: str
) -> None:
    frames = [png(picture(seed)) for seed in range(14)]
    prompt = f"A picture: <image>, a video: <image>. {QUESTION}"
    images = [png(picture(20, 40, 50)), frames]
    cold = await asked(prompt, images, preset=preset)
    shareable = cold.cache.shareable_tokens
    assert cold.usage.prompt_tokens > 15 * TOKENS
    assert cold.cache.cached_tokens == 0
    assert shareable > 256
    assert len(cluster.workers.prefills) == 1
    warm = await asked(prompt, images, preset=preset)
    assert len(cluster.workers.prefills) == 1
    assert warm.token_ids == cold.token_ids
    assert warm.cache.cached_tokens == shareable
    assert (cold.cache.recomputes, warm.cache.recomputes) == ((), ())
    cluster.workers.dies_at = [4]
    replayed = await asked(prompt, images, preset=preset)
    assert replayed.token_ids == cold.token_ids
    assert replayed.cache.replays == 1


async def test_another_image_shares_no_block_that_it_touches(cluster: Cluster, asked: Any) -> None:
    prompt = f"{'x' * 100}<image> {QUESTION}"
    first = await asked(prompt, [png(picture(1))], preset="exact")
    second = await asked(prompt, [png(picture(2))], preset="exact")
    assert first.cache.shareable_tokens > 64
    assert (first.cache.cached_tokens, second.cache.cached_tokens) == (0, 64)
    again = await asked(prompt, [png(picture(1))], preset="exact")
    assert again.cache.cached_tokens == first.cache.shareable_tokens
    assert again.token_ids == first.token_ids
    later = await asked(f"{prompt} And then?", [png(picture(1))], preset="exact")
    assert later.cache.cached_tokens >= again.cache.cached_tokens


async def test_the_model_tells_its_placeholder(cluster: Cluster) -> None:
    async with AsyncClient(cluster.server.address) as client:
        found = await client.model()
    assert (found.placeholder, found.picture_tokens) == ("<image>", TOKENS)


@pytest.mark.parametrize(
    ("prompt", "images", "error", "message"),
    [
        ("no place", [png(picture(1))], ImageCountError, "0 placeholders for 1"),
        ("<image> <image>", [png(picture(1))], ImageCountError, "2 placeholders for 1"),
        ("<image>", [], ImageCountError, "1 placeholders for 0"),
        ("<image>", [[]], EmptyVideoError, "video without frames"),
        ("<image>", [b"no picture"], ImageError, "no PNG or JPEG"),
        ("<image>", [[png(picture(1))] * 40], PromptTooLongError, "take 640 tokens"),
    ],
)
async def test_bad_images_are_refused_by_name_before_any_work(
    cluster: Cluster,
    asked: Any,
    prompt: str,
    images: list[Any],
    error: type[KVStrataError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as refusal:
        await asked(prompt, images)
    assert type(refusal.value) is error
    assert refusal.value.remedy
    assert cluster.workers.decodes == []


@pytest.mark.parametrize(
    ("info", "visuals", "error", "message"),
    [
        (TEXT_ONLY, shown(raw(picture(1))), TextOnlyModelError, "reads text alone"),
        (INFO, [Visual(video=Video())], EmptyVideoError, "no frames"),
        (INFO, [Visual()], ImageError, "neither picture nor video"),
        (INFO, shown(Picture()), ImageError, "no data"),
        (INFO, shown(Picture(rgb=bytes(12), height=2, width=3)), ImageError, "18 bytes, not 12"),
        (INFO, shown(Picture(rgb=bytes(12), height=0, width=0)), ImageError, "0 x 0"),
        (
            INFO,
            shown(Picture(rgb=b"", height=2**32 - 1, width=2**32 - 1)),
            ImageError,
            "more than",
        ),
        # Told before a frame is decoded: none of these is a picture.
        (
            INFO,
            [Visual(video=Video(frames=[Picture(file=b"bad")] * 32))],
            PromptTooLongError,
            "take 512 tokens",
        ),
    ],
)
def test_visuals_that_no_model_or_not_this_one_can_see_are_refused(
    info: WorkerInfo, visuals: list[Visual], error: type[KVStrataError], message: str
) -> None:
    with pytest.raises(error, match=message):
        place_visuals([5, IMAGE_ID, 6], visuals, info)


def test_all_images_of_a_request_together_are_limited() -> None:
    file = io.BytesIO()
    PillowImage.new("L", (4096, 4096)).save(file, "PNG")  # a few kilobytes
    assert MAX_REQUEST_PIXELS == 4 * 4096 * 4096
    video = Visual(video=Video(frames=[Picture(file=file.getvalue())] * 5))
    with pytest.raises(ImageError, match="pixels in all"):
        place_visuals([IMAGE_ID], [video], INFO)


def test_each_frame_stands_for_itself_in_the_prompt() -> None:
    one, two = picture(1), picture(2)
    video = Visual(video=Video(frames=[raw(one), raw(two), raw(one)]))
    ids, images = place_visuals(
        [5, IMAGE_ID, 6, IMAGE_ID], [video, *shown(Picture(file=png(two)))], INFO
    )
    a, b = (image_token_ids(image.digest, TOKENS) for image in (one, two))
    assert ids == [5, *a, *b, *a, 6, *b]
    assert images == (one, two)  # each once
    assert place_visuals([5, 6], [], TEXT_ONLY) == ([5, 6], ())


def test_requests_without_images_are_as_they_were() -> None:
    assert GenerateRequest(text="x").SerializeToString() == b"\n\x01x"
