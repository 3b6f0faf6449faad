"""Passes by CUDA graphs, of a stand-in, give the logits of passes without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvstrata.engine import Model
from kvstrata.engine.batch import Span
from kvstrata.engine.step_graphs import StepGraphs
from tests.engine.conftest import build_tokenizer
from tests.engine.fake_cuda import FakeGraphs, graphs_gpu
from tests.engine.families import VOCAB_SIZE, build_reference

__all__ = ["graphs_gpu"]
CPU = torch.device("cpu")
# No multiples of 16: compiled kernels go past what the stand-in sees.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=10),
}
LENGTHS = (5, 17, 1, 30, 9)


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    build_reference(CONFIGS[request.param]()).save_pretrained(made)
    build_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> Model:
    return load(folder, None)


def load(folder: Path, graphs: StepGraphs | None) -> Model:
    model = Model.load(str(folder), dtype=torch.float32, device="cpu")
    assert model.pack(graphs)
    return model


def tokens(seed: int, count: int) -> list[int]:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (count,), generator=made).tolist()


class Batch:
    """Sequences that both models hold; each step gives both the same tokens."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models
        self._caches: list[list[Any]] = [[] for _ in models]
        self._seed = 100

    def join(self, length: int) -> None:
        self._seed += 1
        for model, caches in zip(self._models, self._caches, strict=True):
            caches.append(model.new_cache(64))
            model.forward(caches[-1], tokens(self._seed, length))

    def leave(self, index: int) -> None:
        for caches in self._caches:
            del caches[index]

    def step(self, extra: int = 0) -> None:
        """Run a token of each, and a chunk of ``extra`` tokens of the last; compare."""
        self._seed += 1
        count = len(self._caches[0])
        ids = [tokens(self._seed * 10 + i, 1) for i in range(count)]
        ids[-1] += tokens(self._seed, extra)
        wanted, found = (
            model.forward_batch([Span(c, own) for c, own in zip(caches, ids, strict=True)])
            for model, caches in zip(self._models, self._caches, strict=True)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.argmax(1), wanted.argmax(1))


def test_batches_that_grow_and_shrink_get_the_logits_of_passes_without(
    folder: Path, plain: Model, graphs_gpu: FakeGraphs
) -> None:
    graphs = StepGraphs(CPU, sizes=(1, 2, 4, 8))
    batch = Batch([plain, load(folder, graphs)])
    for length in LENGTHS:
        batch.join(length)
        batch.step()
        batch.step()
        batch.step()
    for index in (3, 0, 0, 1):
        batch.step()
        batch.leave(index)
        batch.step()
        batch.step(extra=2)
    replayed = graphs.counts["graph_passes"]
    assert replayed > 15
    assert graphs.counts["graph_warm_ups"] == 4  # one per size
    assert graphs.counts["graph_captures"] == graphs_gpu.num_captures == 4 * 4
    assert graphs_gpu.num_replays == 4 * replayed
    assert not graphs.counts["graph_failures"]


def test_a_size_that_cannot_be_captured_runs_without(
    folder: Path, plain: Model, graphs_gpu: FakeGraphs, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = StepGraphs(CPU, sizes=(1, 2))
    model = load(folder, graphs)
    batch = Batch([plain, model])
    batch.join(9)
    batch.join(9)
    graphs_gpu.refused = {torch.ops.aten.silu.default}  # in each layer's second half
    for _ in range(4):
        batch.step()
    graphs_gpu.refused = set()
    assert graphs.counts["graph_captures"] == 1  # what comes before the first attention
    assert graphs.counts["graph_failures"] == 1
    assert graphs.counts["graph_failed_passes"] == 3
    assert caplog.text.count("passes run without CUDA graphs") == 1
    batch.leave(0)
    for _ in range(3):  # other sizes are not concerned
        batch.step()
    assert graphs.counts["graph_passes"] == 2


def test_a_capture_does_not_wait_for_a_gpu_that_is_stuck(
    folder: Path, plain: Model, graphs_gpu: FakeGraphs
) -> None:
    graphs = StepGraphs(CPU, sizes=(1,), timeout_s=0.05)
    batch = Batch([plain, load(folder, graphs)])
    batch.join(9)
    batch.step()
    graphs_gpu.is_stuck = True
    batch.step()
    assert graphs.counts["graph_failures"] == 1
    assert not graphs_gpu.num_captures


def test_a_pass_that_ends_in_the_middle_leaves_the_next_ones_right(
    folder: Path, plain: Model, graphs_gpu: FakeGraphs
) -> None:
    """Whether it was to warm up, to capture or to replay."""
    graphs = StepGraphs(CPU, sizes=(1, 2))
    model = load(folder, graphs)
    batch = Batch([plain, model])
    batch.join(9)
    batch.join(3)

    class Failing:
        """A cache of which attention fails in the second layer."""

        length = 4

        def begin(self, num_tokens: int, rows: Any = ()) -> Any:
            return self

        def rows(self, layer: int) -> None:
            return None

        def attend(self, layer: int, queries: torch.Tensor, *_: Any) -> torch.Tensor:
            if layer == 1:
                raise RuntimeError("no attention")
            return queries

        def advance(self, num_tokens: int) -> None:
            raise AssertionError

    for _ in range(4):
        with pytest.raises(RuntimeError, match="no attention"):
            model.forward_batch([Span(Failing(), [5, 6])])
        batch.step()
    assert graphs.counts["graph_passes"] == 3
    assert graphs.counts["graph_captures"] == 4


def test_what_graphs_do_not_serve_runs_without_and_is_counted(
    folder: Path, plain: Model, graphs_gpu: FakeGraphs
) -> None:
    graphs = StepGraphs(CPU, sizes=(1, 2))
    model = load(folder, graphs)
    ids = tokens(1, 12)
    wanted = plain.forward(plain.new_cache(16), ids)
    torch.testing.assert_close(
        model.forward(model.new_cache(16), ids), wanted, rtol=1e-4, atol=1e-4
    )
    assert graphs.counts == {"graph_too_long": 1}
    rows = [None, torch.arange(0), None]
    caches = [own.new_cache(16) for own in (plain, model)]
    a, b = (
        own.forward(cache, ids[:1], rows) for own, cache in zip((plain, model), caches, strict=True)
    )
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert graphs.counts == {"graph_too_long": 1, "graph_layers": 1}


def test_a_processor_has_no_graphs() -> None:
    assert StepGraphs.of(CPU) is None
