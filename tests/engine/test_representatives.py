"""Stored mean keys are those of the model's own keys before rotation, and a store finds by them."""

from typing import Any

import numpy as np
import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.sequence import RunningSequence
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.presets import Method
from kvstrata.methods.representatives import scores, top_blocks
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.representatives import unpack_representatives
from tests.engine.calibrating import profile_of
from tests.engine.test_sequence import (
    LOSSLESS,
    computed,
    greedy,
    loaded,
    one_thread,
    prompt_of,
    tail,
)

__all__ = ["one_thread"]
# Where a family's keys are as attention takes them but for the rotation.
LAST_BEFORE_ROPE = {
    "llama": "k_proj",
    "llama-yarn": "k_proj",
    "qwen3": "k_norm",
    "opt": "k_proj",
}


def rows_of(model: Model, frames: Any) -> dict[int, torch.Tensor]:
    """Return the representatives in a block's frames, layer to float16 (H, D)."""
    shape = (model.spec.num_kv_heads, model.spec.head_dim)
    found: dict[int, torch.Tensor] = {}
    for data in frames.values():
        for layer, row in unpack_representatives(Frame.open(data)).items():
            assert layer not in found
            found[layer] = torch.frombuffer(bytearray(row), dtype=torch.float16).view(shape)
    return found


def keys_before_rope(reference: Any, family: str, prompt: list[int]) -> list[torch.Tensor]:
    """Return every layer's keys (n, H * D), caught where transformers computes them."""
    caught: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda m, i, out: caught.append(out.flatten(2)[0].detach()))
        for name, module in reference.named_modules()
        if name.endswith(f".{LAST_BEFORE_ROPE[family]}")
    ]
    with torch.inference_mode():
        reference(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    return caught


@pytest.mark.parametrize(
    ("family", "codec"),
    [
        (family, codec)
        for family in LAST_BEFORE_ROPE
        for codec in ("exact", "fallback", "frame")
        if (family, codec) != ("opt", "frame")  # a model that does not rotate has one form
    ],
)
def test_representatives_are_the_mean_of_the_models_keys_before_rotation(
    models: dict[str, Model], references: dict[str, Any], family: str, codec: str
) -> None:
    model, prompt = models[family], prompt_of()
    if codec == "frame":
        profile = profile_of(model)
        threshold = 0.01 * float(profile.keys["frame"].variance.median())
        method = Method(CalibratedCodec(profile, threshold, "frame"), represented="all")
    else:
        kind = ExactCodec() if codec == "exact" else FallbackCodec()
        method = Method(kind, represented="all")
    _, sealed = computed(model, method, prompt)
    wanted = keys_before_rope(references[family], family, prompt)
    assert len(wanted) == model.spec.num_layers
    for block in sealed:
        begin = block.identity.first_position
        rows = rows_of(model, block.frames)
        assert list(rows) == list(range(model.spec.num_layers))
        for layer, row in rows.items():
            mean = wanted[layer][begin : begin + BLOCK_TOKENS].mean(dim=0).view(row.shape)
            torch.testing.assert_close(row.float(), mean, rtol=2e-3, atol=2e-3)


def test_only_chosen_layers_are_stored_and_cost_what_the_contract_says(
    models: dict[str, Model],
) -> None:
    model = models["llama"]
    plain, some = [
        computed(model, Method(ExactCodec(), represented=choice), prompt_of())[1][0]
        for choice in ("", "0,2")
    ]
    assert rows_of(model, plain.frames) == {}
    rows = rows_of(model, some.frames)
    assert list(rows) == [0, 2]
    row_bytes = 2 * model.spec.num_kv_heads * model.spec.head_dim
    grown = some.num_bytes - plain.num_bytes
    assert 2 * row_bytes < grown < 2 * row_bytes + 256
    assert plain.identity.scope != some.identity.scope


def test_generated_blocks_have_them_too_and_tokens_are_the_same(models: dict[str, Model]) -> None:
    model, prompt = models["llama"], prompt_of()
    method = Method(ExactCodec(), represented="all")
    results = []
    for chosen in (LOSSLESS, method):
        sequence, sealed = computed(model, chosen, prompt)
        warm = loaded(model, chosen, prompt, sealed)
        results.append(greedy(warm, tail(warm), 60))
        assert sequence.committable
    assert results[0][0] == results[1][0]
    (block,) = results[1][2]
    assert len(rows_of(model, block.frames)) == model.spec.num_layers


async def test_a_store_finds_the_blocks_that_attention_by_means_would(
    models: dict[str, Model],
) -> None:
    """The whole way: model, frames, gRPC, index, choice, against the readable reference."""
    model = models["llama"]
    method = Method(FallbackCodec(), represented="all")
    prompt = prompt_of(model.spec.max_positions - 1)
    sequence, sealed = computed(model, method, prompt)
    heads = model.spec.num_heads
    generator = np.random.default_rng(5)
    queries = [
        (layer, generator.standard_normal((heads, model.spec.head_dim)).astype(np.float32))
        for layer in range(model.spec.num_layers)
    ]
    async with LocalStore() as store, StoreClient(store.address) as client:
        await client.put([(block.identity.key, block.frames) for block in sealed])
        for cosine in (False, True):
            found = await client.retrieve(
                sequence.scope,
                sequence.hashes[: len(sealed)],
                [(layer, query.ravel().tolist()) for layer, query in queries],
                top_k=2,
                cosine=cosine,
            )
            assert (found.absent, found.unrepresented) == ((), ())
            for (layer, query), selection in zip(queries, found.selections, strict=True):
                means = torch.stack([rows_of(model, block.frames)[layer] for block in sealed])
                wanted = scores(torch.from_numpy(query), means, cosine=cosine)
                assert selection.ids == tuple(top_blocks(wanted.tolist(), top_k=2))
                chosen = wanted[list(selection.ids)]
                torch.testing.assert_close(torch.tensor(selection.scores), chosen)


def test_a_sequence_is_named_by_what_it_stores(models: dict[str, Model]) -> None:
    plain, represented = [
        RunningSequence(models["llama"], Method(ExactCodec(), represented=choice), prompt_of())
        for choice in ("", "all")
    ]
    assert plain.scope != represented.scope
    assert plain.hashes != represented.hashes
