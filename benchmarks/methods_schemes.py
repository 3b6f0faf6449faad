"""Ways to keep less of a prompt's KV: the papers' stages, alone and with a codec, and their peers.

A scheme gets a prompt that was run once, uncompressed, with the queries of all its rows, and gives
back the cache that its continuation is run on. Sizes: bf16 for what is kept as it is, stored frames
for what is coded, and one bit per token and head where a scheme keeps some tokens and not others.

Legend: L layers, H KV heads, n tokens of the prompt.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from codec_schemes import Prefilled, ProbedCache, Scheme, Stored

from kvstrata.engine.attention import AttendOver
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.kept_cache import KeptCache
from kvstrata.engine.model import Model
from kvstrata.engine.selecting_sequence import SelectingSequence
from kvstrata.engine.sequence import PROBE_FRACTION, RunningSequence
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.gate_weights import GateWeights
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import PUBLISHED as ZIPCACHE
from kvstrata.methods.presets import Method
from kvstrata.methods.token_scores import TokenScores, largest
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.methods.zipvl import Rest, ZipVL
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS

BF16_BITS = 16
PUBLISHED = ZipCacheCodec(ZIPCACHE)
SINKS = 4


@dataclass(frozen=True, slots=True)
class Observed(Prefilled):
    """A prompt whose every row was asked.

    Attributes:
        scores: Of all rows.
        peer_scores: By name, float (L, H, n), larger is kept: what other projects make of it.
        gates: float (L, H, n), larger is kept; None where the model has no gates.
    """

    scores: TokenScores
    peer_scores: dict[str, torch.Tensor] = field(default_factory=dict)
    gates: torch.Tensor | None = None

    @classmethod
    def observe(cls, model: Model, ids: list[int]) -> "Observed":
        """Run the model over ``ids`` and score all tokens by all rows."""
        sequence = RunningSequence(model, Method(ExactCodec()), ids)
        cache = ProbedCache(sequence.cache, torch.arange(len(ids)))
        sequence.cache = cache
        for _ in sequence.compute(len(ids)):
            pass
        keys = cache.read(0, len(ids))[0]
        scores = TokenScores.of(cache.queries, cache.positions, keys, model.attention_scaling)
        return cls(model, ids, cache, scores, gates=_gates(model, ids))

    def scores_of(self, rows: torch.Tensor | None) -> TokenScores:
        """Return the scores by some of the rows; by the last 10 % for None, as without stages."""
        num_tokens = len(self.ids)
        if rows is None:
            rows = torch.arange(num_tokens - int(num_tokens * PROBE_FRACTION) - 1, num_tokens)
        if len(rows) == num_tokens:
            return self.scores
        keys = self.cache.read(0, num_tokens)[0]
        asked = self.cache.queries[:, :, rows]
        return TokenScores.of(asked, rows, keys, self.model.attention_scaling)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (L, H, n)."""
        layers, heads, num_tokens = self.scores.saliency.shape
        return layers, heads, num_tokens


@torch.inference_mode()
def _gates(model: Model, ids: list[int]) -> torch.Tensor | None:
    """Return what the model's gates say of tokens that all attend to each other."""
    if model.gates is None:
        return None
    noting = _Noting(model.gates)
    model.forward_through(noting, ids, num_logits=1)
    return torch.stack(noting.found)


class _Noting(AttendOver):
    """The state of a normal pass that writes down what gates say of its tokens."""

    def __init__(self, gates: GateWeights) -> None:
        super().__init__(lambda *given: given[2:])
        self._gates = gates
        self.found: list[torch.Tensor] = []

    def observe(self, layer: int, hidden: torch.Tensor) -> None:
        """Note a layer's gates, (H, n)."""
        self.found.append(self._gates.gate_of(layer, hidden).T)


class MethodScheme(Protocol):
    """A way to keep less of a prompt's KV."""

    name: str
    peer: bool
    budget: float

    def store(self, prompt: Observed) -> Stored:
        """Return the cache that is left, and its size."""
        ...


Choose = Callable[[Observed], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Evicted:
    """Some tokens as they are, and nothing of the others.

    Attributes:
        name: For the tables.
        budget: Share of tokens kept.
        choose: A prompt to the tokens kept, bool (L, H, n).
        peer: Whether it is not ours.
    """

    name: str
    budget: float
    choose: Choose
    peer: bool = True

    def store(self, prompt: Observed) -> Stored:
        """Keep; see ``MethodScheme.store``."""
        start = time.perf_counter()
        kept = self.choose(prompt)
        cache = KeptCache(prompt.cache, kept)
        seconds = time.perf_counter() - start
        marks = kept.numel() if not kept.all() else 0
        width = 2 * prompt.model.spec.head_dim * BF16_BITS
        return Stored(cache, int(kept.sum()) * width + marks, seconds, 0.0)


@dataclass(frozen=True, slots=True)
class Coded:
    """Some tokens in the frames of a codec, and nothing of the others.

    Attributes:
        name: For the tables.
        budget: Share of tokens kept.
        method: The codec.
        choose: As in ``Evicted``; None keeps all.
    """

    name: str
    budget: float
    method: Method
    choose: Choose | None = None
    peer: bool = False

    def store(self, prompt: Observed) -> Stored:
        """Seal what is kept and read it back; see ``MethodScheme.store``.

        Raises:
            RuntimeError: The codec refused the values, or a block could not be read back.
        """
        num_blocks = len(prompt.ids) // BLOCK_TOKENS
        start = time.perf_counter()
        writer = SelectingSequence(prompt.model, self.method, prompt.ids)
        writer.cache = prompt.cache
        writer.kept = None if self.choose is None else self.choose(prompt)
        if self.method.codec.first_layer and writer.kept is not None:
            writer.kept[: self.method.codec.first_layer] = True  # recomputed from token ids
        writer.scores = prompt.scores_of(self.method.pipeline.probes(len(prompt.ids)))
        blocks = writer.seal(0, num_blocks)
        encode_s = time.perf_counter() - start
        reader = SelectingSequence(prompt.model, self.method, [*prompt.ids, 0])
        start = time.perf_counter()
        loaded = reader.load(
            [{s: Frame.open(b.frames[s]) for s in self.method.wanted} for b in blocks]
        )
        decode_s = time.perf_counter() - start
        if len(blocks) < num_blocks or loaded.num_blocks < num_blocks:
            raise RuntimeError(f"{self.name}: {len(blocks)} encoded, {loaded} read back")
        num_bits = 8 * sum(block.num_bytes for block in blocks)
        cache: SequenceCache | KeptCache = reader._dense
        if reader.kept is not None:
            cache = KeptCache(reader._dense, reader.kept)
        return Stored(cache, num_bits, encode_s, decode_s)


@dataclass(frozen=True, slots=True)
class Unbudgeted:
    """A scheme of ``bench_codec.py``, which keeps all tokens."""

    scheme: Scheme
    budget: float = 1.0

    @property
    def name(self) -> str:
        """The scheme's name."""
        return self.scheme.name

    @property
    def peer(self) -> bool:
        """Whether it is not ours."""
        return self.scheme.peer

    def store(self, prompt: Observed) -> Stored:
        """Encode and read back; see ``MethodScheme.store``."""
        return self.scheme.store(prompt)


@dataclass(frozen=True, slots=True)
class Sparse:
    """ZipVL: the prompt is run again, attending to what matters; K and V stay as they are.

    Attributes:
        stage: Its settings.
        budget: Its tau, in place of a share of tokens, which it finds itself.
    """

    stage: ZipVL
    budget: float
    peer: bool = False

    @property
    def name(self) -> str:
        """Which of the two versions it is."""
        return "zipvl" if self.stage.rest == "low_bit" else "zipvl evict"

    def store(self, prompt: Observed) -> Stored:
        """Run the prompt and drop what did not matter; see ``MethodScheme.store``."""
        method = Method(PUBLISHED, pipeline=Pipeline.of(self.stage))
        sequence = SelectingSequence(prompt.model, method, prompt.ids)
        start = time.perf_counter()
        for _ in sequence.compute(len(prompt.ids)):
            pass
        seconds = time.perf_counter() - start
        kept = (
            torch.ones(prompt.shape, dtype=torch.bool) if sequence.kept is None else sequence.kept
        )
        width = 2 * prompt.model.spec.head_dim * BF16_BITS
        marks = 0 if kept.all() else kept.numel()
        cache = KeptCache(sequence._dense, kept)
        return Stored(cache, int(kept.sum()) * width + marks, seconds, 0.0)


@dataclass(frozen=True, slots=True)
class Gated:
    """Attention-Gate as it is served: the prompt is run again, and gates act before attention.

    Attributes:
        method: The preset: its gates, and a codec that says which layers are not gated.
        budget: What the gates were trained to keep.
    """

    method: Method
    budget: float
    name: str = "attention-gate"
    peer: bool = False

    def store(self, prompt: Observed) -> Stored:
        """Run the prompt and drop what its gates drop; see ``MethodScheme.store``."""
        num_blocks = (len(prompt.ids) - 1) // BLOCK_TOKENS
        sequence = SelectingSequence(prompt.model, self.method, prompt.ids)
        start = time.perf_counter()
        for _ in sequence.compute(num_blocks * BLOCK_TOKENS):
            pass
        sequence.extend(prompt.ids[num_blocks * BLOCK_TOKENS :])
        seconds = time.perf_counter() - start
        assert sequence.selected is not None
        kept = sequence.kept_fraction * prompt.scores.saliency.numel()
        width = 2 * prompt.model.spec.head_dim * BF16_BITS
        return Stored(
            sequence.selected, round(kept) * width + prompt.scores.saliency.numel(), seconds, 0.0
        )


def everything(prompt: Observed) -> torch.Tensor:
    """Return all tokens."""
    return torch.ones(prompt.shape, dtype=torch.bool)


def by_gate(budget: float) -> Choose:
    """Return what gates value most in each head, and the sinks.

    Half of the budget is what is recent, as H2O's is: gates do not know where a prompt ends.
    """

    def choose(prompt: Observed) -> torch.Tensor:
        assert prompt.gates is not None
        num_tokens = len(prompt.ids)
        order = prompt.gates.clone()
        order[..., :SINKS] = 2.0
        order[..., num_tokens - int(num_tokens * budget / 2) :] = 2.0
        return largest(order, int(num_tokens * budget + 1e-9))

    return choose


def sparse(tau: float, rest: Rest) -> Sparse:
    """Return ZipVL at ``tau``."""
    return Sparse(ZipVL(tau=tau, rest=rest), tau)


def h2o(stage: H2O) -> Choose:
    """Return what H2O keeps of a prompt by the scores of all of its rows."""

    def choose(prompt: Observed) -> torch.Tensor:
        num_tokens = len(prompt.ids)
        return stage.keep(
            prompt.scores.accumulated(), torch.arange(num_tokens), stage.seats(num_tokens)
        )

    return choose


def by_peer(name: str, budget: float) -> Choose:
    """Return the highest scores of a peer, as many per head as the budget gives."""

    def choose(prompt: Observed) -> torch.Tensor:
        return largest(prompt.peer_scores[name], int(len(prompt.ids) * budget + 1e-9))

    return choose


def by_chance(budget: float, seed: int) -> Choose:
    """Return tokens at random, the sinks always."""

    def choose(prompt: Observed) -> torch.Tensor:
        draw = torch.rand(prompt.shape, generator=torch.Generator().manual_seed(seed))
        draw[..., :SINKS] = 2.0
        return largest(draw, int(len(prompt.ids) * budget + 1e-9))

    return choose


def evenly(budget: float) -> Choose:
    """Return tokens at equal distances, and the sinks."""

    def choose(prompt: Observed) -> torch.Tensor:
        num_tokens = len(prompt.ids)
        count = int(num_tokens * budget + 1e-9) - SINKS
        places = torch.linspace(SINKS, num_tokens - 1, max(count, 1)).round().long()
        kept = torch.zeros(num_tokens, dtype=torch.bool)
        kept[:SINKS] = True
        kept[places] = True
        return kept.expand(prompt.shape).clone()

    return choose
