"""The pool, its passes and its blocks on a device: a stand-in for a GPU, with the Triton kernels.

What is computed there must be what the CPU computes, up to rounding, and nothing may be handed to
an operation from the other side. See ``stand_in`` for what this shows and what it does not.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from kvstrata.engine import Model
from kvstrata.engine.kv_pool import KVPool
from kvstrata.kernels import decoder_ops
from kvstrata.methods.presets import Method
from tests.engine.calibrating import profile_of
from tests.engine.conftest import build_tokenizer
from tests.engine.families import _GATED, build_reference
from tests.engine.stand_in import DEVICE, DeviceTensor, stand_in
from tests.engine.test_calibrated_sequence import method_of
from tests.engine.test_paged_cache import start
from tests.engine.test_sequence import BALANCED, LOSSLESS, greedy, prompt_of, tail

KINDS = ["exact", "fallback", "pre", "frame"]
POOL_BYTES = 1 << 20
interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
pytestmark = interpreted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    sizes = _GATED | {"num_hidden_layers": 2, "head_dim": 32}
    build_reference(transformers.LlamaConfig(**sizes)).save_pretrained(found)
    build_tokenizer().save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def host(folder: Path) -> Model:
    model = Model.load(str(folder), dtype=torch.float32, device="cpu")
    return model


@pytest.fixture(scope="module")
def methods(host: Model) -> dict[str, Method]:
    profile = profile_of(host)
    found = {form: method_of(profile, form) for form in ("pre", "frame")}
    assert host.pack()
    return found | {"exact": LOSSLESS, "fallback": BALANCED}


@pytest.fixture
def device(
    folder: Path, host: Model, methods: dict[str, Method], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Model]:
    # Norms, rotation by row and the gate have tests of their own, and take most of the time.
    monkeypatch.setattr(decoder_ops, "backend_of", lambda *_: "reference")
    with stand_in(monkeypatch):
        model = Model.load(str(folder), dtype=torch.float32, device=DEVICE)
        assert model.pack()
        yield model


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 5e-3) -> None:
    """Compare logits, whose largest are about 50."""
    torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_generates_what_it_does_on_the_cpu(
    host: Model, device: Model, methods: dict[str, Method], kind: str
) -> None:
    """A prompt in chunks, blocks sealed, settled and read in place, and one that fills."""
    prompt = prompt_of(126)
    wanted, sealed = start(host, methods[kind], prompt, KVPool(host, POOL_BYTES, max_sequences=4))
    pool = KVPool(device, POOL_BYTES, max_sequences=4)
    assert isinstance(pool.arena.memory, DeviceTensor)
    got, again = start(device, methods[kind], prompt, pool)
    assert len(sealed) == len(again) == 1
    logits, expected = tail(got), tail(wanted)
    assert_near(logits, expected)
    tokens, expected, filled = greedy(wanted, expected, 4)
    found, logits, refilled = greedy(got, logits, 4)
    assert found == tokens
    assert_near(logits, expected)
    assert [b.identity for b in refilled] == [b.identity for b in filled]
    pool.check_integrity()
