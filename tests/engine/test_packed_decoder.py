"""A packed model computes what the same model does in transformers."""

from pathlib import Path

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.attention import AttendOver, LayerRows, alone
from kvstrata.engine.batch import Span
from tests.engine.families import FAMILIES, VOCAB_SIZE

PROMPT = torch.randint(3, VOCAB_SIZE, (90,), generator=torch.Generator().manual_seed(1)).tolist()
PACKED = [name for name in FAMILIES if name != "opt"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return Model.load(str(folder), dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def packed(model_folders: dict[str, Path]) -> dict[str, Model]:
    models = {name: load(model_folders[name]) for name in PACKED}
    assert all(model.pack() for model in models.values())
    return models


@pytest.mark.parametrize("family", PACKED)
def test_logits_equal_those_of_transformers(
    family: str, models: dict[str, Model], packed: dict[str, Model]
) -> None:
    plain, own = models[family], packed[family]
    expected = plain.forward_all(plain.new_cache(8), PROMPT)
    torch.testing.assert_close(
        own.forward_all(own.new_cache(8), PROMPT), expected, rtol=1e-4, atol=1e-4
    )
    cache = own.new_cache(8)
    parts = [own.forward_all(cache, PROMPT[a:b]) for a, b in ((0, 1), (1, 40), (40, 41), (41, 90))]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PACKED)
def test_a_batch_gives_each_sequence_its_own(family: str, packed: dict[str, Model]) -> None:
    model = packed[family]
    prompts = [PROMPT[:1], PROMPT[3:60], PROMPT[7:9]]
    expected = [model.forward(model.new_cache(8), ids) for ids in prompts]
    spans = [Span(model.new_cache(8), ids, wants_logits=i != 1) for i, ids in enumerate(prompts)]
    torch.testing.assert_close(
        model.forward_batch(spans),
        torch.stack([expected[0], expected[2]]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_that_run_for_some_tokens_only(
    family: str, models: dict[str, Model], packed: dict[str, Model]
) -> None:
    some, none = torch.arange(2), torch.arange(0)
    for rows in ((None, some, some), (None, none, None), (some, none, none)):
        chosen: LayerRows = rows
        logits = [
            model.forward_all(model.new_cache(8), PROMPT[:4], chosen)
            for model in (models[family], packed[family])
        ]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


class Watching(AttendOver):
    """Keeps what is shown of each layer."""

    def __init__(self) -> None:
        super().__init__(alone)
        self.seen: list[torch.Tensor] = []

    def observe(self, layer: int, hidden: torch.Tensor) -> None:
        assert layer == len(self.seen)
        self.seen.append(hidden.clone())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_states_see_the_inputs_of_layers(
    family: str, models: dict[str, Model], packed: dict[str, Model]
) -> None:
    found = []
    for model in (models[family], packed[family]):
        state = Watching()
        with torch.inference_mode():
            model.forward_through(state, PROMPT[:9])
        found.append(torch.stack(state.seen))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PACKED)
def test_bf16_agrees_within_its_rounding(family: str, model_folders: dict[str, Path]) -> None:
    plain, own = (load(model_folders[family], torch.bfloat16) for _ in range(2))
    own.pack()
    wanted, got = (m.forward_all(m.new_cache(8), PROMPT) for m in (plain, own))
    assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("family", PACKED)
def test_the_first_layer_is_the_same(
    family: str, models: dict[str, Model], packed: dict[str, Model]
) -> None:
    for got, wanted in zip(
        packed[family].first_layer_kv(PROMPT, 3), models[family].first_layer_kv(PROMPT, 3),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_packing_again_changes_nothing_and_weights_are_not_held_twice(
    model_folders: dict[str, Path],
) -> None:
    model = load(model_folders["llama"])
    assert model.pack()
    assert model.pack()
    layers = model._hf_model.model.layers
    assert sum(layer.mlp.up_proj.weight.numel() for layer in layers) == 0


def test_other_families_run_in_transformers(
    model_folders: dict[str, Path], models: dict[str, Model]
) -> None:
    model = load(model_folders["opt"])
    assert not model.pack()
    torch.testing.assert_close(
        model.forward(model.new_cache(8), PROMPT),
        models["opt"].forward(models["opt"].new_cache(8), PROMPT),
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_packed_smollm2_generates_the_same_tokens(smollm2: Model) -> None:
    own = Model.load(dtype=torch.float32, device="cpu")
    own.pack()
    prompt = own.tokenizer.encode("The cache holds keys and values. " * 20)
    tokens = []
    for model in (smollm2, own):
        cache = model.new_cache(8)
        logits = model.forward(cache, prompt)
        found: list[int] = []
        for _ in range(48):
            found.append(int(logits.argmax()))
            logits = model.forward(cache, found[-1:])
        tokens.append(found)
    assert tokens[0] == tokens[1]


def test_gradients_are_refused_where_they_would_be_lost(packed: dict[str, Model]) -> None:
    model = packed["llama"]
    spec = model.spec
    rows = [torch.zeros(spec.num_kv_heads, 3, spec.head_dim)] * spec.num_layers
    assert model.continue_over(rows, rows, PROMPT[:2]).shape == (2, spec.vocab_size)
    asking = [row.clone().requires_grad_() for row in rows]
    with pytest.raises(RuntimeError, match="load it anew"):
        model.continue_over(asking, rows, PROMPT[:2])
