"""A prompt's cache while the papers' stages act on it: gate, attention and score, in each layer.

It wraps the cache that holds K and V, whatever that is, and only hands on what each stage decides:
which tokens a head keeps, which matter in a layer, and how much attention they receive.

Legend: L layers, Q query heads, H KV heads, n new tokens, N tokens in all, D head_dim.
"""

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.engine.attention import AttendOver, AttentionState, LayerRows
from kvstrata.engine.batch import KVCache
from kvstrata.engine.spec import KVSpec
from kvstrata.kernels.colsum import column_sums
from kvstrata.kernels.saliency import seeing_rows
from kvstrata.methods.gate_weights import GateWeights
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.token_scores import TokenScores


class AppendingCache(KVCache, Protocol):
    """A cache that gives each layer all of its keys and values, old and new."""

    spec: KVSpec

    def append(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``SequenceCache.append``."""
        ...


class StagedCache:
    """A ``KVCache`` that runs the stages of a pipeline on what passes.

    Attributes:
        held: Where K and V are.
        kept: bool (L, H, N): what each head keeps of the tokens that have passed or were loaded;
            None for all.
        important: bool (L, N): the tokens that matter in each layer; None without that stage.
    """

    def __init__(
        self,
        held: AppendingCache,
        pipeline: Pipeline,
        kept: torch.Tensor | None = None,
        gates: GateWeights | None = None,
        first_gated_layer: int = 0,
    ) -> None:
        """Act on the tokens that follow on ``held``.

        Args:
            held: May hold tokens, of which nothing is asked any more.
            pipeline: Its gate, attention and scores.
            kept: What is kept of those tokens; None for all.
            gates: What the gate decides by; None lets all new tokens through.
            first_gated_layer: Layers before it keep all.
        """
        self.held = held
        self.gates = gates
        self.first_gated_layer = first_gated_layer
        self.kept = kept
        self.important: torch.Tensor | None = None
        self._pipeline = pipeline
        self._rows = torch.empty(0, dtype=torch.int64)
        self._sums = torch.zeros(held.spec.num_layers, held.spec.num_kv_heads, 0)
        self._passing: _StagedPass | None = None

    @property
    def length(self) -> int:
        """Tokens that have passed."""
        return self.held.length

    @length.setter
    def length(self, length: int) -> None:
        self.held.length = length

    def expect(self, num_tokens: int) -> None:
        """Choose the rows to ask among the next tokens; those asked before are forgotten."""
        rows = self._pipeline.probes(num_tokens)
        self._rows = torch.empty(0, dtype=torch.int64) if rows is None else rows + self.length
        self._sums = torch.zeros_like(self._sums[..., :0])

    def expect_all(self, num_tokens: int) -> None:
        """Ask every row of the next ``num_tokens``; those asked before are forgotten."""
        self._rows = torch.arange(self.length, self.length + num_tokens)
        self._sums = torch.zeros_like(self._sums[..., :0])

    def begin(self, num_tokens: int, rows: LayerRows = ()) -> AttentionState:
        """Return the attention of a pass; see ``KVCache``."""
        inner = self.held.begin(num_tokens, rows)
        self._passing = _StagedPass(self, inner, num_tokens)
        return self._passing

    def advance(self, num_tokens: int) -> None:
        """Count a pass, and take in what its layers found; see ``KVCache``."""
        passed, self._passing = self._passing, None
        self.held.advance(num_tokens)
        if passed is None:
            return
        if passed.sums:
            self._sums = F.pad(self._sums, (0, self.length - self._sums.shape[2]))
            for layer, sums in passed.sums.items():
                self._sums[layer, :, : sums.shape[-1]] += sums
        if passed.flags:
            spec = self.held.spec
            kept = torch.ones(spec.num_layers, spec.num_kv_heads, self.length, dtype=torch.bool)
            if self.kept is not None:
                kept[..., : self.kept.shape[2]] = self.kept
            for layer, flags in passed.flags.items():
                kept[layer, :, self.length - flags.shape[1] :] = flags
            self.kept = kept
        if passed.important:
            self.important = torch.stack([passed.important[i] for i in sorted(passed.important)])

    def scores(self) -> TokenScores | None:
        """Return how much the asked rows that have passed attend to each token, or None."""
        rows = self._rows[self._rows < self.length]
        if not len(rows):
            return None
        saliency = self._sums / seeing_rows(rows, self.length).clamp_min(1)
        return TokenScores(saliency, rows)

    def sums(self) -> torch.Tensor:
        """Return the attention that the asked rows gave each token, float32 (L, H, N).

        Summed over the rows, mean over the query heads of a group.
        """
        return F.pad(self._sums, (0, self.length - self._sums.shape[2]))

    def asked(self, first: int, last: int) -> torch.Tensor:
        """Return which rows from ``first`` to ``last`` - 1 are asked, as positions."""
        return self._rows[(self._rows >= first) & (self._rows < last)]

    def is_whole_prompt(self, num_tokens: int) -> bool:
        """Return whether the next tokens are a prompt whose attention is another's business."""
        stage = self._pipeline.attention
        return stage is not None and self.length == 0 and num_tokens >= max(2, stage.min_tokens)

    @property
    def pipeline(self) -> Pipeline:
        """The stages."""
        return self._pipeline


class _StagedPass:
    """One pass over a ``StagedCache``; what its layers find counts once the pass has succeeded."""

    def __init__(self, cache: StagedCache, inner: AttentionState, num_tokens: int) -> None:
        self._cache = cache
        self._inner = inner
        self._first = cache.length
        self._num_tokens = num_tokens
        self._rows = cache.asked(self._first, self._first + num_tokens)
        self._is_sparse = cache.is_whole_prompt(num_tokens)
        self.sums: dict[int, torch.Tensor] = {}
        self.important: dict[int, torch.Tensor] = {}
        self.flags: dict[int, torch.Tensor] = {}

    def observe(self, layer: int, hidden: torch.Tensor) -> None:
        """Let the layer's gate decide about the new tokens; see ``ObservingState``."""
        stage, gates = self._cache.pipeline.gate, self._cache.gates
        if stage is not None and gates is not None and layer >= self._cache.first_gated_layer:
            gate = gates.gate_of(layer, hidden)
            self.flags[layer] = stage.flags(gate, self._first).cpu()

    def rows(self, layer: int) -> torch.Tensor | None:
        """Return which of the new tokens run this layer; see ``AttentionState.rows``."""
        return self._inner.rows(layer)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend as the stages say, and score; see ``AttentionState.attend``."""
        stage = self._cache.pipeline.attention
        all_keys, all_values = self._cache.held.append(layer, queries, keys, values)
        kept = self._kept(layer, all_keys.shape[1])
        if self._is_sparse and stage is not None:
            found = stage.attend(queries, all_keys, all_values, scaling, kept)
            self.important[layer] = found.important
            output = found.output
        else:
            output = self._dense(queries, all_keys, all_values, kept, scaling)
        if len(self._rows):
            asked = queries[:, self._rows - self._first].contiguous()
            sums = column_sums(asked, all_keys.contiguous(), self._rows, scaling)
            self.sums[layer] = sums.unflatten(0, (len(keys), -1)).mean(1).cpu()
        return output

    def _kept(self, layer: int, num_tokens: int) -> torch.Tensor | None:
        """Return what each head keeps, bool (H, N); tokens that nobody judged are kept."""
        new = self.flags.get(layer)
        if self._cache.kept is None and new is None:
            return None
        first = num_tokens - self._num_tokens
        kept = torch.ones(self._cache.held.spec.num_kv_heads, num_tokens, dtype=torch.bool)
        if self._cache.kept is not None:
            known = self._cache.kept[layer, :, :num_tokens]
            kept[:, : known.shape[1]] = known
        if new is not None:
            kept[:, first:] = new
        return kept

    def _dense(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Return causal attention in which a row sees itself and what its head keeps."""
        num_new, num_tokens = queries.shape[1], keys.shape[1]
        if kept is None or kept.all():
            state = AttendOver(lambda *_: (keys, values))
            return state.attend(0, queries, keys[:, num_tokens - num_new :], values, scaling)
        positions = torch.arange(num_tokens, device=keys.device)
        new = positions[num_tokens - num_new :, None]
        visible = (positions <= new) & (kept.to(keys.device)[:, None] | (positions == new))
        mask = visible.repeat(1, len(queries) // len(keys), 1)  # (H, G * n, N)
        rows = queries.reshape(1, len(keys), -1, queries.shape[-1])
        output = F.scaled_dot_product_attention(
            rows, keys[None], values[None], attn_mask=mask[None], scale=scaling
        )
        return output.reshape(queries.shape)
