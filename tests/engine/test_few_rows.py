"""Steps of few rows run in compiled code, and give what the packed decoder gives without it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvstrata.engine import Model
from kvstrata.engine.batch import Span
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.packed_linear import PackedLinear
from kvstrata.engine.sequence import RunningSequence
from kvstrata.kernels import few_rows
from tests.engine.conftest import build_tokenizer
from tests.engine.families import build_reference
from tests.engine.test_sequence import LOSSLESS

# The vocabulary fills its last block of 64 outputs in part.
SIZES: dict[str, Any] = {
    "vocab_size": 112,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "llama with biases": lambda **sizes: transformers.LlamaConfig(
        **sizes, attention_bias=True, mlp_bias=True
    ),
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
IDS = torch.randint(3, 112, (60,), generator=torch.Generator().manual_seed(2)).tolist()
has_pairs = few_rows._function(torch.bfloat16) is not None
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not has_pairs, reason="needs AVX512-BF16")
    ),
]

pytestmark = pytest.mark.skipif(
    few_rows._function(torch.float32) is None, reason="needs torch with GNU's OpenMP"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, config in CONFIGS.items():
        model = build_reference(config(**SIZES))
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter)
        found[name] = tmp_path_factory.mktemp("model")
        model.save_pretrained(found[name])
        build_tokenizer().save_pretrained(found[name])
    return found


def load(folder: Path, dtype: torch.dtype) -> Model:
    model = Model.load(str(folder), dtype=dtype, device="cpu")
    assert model.pack()
    assert model._decoder is not None
    assert model._decoder._few_rows is not None
    return model


def plainly(model: Model) -> None:
    """Let it run without compiled code for few rows."""
    assert model._decoder is not None
    model._decoder._few_rows = None


def run(model: Model, count: int, unwanted: int = -1) -> torch.Tensor:
    """Return logits of three steps of some sequences, each with a past of its own length."""
    caches = [model.new_cache(32) for _ in range(count)]
    for i, cache in enumerate(caches):
        model.forward(cache, IDS[: 20 + i])
    steps = []
    for step in range(3):
        spans = [Span(c, [IDS[30 + i + step]], i != unwanted) for i, c in enumerate(caches)]
        steps.append(model.forward_batch(spans))
    return torch.stack(steps, 1)


@pytest.fixture(params=[1, 2, 5])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_packed_decoder(
    family: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    quick, plain = (load(folders[family], dtype) for _ in range(2))
    plainly(plain)
    for count in (1, 2, 3, 7, few_rows.MAX_ROWS):
        got, wanted = run(quick, count, 1), run(plain, count, 1)
        assert got.shape == wanted.shape
        if dtype == torch.float32:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        else:
            assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_gets_the_same_numbers_in_any_company_on_any_number_of_threads(
    num_threads: int, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    model = load(folders["qwen3"], dtype)
    many = run(model, 15)
    torch.set_num_threads(2)
    for count in (1, 2, 6, 9):
        assert torch.equal(run(model, count), many[:count])


@pytest.mark.parametrize("family", ["llama with biases", "qwen3"])
@pytest.mark.parametrize("skipped", [(1,), (0,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_layers_that_all_pass_by_are_left_out(
    family: str, skipped: tuple[int, ...], folders: dict[str, Path]
) -> None:
    quick, plain = (load(folders[family], torch.float32) for _ in range(2))
    plainly(plain)
    nobody = torch.empty(0, dtype=torch.int64)
    rows = [nobody if layer in skipped else None for layer in range(3)]
    found = []
    for model in (quick, plain):
        pool = KVPool(model, 1 << 20)
        caches = [RunningSequence(model, LOSSLESS, IDS[:20], pool=pool).cache for _ in range(3)]
        for i, cache in enumerate(caches):
            model.forward_batch([Span(cache, IDS[: 10 + i])])
        found.append(
            torch.stack(
                [
                    model.forward_batch([Span(c, [IDS[30 + step]], True, rows) for c in caches])
                    for step in range(2)
                ]
            )
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_nobody_may_want_logits(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], torch.float32)
    spans = [Span(model.new_cache(8), IDS[:2], wants_logits=False)]
    assert model.forward_batch(spans).shape == (0, 112)
    assert spans[0].cache.length == 2


def test_a_weight_that_lies_otherwise_is_not_read() -> None:
    weight = torch.randn(80, 64)
    packed = PackedLinear([weight], [None])
    assert packed.blocked is not None
    assert few_rows.blocked_weight(weight + 1, packed.blocked.packed, None) is None
    assert few_rows.blocked_weight(weight[:48], packed.blocked.packed, None) is None
    assert PackedLinear([torch.randn(80, 40)], [None]).blocked is None
    assert PackedLinear([torch.randn(79, 64)], [None]).blocked is None


@pytest.mark.parametrize("changed", [{"head_dim": 16}, {"intermediate_size": 200}], ids=str)
def test_models_of_other_sizes_run_without_it(changed: dict[str, int], tmp_path: Path) -> None:
    build_reference(transformers.LlamaConfig(**SIZES | changed)).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = Model.load(str(tmp_path), dtype=torch.float32, device="cpu")
    assert model.pack()
    assert model._decoder is not None
    assert model._decoder._few_rows is None
    assert model.forward(model.new_cache(8), IDS[:1]).shape == (112,)
