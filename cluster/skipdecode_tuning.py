"""Tuning a model for SkipDecode: a teacher-forced pass by the schedule that decoding follows.

The answer of each stretch of text runs through the layers that its budget allows, the prompt
through all; the loss is that of the answer, and how far its distribution is from the full model's.

Source:
    SkipDecode, arXiv:2307.02628, section 4; the distance from the full model is ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.cluster.calibration import CalibrationPlan, cut_segments
from kvstrata.cluster.tuning import Progress, Tuner, TuningSchedule
from kvstrata.engine.attention import LayerRows
from kvstrata.engine.cache_statistics import Segment
from kvstrata.engine.model import Model
from kvstrata.methods.skipdecode import SkipDecode, running_rows
from kvstrata.protos.errors import InvalidRequestError

HELD_OUT = 0.1  # the end of every text is kept from training and measured on


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """What to train on, and how long.

    Attributes:
        prompt: Tokens of a stretch that run all layers.
        answer: Tokens that follow by the schedule.
        batch: Stretches for one update.
        num_steps: Updates.
        learning_rate: At its highest.
        rank: Of the adapter.
        likeness: Weight of the distance from the full model (KL) against the loss on the text.
        num_measured: Stretches of held-out text to measure on.
        seed: Of everything drawn.
    """

    prompt: int = 128
    answer: int = 128
    batch: int = 4
    num_steps: int = 300
    learning_rate: float = 1e-3
    rank: int = 16
    likeness: float = 0.5
    num_measured: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Quality on held-out answers.

    Attributes:
        loss: Mean negative log-likelihood, nats a token.
        kl: Mean KL divergence from the full, untuned model, nats a token.
        top1: Share of tokens whose most likely successor is the full, untuned model's.
    """

    loss: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuning gave.

    Attributes:
        losses: Of every step.
        measured: By name: ``full`` and ``untuned`` are the model before, with all layers and by
            the schedule, ``tuned`` and ``tuned_full`` after.
    """

    losses: list[float]
    measured: dict[str, Measured]


def answer_rows(schedule: SkipDecode, prompt: int, answer: int, num_layers: int) -> LayerRows:
    """Return which of ``prompt + answer`` tokens run each layer.

    Answer token i is fed in as generated token i: its own budget counts, as in decoding.
    """
    picked = running_rows([schedule] * (prompt + answer), range(-prompt, answer), num_layers)
    return [None if rows is None else torch.tensor(rows, dtype=torch.int64) for rows in picked]


def tune(
    model: Model,
    schedule: SkipDecode,
    texts: Sequence[str],
    plan: TuningPlan,
    folder: Path,
    tell: Progress,
) -> Tuned:
    """Train an adapter by the schedule, write it to ``folder``, and measure what it does.

    Raises:
        InvalidRequestError: The schedule does not fit the model, or the texts are too short.
    """
    schedule.check(model.spec.num_layers)
    if plan.prompt + plan.answer > model.spec.max_positions:
        raise InvalidRequestError(
            f"{plan.prompt} + {plan.answer} tokens exceed the model's "
            f"{model.spec.max_positions} positions",
            "give a smaller --prompt or --answer",
        )
    cuts = [(text, int(len(text) * (1 - HELD_OUT))) for text in texts]
    segments = _cut(model, [t[:cut] for t, cut in cuts], plan, plan.num_steps * plan.batch)
    held_out = _cut(model, [t[cut:] for t, cut in cuts], plan, plan.num_measured)
    rows = answer_rows(schedule, plan.prompt, plan.answer, model.spec.num_layers)
    folder.mkdir(parents=True, exist_ok=True)
    measured = _measure(model, held_out, {"full": (), "untuned": rows}, tell)
    torch.manual_seed(plan.seed)
    tuner = Tuner(
        model.add_adapter(plan.rank),
        TuningSchedule(plan.num_steps, plan.learning_rate),
        folder / "state.safetensors",
        f"{model.fingerprint.hex()}/{schedule}/{asdict(plan)}/{segments}",
    )

    def loss_of(step: int) -> Iterator[torch.Tensor]:
        for segment in segments[step * plan.batch : (step + 1) * plan.batch]:
            yield _loss(model, segment, rows, plan.likeness) / plan.batch

    losses = tuner.run(loss_of, tell)
    model.save_adapter(folder)
    measured |= _measure(model, held_out, {"tuned": rows, "tuned_full": ()}, tell)
    return Tuned(losses, measured)


def _cut(model: Model, texts: Sequence[str], plan: TuningPlan, count: int) -> list[Segment]:
    cutting = CalibrationPlan(context=plan.prompt, continuation=plan.answer, seed=plan.seed)
    return cut_segments(model.tokenizer, texts, cutting, count, seed=1, with_records=False)


def _logits(model: Model, segment: Segment, rows: LayerRows) -> torch.Tensor:
    """Return the logits that predict the answer, float32 (answer, vocab_size)."""
    ids = (*segment.context, *segment.continuation)
    count = len(segment.continuation)
    with _in_bfloat16():
        return model.forward_once(ids, rows, num_logits=count + 1)[:-1].float()


def _in_bfloat16() -> AbstractContextManager[object]:
    """Multiply matrices in bfloat16, twice as fast on CPUs that can; the rest stays as it is."""
    return torch.autocast("cpu", torch.bfloat16)


def _loss(model: Model, segment: Segment, rows: LayerRows, likeness: float) -> torch.Tensor:
    logits = _logits(model, segment, rows)
    loss = F.cross_entropy(logits, torch.tensor(segment.continuation))
    if likeness:
        with torch.no_grad(), model.without_adapter():
            wanted = _logits(model, segment, ()).log_softmax(-1)
        kl = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        loss = (1 - likeness) * loss + likeness * kl
    return loss


@torch.no_grad()
def _measure(
    model: Model, segments: Sequence[Segment], runs: dict[str, LayerRows], tell: Progress
) -> dict[str, Measured]:
    """Measure each run against the full model without the adapter, which may be there already."""
    total = {name: torch.zeros(3) for name in runs}
    for number, segment in enumerate(segments):
        tell("/".join(runs), number, len(segments))
        with model.without_adapter():
            full = _logits(model, segment, ()).log_softmax(-1)
        for name, rows in runs.items():
            log_p = _logits(model, segment, rows).log_softmax(-1)
            nll = F.nll_loss(log_p, torch.tensor(segment.continuation))
            kl = F.kl_div(log_p, full, reduction="batchmean", log_target=True)
            same = (log_p.argmax(-1) == full.argmax(-1)).float().mean()
            total[name] += torch.stack([nll, kl, same])
    tell("/".join(runs), len(segments), len(segments))
    return {name: Measured(*(sums / len(segments)).tolist()) for name, sums in total.items()}
