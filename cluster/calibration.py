"""Making a profile: statistics of the cache on real text, transforms, and what they cost.

Resumable: after each segment everything known is written beside the profile, and a later run with
the same model, texts and seed goes on from there.

Not covered: choosing texts. Use several kinds and languages, source code and dialogue as well as
prose; what is not in them is stored worse than it could be.
"""

import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kvstrata.cluster.quality import compress, kl_divergence, prefilled, teacher_forced
from kvstrata.engine.cache_statistics import SKIPPED_TOKENS, CacheStatistics, Segment
from kvstrata.engine.layer_samples import LayerSamples
from kvstrata.engine.model import Model
from kvstrata.methods.bit_allocation import VALUE_WEIGHT, allocate
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.predicted import PredictedCodec
from kvstrata.methods.prediction_fit import fit_prediction
from kvstrata.methods.presets import Method
from kvstrata.methods.profile import (
    MAX_PROFILE_BYTES,
    SUFFIX,
    Profile,
    SideTables,
    read_arrays,
    write_arrays,
)
from kvstrata.protos.errors import ConfigurationError, InvalidRequestError
from kvstrata.protos.identity import BLOCK_TOKENS

logger = logging.getLogger(__name__)

FIRST_STORED_LAYER = 1  # K and V of layer 0 depend on token ids alone and are computed again
RATE_WIDTHS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 2.6, 3.4)  # base widths to measure rates at
PREDICTED_WIDTHS = (0.25, 0.4, 0.55, 0.75, 1.0, 1.3, 1.7, 2.2, 3.0)
FIT_WIDTH = 1.9  # base width, without prediction, at which layers are decoded to predict others
RECORDS_PER_SEGMENT = 10
# Prose hardly ever reads a fact again, so what reading one needs would be stored worst. At the same
# size, weight 16 halved and halved again what planted facts lose; weights 4 to 64 are much alike.
RECORD_WEIGHT = 16.0
_CHARACTERS_PER_TOKEN = 8  # more than any text needs: what is too much is cut off
_TEMPLATES = ("The password of {} was {}.", "{}: {}", '"{}" = {};', "Note that {} has number {}.")
_NAMES = (
    "Brandt", "the cellar", "bob", "ticket 7", "node-7", "Zoe", "pump 3", "the archive", "unit K4",
    "row 12", "alpha", "Mrs. Okafor", "the red box", "x_max", "server", "Lindgren",
)  # fmt: skip

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """How much text to look at.

    Attributes:
        num_segments: Segments in all; every second has records planted that its end asks for.
        context: Tokens of a segment whose cache is studied.
        continuation: Tokens that follow, along which gradients are taken.
        num_samples: Continuations sampled per segment.
        num_rate_segments: Segments on which sizes and KL are measured.
        num_prediction_segments: Segments from which layers learn to predict others; 0 for a profile
            without prediction. They take 2 bytes per stored element of disk while this runs.
        seed: Of everything drawn.
    """

    num_segments: int = 24
    context: int = 1024
    continuation: int = 256
    num_samples: int = 1
    num_rate_segments: int = 3
    num_prediction_segments: int = 96
    seed: int = 0


def cut_segments(
    tokenizer: object,
    texts: Sequence[str],
    plan: CalibrationPlan,
    count: int,
    *,
    seed: int,
    with_records: bool = True,
) -> list[Segment]:
    """Return ``count`` segments, taken from the texts in turn at places drawn by ``seed``.

    Every second one has records, such as ``node-7: 48213``, planted in its context and asked for
    in its continuation.

    Raises:
        InvalidRequestError: No text is long enough for one segment.
    """
    draw = random.Random(f"{plan.seed}/{seed}")
    length = plan.context + plan.continuation
    segments: list[Segment] = []
    usable = [text for text in texts if len(_encode(tokenizer, text, length)) >= length]
    if not usable:
        raise InvalidRequestError(
            f"no text is {length} tokens long", "give longer texts, or a smaller --context"
        )
    for number in range(count):
        text = usable[number % len(usable)]
        ids: list[int] = []
        while len(ids) < length:
            last = max(0, len(text) - length * 2)
            start = draw.randrange(last + 1)
            ids = _encode(tokenizer, text[start:], length)
            text = text if len(ids) >= length else usable[number % len(usable)] * 2
        segment = Segment(tuple(ids[: plan.context]), tuple(ids[plan.context : length]))
        if with_records and (number + number // len(usable)) % 2:
            segment = _with_records(tokenizer, segment, draw)
        segments.append(segment)
    return segments


def gather(
    model: Model, segments: Sequence[Segment], plan: CalibrationPlan, state: Path, tell: Progress
) -> CacheStatistics:
    """Return the statistics of all segments; ``state`` keeps what is done so far."""
    identity = _identity(model, segments, plan)
    statistics = _resumed(model, state, identity) or CacheStatistics(model, FIRST_STORED_LAYER)
    for number in range(statistics.num_segments, len(segments)):
        tell("gradients", number, len(segments))
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + number)
        statistics.add(segments[number], generator, plan.num_samples)
        write_arrays(state, {"identity": np.array(identity), **statistics.arrays()})
    tell("gradients", len(segments), len(segments))
    return statistics


def measure_rates(
    model: Model,
    codec_at: Callable[[float], CalibratedCodec],
    thresholds: Sequence[float],
    segments: Sequence[Segment],
    tell: Callable[[int, int], None],
) -> np.ndarray:
    """Return (threshold, stored bits per element, mean KL) rows, ascending in the threshold."""
    total = np.zeros((len(thresholds), 2))
    spec = model.spec
    for number, segment in enumerate(segments):
        ids = [*segment.context, *segment.continuation[:1]]
        plain = prefilled(model, Method(codec_at(thresholds[0])), ids)
        held = plain.num_blocks_held * BLOCK_TOKENS
        plain.cache.truncate(held)
        keys, values = (part.clone() for part in plain.cache.read(0, held))
        rest = segment.continuation
        before = teacher_forced(plain, segment.context, rest)
        elements = held * spec.num_layers * spec.num_kv_heads * spec.head_dim * 2
        for row, threshold in enumerate(thresholds):
            tell(number * len(thresholds) + row, len(segments) * len(thresholds))
            plain.method = Method(codec_at(threshold))
            plain.cache.write(0, keys, values)
            size = compress(plain)
            after = teacher_forced(plain, segment.context, rest)
            total[row] += 8 * size / elements, kl_divergence(before, after)
    tell(1, 1)
    rows = np.column_stack([thresholds, np.maximum(total / len(segments), 1e-12)])
    return rows[np.argsort(rows[:, 0])]


def threshold_of_width(keys: SideTables, values: SideTables, width: float) -> float:
    """Return the threshold at which base planes have ``width`` bits per element on average."""
    low, high = 1e-30, 1e30
    for _ in range(120):
        middle = (low * high) ** 0.5
        of_keys = allocate(keys, middle).mean_width
        of_values = allocate(values, middle, weight=VALUE_WEIGHT).mean_width
        wide = (of_keys + of_values) / 2 > width
        low, high = (middle, high) if wide else (low, middle)
    return float(f"{middle:.2e}")


def calibrate(
    model: Model, texts: Sequence[str], plan: CalibrationPlan, folder: Path, tell: Progress
) -> Path:
    """Make the profile of ``model``; returns the file's path in ``folder``.

    Raises:
        InvalidRequestError: The texts are too short, or segments too long for the model or too few
            for its head_dim.
        ConfigurationError: The folder cannot be made.
    """
    _check_plan(model, plan)
    folder = _made(folder)
    stem = model.model_id.hex()
    segments = cut_segments(model.tokenizer, texts, plan, plan.num_segments, seed=0)
    statistics = gather(model, segments, plan, folder / f"{stem}.state.npz", tell)
    keys, values = statistics.fit()
    profile = Profile(
        model_id=model.model_id,
        keys=keys,
        values=values,
        first_layer=FIRST_STORED_LAYER,
        rates=np.ones((1, 3)),
        note=f"{model.name}; {plan}",
    )
    rates = measure_rates(
        model,
        partial(CalibratedCodec, profile),
        [threshold_of_width(keys["pre"], values, width) for width in RATE_WIDTHS],
        _rate_segments(model, texts, plan),
        partial(tell, "rates"),
    )
    path = folder / f"{stem}{SUFFIX}"
    profile = replace(profile, rates=rates)
    profile.save(path)
    return extend(model, profile, texts, plan, folder, tell)


def extend(
    model: Model,
    profile: Profile,
    texts: Sequence[str],
    plan: CalibrationPlan,
    folder: Path,
    tell: Progress,
) -> Path:
    """Give ``profile`` new tables for predicting; returns the file's path in ``folder``.

    What was stored without prediction stays readable: its tables are not touched.

    Raises:
        InvalidRequestError, ConfigurationError: As of ``calibrate``.
    """
    _check_plan(model, plan)
    folder = _made(folder)
    path = folder / f"{model.model_id.hex()}{SUFFIX}"
    if not plan.num_prediction_segments:
        profile = replace(profile, prediction=None)
        profile.save(path)
        return path
    segments = cut_segments(model.tokenizer, texts, plan, plan.num_prediction_segments, seed=0)
    state = folder / f"{model.model_id.hex()}.samples"
    samples = LayerSamples(model, FIRST_STORED_LAYER, state, _identity(model, segments, plan))
    for number in range(samples.num_segments, len(segments)):
        tell("samples", number, len(segments))
        samples.add(segments[number])
    tell("samples", len(segments), len(segments))
    layers = profile.shape[0]
    threshold = threshold_of_width(profile.keys["pre"], profile.values, FIT_WIDTH)
    prediction = fit_prediction(
        samples.read, profile, threshold, lambda done: tell("prediction", done, layers)
    )
    profile = replace(profile, prediction=prediction)
    rates = measure_rates(
        model,
        partial(PredictedCodec, profile),
        [threshold_of_width(prediction.keys, prediction.values, w) for w in PREDICTED_WIDTHS],
        _rate_segments(model, texts, plan),
        partial(tell, "predicted rates"),
    )
    profile = replace(profile, prediction=replace(prediction, rates=rates))
    profile.save(path)
    samples.remove()
    return path


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: {error}"[:200], "give another --out") from error
    return folder


def _rate_segments(model: Model, texts: Sequence[str], plan: CalibrationPlan) -> list[Segment]:
    count = plan.num_rate_segments
    return cut_segments(model.tokenizer, texts, plan, count, seed=1, with_records=False)


def _check_plan(model: Model, plan: CalibrationPlan) -> None:
    length, spec = plan.context + plan.continuation, model.spec
    if length > spec.max_positions:
        raise InvalidRequestError(
            f"segments of {length} tokens exceed the model's {spec.max_positions} positions",
            "give a smaller --context",
        )
    if plan.num_segments * (plan.context - SKIPPED_TOKENS) < spec.head_dim:
        raise InvalidRequestError(
            f"{plan.num_segments} segments of {plan.context} tokens are too few for heads of "
            f"{spec.head_dim} channels",
            "give more --segments",
        )
    features = 4 * spec.num_kv_heads * spec.head_dim  # two layers of K and V
    if 0 < plan.num_prediction_segments * (plan.context - SKIPPED_TOKENS) < features:
        raise InvalidRequestError(
            f"{plan.num_prediction_segments} segments of {plan.context} tokens are too few to "
            f"predict from {features} channels",
            "give more --prediction-segments, or 0",
        )
    num_bytes = spec.num_layers * features**2 // 4 * 4  # float16, from both layers
    if plan.num_prediction_segments and num_bytes > MAX_PROFILE_BYTES * 7 // 8:
        raise InvalidRequestError(
            f"predicting this model's layers takes tables of about {num_bytes >> 20} MiB, a "
            f"profile has at most {MAX_PROFILE_BYTES >> 20}",
            "give --prediction-segments 0",
        )


def _encode(tokenizer: object, text: str, length: int) -> list[int]:
    encode = tokenizer.encode  # type: ignore[attr-defined]
    ids: list[int] = encode(text[: length * _CHARACTERS_PER_TOKEN], add_special_tokens=False)
    return ids[:length]


def _with_records(tokenizer: object, segment: Segment, draw: random.Random) -> Segment:
    """Return the segment with records planted in its context, and asked for after it."""
    names = draw.sample(_NAMES, RECORDS_PER_SEGMENT)
    records = [draw.choice(_TEMPLATES).format(n, draw.randrange(10**4, 10**6)) for n in names]
    context = list(segment.context)
    step = len(context) // (len(records) + 1)
    encode = tokenizer.encode  # type: ignore[attr-defined]
    for number, record in reversed(list(enumerate(records, start=1))):
        context[number * step : number * step] = encode(f"\n{record}\n", add_special_tokens=False)
    draw.shuffle(records)
    asked = encode("\n\n" + "\n".join(records), add_special_tokens=False)
    return Segment(
        tuple(context[: len(segment.context)]),
        tuple(asked[: len(segment.continuation)]),
        weight=RECORD_WEIGHT,
    )


def _identity(model: Model, segments: Sequence[Segment], plan: CalibrationPlan) -> str:
    text = f"{model.fingerprint.hex()}/{plan}/{segments}"
    return hashlib.sha256(text.encode()).hexdigest()


def _resumed(model: Model, state: Path, identity: str) -> CacheStatistics | None:
    """Return what an earlier run found, if it was the same run and its file is whole."""
    if not state.is_file():
        return None
    try:
        arrays = read_arrays(state, state.stat().st_size)  # as written, it is not compressed
        if str(arrays["identity"]) != identity:
            return None
        statistics = CacheStatistics(model, FIRST_STORED_LAYER)
        statistics.restore(arrays)
    except (KeyError, ValueError) as error:
        logger.warning("%s is damaged, so calibration starts anew: %s", state, error)
        return None
    return statistics
