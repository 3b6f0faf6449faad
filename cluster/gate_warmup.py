"""Gates before their training proper: they learn which tokens later blocks attend to.

The frozen base runs once over some stretches of text. Its activations are kept, so an update costs
a hundredth of one through the whole model, and every token of every head has a target of its own.
The gates then begin at the wanted keep rate with a sensible order of tokens.

Legend: L layers, H KV heads, G query heads of each, E model width, n tokens, D head_dim.

Source:
    Ours. Attention-Gate, arXiv:2410.12876, trains from gates that keep all, with thousands of
    samples; on one core that many are out of reach.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.cluster.gate_passes import GateParameters
from kvstrata.cluster.gate_plan import Example, GatePlan
from kvstrata.cluster.tuning import Progress, Tuner, TuningSchedule
from kvstrata.engine.model import Model
from kvstrata.methods.gate_weights import gate_logits
from kvstrata.protos.identity import BLOCK_TOKENS

FIRST_TOKENS = 4  # sinks are kept anyway, and would be outliers
FLOOR = 1e-9


def importance(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return causal attention's output, and what each token adds to that of later blocks' rows.

    Args:
        queries: (H * G, n, D).
        keys: (H, n, D).
        values: As ``keys``.
        scaling: Factor on the dot products before the softmax.

    Returns:
        (H * G, n, D), and float32 (H, n): the mean over the rows of later blocks and over the
        heads of a group of attention times the value's norm; 0 where no block is later.
    """
    num_tokens = keys.shape[1]
    grouped = queries.unflatten(0, (keys.shape[0], -1)).float()
    scores = (grouped @ keys.float().transpose(1, 2)[:, None]) * scaling
    places = torch.arange(num_tokens, device=keys.device)
    weights = scores.masked_fill_(places[:, None] < places, -torch.inf).softmax(-1)
    output = weights.to(values.dtype) @ values[:, None]
    blocks = places // BLOCK_TOKENS
    later = blocks[:, None] > blocks
    mass = (weights * later).sum(2).mean(1) / later.sum(0).clamp_min(1)
    return output.flatten(0, 1), mass * values.float().norm(dim=-1)


@dataclass(slots=True)
class ImportancePass:
    """The state of a pass of the base that writes down what gates see and what they shall find.

    Attributes:
        hidden: Of each layer so far, bfloat16 (n, E).
        found: Of each layer so far, ``importance``.
    """

    hidden: list[torch.Tensor] = field(default_factory=list)
    found: list[torch.Tensor] = field(default_factory=list)

    def rows(self, layer: int) -> None:
        """Return None: all tokens run all layers."""

    def observe(self, layer: int, hidden: torch.Tensor) -> None:
        """Keep the layer's input; see ``ObservingState``."""
        self.hidden.append(hidden.to(torch.bfloat16).clone())

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend as the base does; see ``AttentionState.attend``."""
        output, found = importance(queries, keys, values, scaling)
        self.found.append(found)
        return output


@dataclass(frozen=True, slots=True)
class Activations:
    """What one stretch of text gives: hidden bfloat16 (L, n, E), target float32 (L, H, n).

    Targets are logarithms, each head's with mean 0 and deviation 1 over all stretches; the first
    tokens and the last block have none (NaN).
    """

    hidden: torch.Tensor
    target: torch.Tensor


@torch.no_grad()
def observe(model: Model, examples: Sequence[Example], tell: Progress) -> list[Activations]:
    """Run the base over examples and return what gates learn from."""
    hidden, found = [], []
    for done, example in enumerate(examples):
        tell("observing", done, len(examples))
        state = ImportancePass()
        model.forward_through(state, example.ids[:-1], num_logits=1)
        hidden.append(torch.stack(state.hidden))
        target = torch.stack(state.found).clamp_min(FLOOR).log()
        target[..., :FIRST_TOKENS] = torch.nan
        target[..., (target.shape[-1] - 1) // BLOCK_TOKENS * BLOCK_TOKENS :] = torch.nan
        found.append(target)
    tell("observing", len(examples), len(examples))
    together = torch.cat(found, dim=-1)
    mean = together.nanmean(-1, keepdim=True)
    deviation = (together - mean).square().nanmean(-1, keepdim=True).sqrt().clamp_min(FLOOR)
    return [
        Activations(h, (target - mean) / deviation) for h, target in zip(hidden, found, strict=True)
    ]


def warm_up(
    gates: GateParameters,
    seen: Sequence[Activations],
    plan: GatePlan,
    state: Path,
    identity: str,
    tell: Progress,
) -> list[float]:
    """Fit gates to targets and set their biases to the keep rate; return the loss of every step.

    Args:
        gates: Change.
        seen: At least one.
        plan: How long, and the keep rate.
        state: File that a second run resumes from.
        identity: Says what is trained on what.
        tell: Called with how far it is.
    """
    draw = torch.Generator().manual_seed(plan.seed)
    drawn = torch.randint(len(seen), (plan.warm_steps,), generator=draw).tolist()

    def loss_of(step: int) -> Iterator[torch.Tensor]:
        example = seen[drawn[step]]
        yield torch.stack(
            [
                _distance(_logits(gates, plan, example, layer), example.target[layer])
                for layer in range(len(example.hidden))
            ]
        ).mean()

    tuner = Tuner(
        dict(gates.named_parameters()),
        TuningSchedule(plan.warm_steps, plan.warm_rate, warmup_steps=20),
        state,
        identity,
    )
    losses = tuner.run(loss_of, lambda stage, done, total: tell(f"warm {stage}", done, total))
    _set_biases(gates, seen, plan)
    return losses


def _logits(
    gates: GateParameters, plan: GatePlan, example: Activations, layer: int
) -> torch.Tensor:
    """Return the gates' logits, (H, n)."""
    return gate_logits(
        example.hidden[layer].float(),
        gates.project[layer],
        gates.gate[layer],
        gates.bias[layer],
        plan.gate_heads,
        plan.window,
        bidirectional=plan.bidirectional,
    ).T


def _distance(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    counted = target.isfinite()
    return F.mse_loss(found[counted], target[counted])


@torch.no_grad()
def _set_biases(gates: GateParameters, seen: Sequence[Activations], plan: GatePlan) -> None:
    """Move each head's threshold to where it keeps its share of the tokens seen."""
    for layer in range(len(gates.bias)):
        logits = torch.cat([_logits(gates, plan, example, layer) for example in seen], dim=1)
        gates.bias[layer] -= logits.quantile(1 - plan.keep_rate, dim=1)
