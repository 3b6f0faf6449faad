"""Passes of a model under gates: in training, with a gradient, and as they are served."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.cluster.gate_plan import GatePlan
from kvstrata.engine.model import Model
from kvstrata.methods.attention_gate import AttentionGate, gated_attention, straight_through
from kvstrata.methods.gate_weights import GateWeights, gate_logits

FIRST_BIAS = 2.0  # gates begin at .88: all is kept


class GateParameters(torch.nn.Module):
    """The gates of all layers, in training.

    Attributes:
        project: (L, 3, A * B, E).
        gate: (L, H, A * B).
        bias: (L, H).
    """

    def __init__(self, model: Model, plan: GatePlan) -> None:
        super().__init__()
        spec, inner = model.spec, plan.gate_heads * plan.gate_dim
        width = model.width
        draw = torch.Generator().manual_seed(plan.seed)
        scale = width**-0.5
        project = torch.randn(spec.num_layers, 3, inner, width, generator=draw) * scale
        self.project = torch.nn.Parameter(project)
        self.gate = torch.nn.Parameter(
            torch.randn(spec.num_layers, spec.num_kv_heads, inner, generator=draw)
            * inner**-0.5
            * 0.1
        )
        self.bias = torch.nn.Parameter(torch.full((spec.num_layers, spec.num_kv_heads), FIRST_BIAS))

    def weights(self, model: Model, plan: GatePlan, note: str) -> GateWeights:
        """Return the gates as they are now."""
        return GateWeights(
            model_id=model.model_id,
            project=self.project.detach().half(),
            gate=self.gate.detach().half(),
            bias=self.bias.detach().float(),
            num_heads=plan.gate_heads,
            window=plan.window,
            bidirectional=plan.bidirectional,
            keep_rate=plan.keep_rate,
            note=note,
        )


@dataclass(slots=True)
class GatedPass:
    """The state of a training pass: gates decide with a gradient, attention heeds them.

    Attributes:
        parameters: The gates.
        plan: Their sizes.
        stage: The threshold, and what is protected.
        num_gated: Tokens from the first on that are gated; those after are kept.
        gates: Of each layer so far, (tokens, H).
        kept: Of each layer so far, bool (H, n).
    """

    parameters: GateParameters
    plan: GatePlan
    stage: AttentionGate
    num_gated: int
    gates: list[torch.Tensor] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    _flags: torch.Tensor | None = None

    def rows(self, layer: int) -> None:
        """Return None: all tokens run all layers."""

    def observe(self, layer: int, hidden: torch.Tensor) -> None:
        """Gate the layer's tokens; see ``ObservingState``."""
        gate = gate_logits(
            hidden[: self.num_gated].float(),
            self.parameters.project[layer],
            self.parameters.gate[layer],
            self.parameters.bias[layer],
            self.plan.gate_heads,
            self.plan.window,
            bidirectional=self.plan.bidirectional,
        ).sigmoid()
        kept = self.stage.flags(gate.detach())
        flags = torch.where(
            self.stage.flags(torch.full_like(gate, -2.0)), 1.0, straight_through(gate.T, kept)
        )
        rest = len(hidden) - self.num_gated
        self._flags = F.pad(flags, (0, rest), value=1.0)
        self.gates.append(gate)
        self.kept.append(F.pad(kept, (0, rest), value=True))

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend to what is kept; see ``AttentionState.attend``."""
        assert self._flags is not None
        return gated_attention(queries, keys, values, self._flags, scaling)


class FixedPass:
    """The state of a pass under saved gates, without gradients."""

    def __init__(self, gates: GateWeights | None, num_gated: int) -> None:
        self._gates = gates
        self._num_gated = num_gated
        self.kept: list[torch.Tensor] = []

    def rows(self, layer: int) -> None:
        """Return None: all tokens run all layers."""

    def observe(self, layer: int, hidden: torch.Tensor) -> None:
        """Gate the layer's tokens; see ``ObservingState``."""
        if self._gates is not None:
            gate = self._gates.gate_of(layer, hidden[: self._num_gated])
            rest = len(hidden) - self._num_gated
            self.kept.append(F.pad(AttentionGate().flags(gate), (0, rest), value=True))

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend to what is kept; see ``AttentionState.attend``."""
        if self._gates is None:
            self.kept.append(torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device))
        flags = self.kept[layer].float()
        return gated_attention(queries, keys, values, flags, scaling)
