"""Training a model's gates: which K and V to keep, learned against the loss of the text itself.

Continual pre-training: the base is frozen, only gates learn. Supervised fine-tuning: answers alone
count, and an adapter may learn with the gates. A step's loss is the task's, and what too many kept
tokens cost.

Source:
    Attention-Gate, arXiv:2410.12876, sections 3.2 and 3.3; the reduced attention within windows and
    the pooled loss are ours.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.cluster.gate_passes import FixedPass, GatedPass, GateParameters
from kvstrata.cluster.gate_plan import Example, GatePlan, num_training
from kvstrata.cluster.gate_warmup import observe, warm_up
from kvstrata.cluster.tuning import Progress, Tuner, TuningSchedule
from kvstrata.engine.model import Model
from kvstrata.methods.attention_gate import AttentionGate, eviction_loss
from kvstrata.methods.gate_weights import SUFFIX, GateWeights
from kvstrata.protos.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Measured:
    """Quality on held-out text.

    Attributes:
        loss: Mean negative log-likelihood, nats a token.
        kept: Share of tokens kept, by layer and KV head.
    """

    loss: float
    kept: tuple[tuple[float, ...], ...]

    @property
    def kept_fraction(self) -> float:
        """Mean over layers and heads."""
        heads = [share for layer in self.kept for share in layer]
        return sum(heads) / len(heads)


@dataclass(frozen=True, slots=True)
class TunedGates:
    """What a training gave.

    Attributes:
        gates: Ready to be saved.
        warm_losses: Of the steps before, by step; empty where a second run had no need of them.
        losses: Of the text and of what is kept, by step.
        keep_rates: Mean share kept, by step.
        measured: By name: ``full`` without gates, ``gated`` with them.
    """

    gates: GateWeights
    warm_losses: list[float]
    losses: list[float]
    keep_rates: list[float]
    measured: dict[str, Measured]


def tune_gates(
    model: Model,
    groups: Sequence[Sequence[Example]],
    plan: GatePlan,
    out: Path,
    tell: Progress,
    note: str = "",
) -> TunedGates:
    """Train gates for ``model`` and save them in the folder ``out``; a second run resumes.

    Args:
        model: Stays as it is, but for the adapter if one is asked for.
        groups: Examples, a group per text; the end of each group is held out.
        plan: How to train.
        out: Gets the gates, the adapter, and what a second run needs.
        tell: Called with how far it is.
        note: Goes into the file of the gates.

    Raises:
        InvalidRequestError: There is nothing to train on.
        ArithmeticError: The loss is no number any more.
    """
    training = [group[: num_training(group)] for group in groups if num_training(group)]
    held_out = [group[num_training(group) :] for group in groups]
    if not training:
        raise InvalidRequestError(
            "there is nothing to train on: the texts are empty, or shorter than one stretch",
            f"give texts of more than {plan.length} tokens, or a smaller length",
        )
    out.mkdir(parents=True, exist_ok=True)
    gates = GateParameters(model, plan)
    learned = dict(gates.named_parameters())
    if plan.rank:
        learned |= model.add_adapter(plan.rank)
    drawn = _drawn(training, plan.num_steps * plan.batch, plan.seed)
    keep_rates = _KeepRates(out / "keep_rates.json")

    def loss_of(step: int) -> Iterator[torch.Tensor]:
        kept = 0.0
        for example in drawn[step * plan.batch : (step + 1) * plan.batch]:
            state, loss = _run(model, gates, plan, example)
            kept += torch.stack(state.kept).float().mean().item() / plan.batch
            found = [torch.cat(state.gates)] if plan.pooled else state.gates
            cost = eviction_loss(found, plan.keep_rate, plan.loss, plan.weight)
            yield (loss + cost) / plan.batch
        keep_rates.note(step, kept)

    examples = [[asdict(example) for example in group] for group in training]
    identity = json.dumps([model.model_id.hex(), asdict(plan), examples])
    schedule = TuningSchedule(plan.num_steps, plan.learning_rate)
    tuner = Tuner(learned, schedule, out / "state.safetensors", identity)
    warm = [] if tuner.resume() else _warm(model, gates, training, plan, out, identity, tell)
    losses = tuner.run(loss_of, tell)
    trained = gates.weights(model, plan, note)
    trained.save(out / f"{model.model_id.hex()}{SUFFIX}")
    if plan.rank:
        model.save_adapter(out / "adapter")
    chosen = _in_turn(held_out if any(held_out) else training)[: plan.num_measured]
    measured = {"full": measure(model, None, chosen), "gated": measure(model, trained, chosen)}
    return TunedGates(trained, warm, losses, keep_rates.values, measured)


def _drawn(groups: Sequence[Sequence[Example]], count: int, seed: int) -> list[Example]:
    """Return examples at random, from each group in turn."""
    draw = random.Random(seed)
    shuffled = [draw.sample(group, len(group)) for group in groups]
    return [
        shuffled[i % len(groups)][i // len(groups) % len(shuffled[i % len(groups)])]
        for i in range(count)
    ]


def _in_turn(groups: Sequence[Sequence[Example]]) -> list[Example]:
    """Return the first example of each group, then the second of each, and so on."""
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def _warm(
    model: Model,
    gates: GateParameters,
    training: Sequence[Sequence[Example]],
    plan: GatePlan,
    out: Path,
    identity: str,
    tell: Progress,
) -> list[float]:
    """Warm gates up as planned; return the loss of every step."""
    if not plan.warm_steps:
        return []
    seen = observe(model, _drawn(training, plan.num_cached, plan.seed + 1), tell)
    return warm_up(gates, seen, plan, out / "warm.safetensors", identity, tell)


class _KeepRates:
    """The kept share of every step, on disk, because a resumed run has not seen the first ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.values = [float(v) for v in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError):
            self.values = []

    def note(self, step: int, value: float) -> None:
        self.values = [*self.values[:step], round(value, 5)]
        self._path.write_text(json.dumps(self.values))


def _run(
    model: Model, gates: GateParameters, plan: GatePlan, example: Example
) -> tuple[GatedPass, torch.Tensor]:
    """Return the pass over an example and the loss of what counts of it."""
    state = GatedPass(gates, plan, AttentionGate(), example.num_gated)
    logits = model.forward_through(state, example.ids[:-1])[example.first_counted :]
    wanted = torch.tensor(example.ids[example.first_counted + 1 :], device=logits.device)
    return state, F.cross_entropy(logits.float(), wanted)


@torch.no_grad()
def measure(model: Model, gates: GateWeights | None, examples: Sequence[Example]) -> Measured:
    """Return the loss on examples under gates as they are saved, or without any."""
    spec = model.spec
    kept = torch.zeros(spec.num_layers, spec.num_kv_heads)
    total, count = 0.0, 0
    for example in examples:
        state = FixedPass(gates, example.num_gated)
        logits = model.forward_through(state, example.ids[:-1])[example.first_counted :]
        wanted = torch.tensor(example.ids[example.first_counted + 1 :], device=logits.device)
        total += F.cross_entropy(logits.float(), wanted, reduction="sum").item()
        count += len(wanted)
        kept += torch.stack(state.kept).float().mean(2).cpu()
    shares = (kept / len(examples)).tolist()
    return Measured(total / count, tuple(tuple(round(s, 4) for s in layer) for layer in shares))
