"""Training a few parameters of a frozen model: one loop, resumable, that methods bring a loss to.

After every ``SAVE_EVERY`` steps all that the next ones need is written beside the result, and a
later run with the same model, texts and settings goes on from there.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

logger = logging.getLogger(__name__)

SAVE_EVERY = 20
_MOMENTS = ("exp_avg", "exp_avg_sq")

# The parts of a step's loss; each is differentiated before the next one is computed.
LossOf = Callable[[int], Iterator[torch.Tensor]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TuningSchedule:
    """How long and how fast to train.

    Attributes:
        num_steps: Updates in all.
        learning_rate: At its highest; it rises over ``warmup_steps`` and falls as a cosine to a
            tenth.
        warmup_steps: See above.
        max_norm: Gradients are scaled down to this norm.
        weight_decay: Of AdamW.
    """

    num_steps: int
    learning_rate: float
    warmup_steps: int = 10
    max_norm: float = 1.0
    weight_decay: float = 0.0

    def factor(self, step: int) -> float:
        """Return the share of ``learning_rate`` at a step."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        along = min(1.0, step / max(1, self.num_steps))
        return rising * (0.55 + 0.45 * math.cos(math.pi * along))


class Tuner:
    """Updates parameters until the schedule ends; what was done before is not done again.

    Args:
        parameters: By name; only these change.
        schedule: See there.
        state: File that remembers what is done.
        identity: Says what is trained on what; another one starts anew.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        schedule: TuningSchedule,
        state: Path,
        identity: str,
    ) -> None:
        self.losses: list[float] = []
        self._parameters = dict(parameters)
        self._schedule = schedule
        self._state = state
        text = json.dumps([identity, repr(schedule), sorted(parameters)])
        self._identity = hashlib.sha256(text.encode()).hexdigest()
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=schedule.learning_rate,
            weight_decay=schedule.weight_decay,
        )

    def run(self, loss_of: LossOf, tell: Progress) -> list[float]:
        """Train to the end and return the loss of every step.

        Raises:
            ArithmeticError: A loss is no number; what the file remembers is from before.
        """
        self.resume()
        total = self._schedule.num_steps
        for step in range(len(self.losses), total):
            tell("training", step, total)
            self.losses.append(self._step(step, loss_of))
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
                self._save()
        tell("training", total, total)
        return self.losses

    def _step(self, step: int, loss_of: LossOf) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in loss_of(step):
            part.backward()
            total += part.item()
        if not math.isfinite(total):
            raise ArithmeticError(f"the loss of step {step} is {total}: lower the learning rate")
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.learning_rate * self._schedule.factor(step)
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._schedule.max_norm)
        self._optimizer.step()
        return total

    def _save(self) -> None:
        tensors = {name: p.detach().contiguous() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for moment, value in self._optimizer.state[parameter].items():
                if moment in _MOMENTS:
                    tensors[f"{moment}:{name}"] = value
        temporary = self._state.with_suffix(".tmp")
        facts = {"identity": self._identity, "losses": json.dumps(self.losses)}
        save_file(tensors, temporary, facts)
        temporary.replace(self._state)

    def resume(self) -> bool:
        """Take up what the file remembers, if it is of the same training and whole.

        Returns:
            Whether it did.
        """
        if not self._state.is_file():
            return False
        try:
            with safe_open(self._state, "pt") as file:
                facts = file.metadata() or {}
                if facts.get("identity") != self._identity:
                    return False
                losses = [float(loss) for loss in json.loads(facts["losses"])]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._restore(tensors, len(losses))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            logger.warning("%s is damaged, so training starts anew: %s", self._state, error)
            return False
        self.losses = losses
        return True

    def _restore(self, tensors: Mapping[str, torch.Tensor], num_steps: int) -> None:
        wanted = {}
        for name, parameter in self._parameters.items():
            for label in (name, *(f"{moment}:{name}" for moment in _MOMENTS)):
                if label not in tensors and label != name:
                    continue  # a parameter that no loss has reached yet
                if tensors[label].shape != parameter.shape:
                    raise ValueError(f"{label} has another shape")
                wanted[label] = tensors[label].to(parameter)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(wanted[name])
                if f"exp_avg:{name}" in wanted:
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(num_steps)),
                        **{moment: wanted[f"{moment}:{name}"] for moment in _MOMENTS},
                    }
