"""The pool, its passes and its blocks on a device: a stand-in for a GPU, with the Triton kernels.

What is computed there must be what the CPU computes, up to rounding, and nothing may be handed to
an operation from the other side. See ``stand_in`` for what this shows and what it does not.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from kvstrata.engine import Model
from kvstrata.engine.batch import Span
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.paged_states import StepState
from kvstrata.engine.sequence import RunningSequence
from kvstrata.engine.step_loop import StepLoop
from kvstrata.kernels import decoder_ops
from kvstrata.methods.presets import Method
from tests.engine.calibrating import profile_of
from tests.engine.conftest import build_tokenizer
from tests.engine.families import _GATED, build_reference
from tests.engine.stand_in import DEVICE, DeviceTensor, crossings, stand_in
from tests.engine.test_calibrated_sequence import method_of
from tests.engine.test_paged_cache import paged, start
from tests.engine.test_sequence import BALANCED, LOSSLESS, greedy, opened, prompt_of, tail
from tests.engine.test_step_loop import Client, gathered

KINDS = ["frame", *(pytest.param(k, marks=pytest.mark.long) for k in ("exact", "fallback", "pre"))]
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


@pytest.mark.parametrize("kind", ["fallback", "pre"])
def test_stored_blocks_give_what_they_give_on_the_cpu(
    host: Model, device: Model, methods: dict[str, Method], kind: str
) -> None:
    """All of a prompt in blocks, so that its last token runs once more; then a step of two."""
    method, prompt = methods[kind], prompt_of(64)
    _, sealed = start(host, method, [*prompt, 3], None)
    logits: list[torch.Tensor] = []
    for model in (host, device):
        pool = KVPool(model, POOL_BYTES, max_sequences=4)
        both = [RunningSequence(model, method, prompt, pool=pool) for _ in range(2)]
        found = []
        for sequence in both:
            assert sequence.load(opened(sealed, method.wanted)).num_blocks == 1
            found.append(model.forward_batch([sequence.next_span(1)]).cpu())
            sequence.fill()
            sequence.token_ids.append(5)
        found.append(model.forward_batch([sequence.next_span(1) for sequence in both]).cpu())
        logits.append(torch.cat(found))
        for sequence in both:
            paged(sequence).close()
        pool.check_integrity()
        assert pool.arena.used_bytes == 0
    assert_near(logits[1], logits[0])
    assert torch.equal(logits[1].argmax(1), logits[0].argmax(1))


class Parked(Client):
    """Loses its memory once, in mid-run."""

    def choose(self, logits: torch.Tensor) -> int | None:
        stepper = self.steps._stepper
        if len(self.tokens) == 2 and not self.parked:
            seat = next(s for s in stepper._seats.values() if s.order == self.order)
            self.steps._post(lambda: stepper._park(seat))
        return super().choose(logits)


async def test_the_step_loop_parks_and_goes_on_as_on_the_cpu(
    host: Model, device: Model, methods: dict[str, Method]
) -> None:
    """Prompts, steps of two methods together, and one that comes back from its stored blocks."""
    found = []
    for model in (host, device):
        steps = StepLoop(model, KVPool(model, POOL_BYTES, max_sequences=4))
        kinds = {"frame": Parked, "exact": Client}
        clients = [
            make(steps, methods[kind], prompt_of(66, seed=seed), count=5)
            for seed, (kind, make) in enumerate(kinds.items())
        ]
        try:
            found.append(await gathered(*clients))
        finally:
            await asyncio.to_thread(steps.stop)
        assert [client.parked for client in clients] == [1, 0]
        steps.pool.check_integrity()
        assert steps.pool.arena.used_bytes == 0
    assert found[1] == found[0]


def test_what_a_step_brings_over_does_not_depend_on_its_layers(
    device: Model, methods: dict[str, Method]
) -> None:
    """Of rows in pages: tables, slots and tokens go over once, and only logits come back."""
    pool = KVPool(device, POOL_BYTES, max_sequences=4)
    sequence = RunningSequence(device, methods["exact"], [5, 6, 7], pool=pool)
    device.forward_batch([sequence.prompt_span(2, 2)])
    device.forward_batch([Span(sequence.cache, [7])])
    state = StepState([paged(sequence)], [()])
    paged(sequence).reserve(1)
    spec = device.spec
    queries, keys = (torch.randn(n, 1, spec.head_dim) for n in (spec.num_heads, spec.num_kv_heads))
    own = queries.to(DEVICE), keys.to(DEVICE), keys.to(DEVICE)
    counts = []
    for layer in range(spec.num_layers):
        before = crossings.copy()
        state.attend(layer, *own, 0.2)
        counts.append(sum((crossings - before).values()))
    assert counts[0] > 0
    assert set(counts[1:]) == {0}
