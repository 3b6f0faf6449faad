"""A Llama-like decoder run from its bare weights: what transformers computes, with far fewer calls.

Made from a transformers model, whose weights it takes over: that model can no longer run itself.
Q, K and V are one product, gate and up another; norms, rotation and gate are one kernel each. It
serves the families whose layers are RMSNorm, rotary attention, RMSNorm and a SiLU-gated MLP (Llama,
Mistral, Qwen2, Qwen3); others run in transformers.

Legend: N tokens of a pass, E hidden size, Q query heads, H KV heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvstrata.engine.attention import AttentionState
from kvstrata.engine.held_images import ImageRows
from kvstrata.engine.layer_inputs import ObservingState
from kvstrata.engine.packed_linear import PackedLinear
from kvstrata.engine.rotary import Rotary
from kvstrata.engine.spec import KVSpec
from kvstrata.engine.step_graphs import GraphedPass, StepGraphs
from kvstrata.kernels.decoder_ops import add_rms_norm, rotate_heads, silu_gate
from kvstrata.kernels.few_rows import (
    MAX_ROWS,
    DecoderWeights,
    FewRows,
    FewRowsPass,
    LayerWeights,
    can_run,
)

PACKED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class _Norm:
    weight: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> "_Norm":
        return cls(module.weight.detach(), float(module.variance_epsilon))

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True)
class _Layer:
    before_attention: _Norm
    qkv: PackedLinear
    query_norm: _Norm | None
    key_norm: _Norm | None
    output: PackedLinear
    before_mlp: _Norm
    gate_up: PackedLinear
    down: PackedLinear
    scaling: float

    @classmethod
    def of(cls, module: Any) -> "_Layer":
        attention, mlp = module.self_attn, module.mlp
        query_norm, key_norm = (getattr(attention, f"{name}_norm", None) for name in "qk")
        return cls(
            before_attention=_Norm.of(module.input_layernorm),
            qkv=_packed(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=_Norm.of(query_norm) if query_norm is not None else None,
            key_norm=_Norm.of(key_norm) if key_norm is not None else None,
            output=_packed(attention.o_proj),
            before_mlp=_Norm.of(module.post_attention_layernorm),
            gate_up=_packed(mlp.gate_proj, mlp.up_proj),
            down=_packed(mlp.down_proj),
            scaling=float(attention.scaling),
        )

    def few_rows(self) -> LayerWeights | None:
        """Return the layer as compiled code runs it; None if a weight does not lie as it needs."""
        qkv, output, gate_up, down = (
            product.blocked for product in (self.qkv, self.output, self.gate_up, self.down)
        )
        if qkv is None or output is None or gate_up is None or down is None:
            return None
        norms = self.query_norm, self.key_norm
        head_norms = None
        if norms[0] is not None and norms[1] is not None:
            head_norms = (norms[0].weight, norms[0].eps), (norms[1].weight, norms[1].eps)
        before, behind = self.before_attention, self.before_mlp
        return LayerWeights(
            (before.weight, before.eps),
            qkv,
            head_norms,
            output,
            (behind.weight, behind.eps),
            gate_up,
            down,
        )


def can_pack(hf_model: Any) -> bool:
    """Tell whether ``PackedDecoder`` computes what this transformers model computes."""
    config = hf_model.config
    return (
        config.model_type in PACKED_MODEL_TYPES
        and getattr(config, "hidden_act", None) == "silu"
        and hasattr(hf_model, "lm_head")
    )


class PackedDecoder:
    """The decoder of one model, on the model's device."""

    def __init__(
        self, hf_model: Any, rotary: Rotary, spec: KVSpec, graphs: StepGraphs | None = None
    ) -> None:
        """Take over the weights of a model that ``can_pack``; layers of it are emptied."""
        inner = hf_model.base_model
        self._rotary = rotary
        self._sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self._embedding: torch.Tensor = inner.embed_tokens.weight.detach()
        self._layers = [_Layer.of(layer) for layer in inner.layers]
        self._norm = _Norm.of(inner.norm)
        head = hf_model.lm_head
        bias = head.bias.detach() if head.bias is not None else None
        self._head = PackedLinear([head.weight], [bias])
        if head.weight is not inner.embed_tokens.weight:
            _empty(head)
        self._few_rows = self._make_few_rows()
        self._graphs = graphs
        self._angles = None if graphs is None else rotary.cos_sin(0, spec.max_positions)

    def _make_few_rows(self) -> FewRows | None:
        """Return what runs steps of few rows, if weights and sizes allow it."""
        layers = [layer.few_rows() for layer in self._layers]
        head = self._head.blocked
        if head is None or any(layer is None for layer in layers):
            return None
        known = [layer for layer in layers if layer is not None]
        norm = (self._norm.weight, self._norm.eps)
        weights = DecoderWeights(known, norm, head, *self._sizes)
        return FewRows(weights) if can_run(weights) else None

    @torch.inference_mode()
    def __call__(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        state: AttentionState,
        logits_to_keep: int | torch.Tensor,
        images: ImageRows | None = None,
    ) -> torch.Tensor:
        """Run a pass.

        Args:
            token_ids: Of all tokens, sequence after sequence.
            positions: Of each token in its sequence.
            state: Attends, and tells which tokens run which layer.
            logits_to_keep: The last so many tokens, 0 for all; or int64, which tokens.
            images: What stands in the place of some tokens' embeddings.

        Returns:
            Logits (kept, vocab_size), of the model's dtype.
        """
        if images is None and isinstance(logits_to_keep, torch.Tensor):
            graphed = self._begin_graphed(token_ids, positions, state)
            if graphed is not None:
                return self._run_graphed(graphed, state, logits_to_keep)
        device = self._embedding.device
        at = torch.tensor(positions, dtype=torch.int64, device=device)
        tables = self._rotary.cos_sin(0, max(positions) + 1)
        hidden = self._embedding[torch.tensor(token_ids, dtype=torch.int64, device=device)]
        if images is not None:
            hidden[images.at.to(device)] = images.rows
        is_few = self._few_rows is not None and len(hidden) <= MAX_ROWS
        if is_few and isinstance(logits_to_keep, torch.Tensor):
            layers = self._layers_of_all(state)
            if layers is not None:
                return self._run_few(hidden, at, tables, state, logits_to_keep, layers)
        delta: torch.Tensor | None = None
        shown = state if isinstance(state, ObservingState) else None  # asked once: it takes a while
        for index, layer in enumerate(self._layers):
            rows = state.rows(index)
            if rows is None:
                delta, hidden = self._run(index, layer, delta, hidden, at, tables, state, shown)
                continue
            hidden = hidden if delta is None else hidden + delta
            delta = None
            if len(rows):
                own = rows.to(device)
                change, base = self._run(
                    index, layer, None, hidden[own], at[own], tables, state, shown
                )
                hidden = hidden.index_copy(0, own, base + change)
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
            hidden, delta = hidden[kept], None if delta is None else delta[kept]
        else:
            hidden = hidden[logits_to_keep]
            delta = None if delta is None else delta[logits_to_keep]
        if not len(hidden):
            return hidden.new_empty(0, self._head.num_outputs)
        return self._head(self._norm(hidden, delta)[0])

    def _layers_of_all(self, state: AttentionState) -> list[int] | None:
        """Return the layers that run, for all tokens; None if some tokens pass one by.

        Nor are there any if somebody looks at their inputs.
        """
        if isinstance(state, ObservingState):
            return None
        rows = [state.rows(index) for index in range(len(self._layers))]
        if any(own is not None and len(own) for own in rows):
            return None
        return [index for index, own in enumerate(rows) if own is None]

    def _run_few(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        state: AttentionState,
        kept: torch.Tensor,
        layers: Sequence[int],
    ) -> torch.Tensor:
        """Return the logits of a pass over few rows; see ``FewRows``."""
        assert self._few_rows is not None
        step = FewRowsPass(self._few_rows, hidden, tables, positions, layers)
        for place, index in enumerate(layers):
            scaling = self._layers[index].scaling
            step.attended(place, state.attend(index, *step.heads(place), scaling))
        return step.logits(kept) if len(kept) else hidden.new_empty(0, self._head.num_outputs)

    def _begin_graphed(
        self, token_ids: Sequence[int], positions: Sequence[int], state: AttentionState
    ) -> GraphedPass | None:
        """Begin a pass by CUDA graphs, if there are such and all rows run all layers."""
        if self._graphs is None:
            return None
        layers = self._layers_of_all(state)
        if layers is None or len(layers) < len(self._layers):
            self._graphs.counts["graph_layers"] += 1
            return None
        return self._graphs.begin(token_ids, positions)

    def _run_graphed(
        self, graphed: GraphedPass, state: AttentionState, kept: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of a pass whose parts between attentions are replayed."""
        assert self._angles is not None
        rows, angles = slice(graphed.num_rows), self._angles

        def embed() -> tuple[torch.Tensor, ...]:
            hidden = self._embedding[graphed.token_ids]
            return self._before(self._layers[0], None, hidden, graphed.positions, angles)

        made = graphed.run(embed)
        for index, layer in enumerate(self._layers):
            q, k, v, hidden = made
            out = state.attend(index, q[:, rows], k[:, rows], v[:, rows], layer.scaling)
            attended = graphed.attended(out.transpose(0, 1).flatten(1))
            piece = partial(self._go_on, index, attended, hidden, graphed.positions, angles)
            made = graphed.run(piece)
        graphed.end()
        return made[0][kept]

    def _go_on(
        self,
        index: int,
        attended: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Run from a layer's attention up to the next one's, or to the logits of all rows."""
        delta, hidden = self._behind(self._layers[index], attended, hidden)
        if index + 1 < len(self._layers):
            return self._before(self._layers[index + 1], delta, hidden, positions, tables)
        return (self._head(self._norm(hidden, delta)[0]),)

    def _run(
        self,
        index: int,
        layer: _Layer,
        delta: torch.Tensor | None,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        state: AttentionState,
        shown: ObservingState | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the layer's MLP adds, and what it adds to.

        ``hidden`` lacks ``delta``, what the layer before added: norms add it on their way.
        """
        show = None if shown is None else partial(shown.observe, index)
        q, k, v, hidden = self._before(layer, delta, hidden, positions, tables, show)
        out = state.attend(index, q, k, v, layer.scaling)
        return self._behind(layer, out.transpose(0, 1).flatten(1), hidden)

    def _before(
        self,
        layer: _Layer,
        delta: torch.Tensor | None,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        show: Callable[[torch.Tensor], object] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values (heads, N, D), turned, and ``hidden`` with ``delta``.

        Whoever is interested in the layer's input is shown it.
        """
        num_heads, num_kv_heads, head_dim = self._sizes
        normed, hidden = layer.before_attention(hidden, delta)
        if show is not None:
            show(normed)
        heads = layer.qkv(normed).unflatten(1, (-1, head_dim))
        turning = heads[:, : num_heads + num_kv_heads]
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = turning.split([num_heads, num_kv_heads], 1)
            parts = [
                norm(part.flatten(0, 1))[0].view(part.shape)
                for norm, part in ((layer.query_norm, q), (layer.key_norm, k))
            ]
            turning = torch.cat(parts, 1)
        turned = rotate_heads(turning, *tables, positions).transpose(0, 1)
        values = heads[:, num_heads + num_kv_heads :].transpose(0, 1)
        return turned[:num_heads], turned[num_heads:], values, hidden

    def _behind(
        self, layer: _Layer, attended: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the layer's MLP adds, and what it adds to, of attention's (N, heads * D)."""
        normed, hidden = layer.before_mlp(layer.output(attended), hidden)
        return layer.down(silu_gate(layer.gate_up(normed))), hidden


def _packed(*modules: Any) -> PackedLinear:
    """Return the modules as one product, and take their weights away."""
    weights = [module.weight for module in modules]
    packed = PackedLinear(weights, [module.bias for module in modules])
    for module in modules:
        _empty(module)
    return packed


def _empty(module: Any) -> None:
    module.weight = torch.nn.Parameter(module.weight.new_empty(0), requires_grad=False)
