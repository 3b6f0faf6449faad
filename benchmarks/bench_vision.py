"""Claim: the papers' methods keep a vision-language model's answers with a fraction of its KV.

The model is the small one of ``vision_model.py``, trained on synthetic pictures and videos. Each
question about a held-out scene is a prompt of its own, which a running sequence answers as in a
node: the prompt's full blocks are computed, sealed and attended as they were sealed, the question
follows, the answer is greedy and counts if it is right to the letter. ``ratio`` is bf16 against
what is stored of the blocks, masks included; for H2O, which stores everything and drops tokens of
the running cache alone, tokens against those kept. ``important`` is ZipVL's share of tokens per
layer; attention over those alone is a share r^2 of the operations. Rows are of prompts of equal
length: pictures, and videos of two to four frames.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

import records
from vision_model import END, prompt_of
from vision_scenes import Scene, picture, video

from kvstrata.engine.chat import encode_text
from kvstrata.engine.images import Image
from kvstrata.engine.model import Model
from kvstrata.engine.new_sequence import new_sequence
from kvstrata.engine.selecting_sequence import SelectingSequence
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import PUBLISHED, Method
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.identity import BLOCK_TOKENS, image_token_ids

HELD_OUT = 1 << 20  # the seed of scenes that training never draws
TAUS = (0.975, 0.96, 0.9)
MAX_ANSWER = 6
COLUMNS = ("method", "budget", "tokens", "accuracy", "ratio", "kept", "r", "asked")


def methods() -> dict[tuple[str, float], Method]:
    """Return what is measured, by name and budget."""
    published = ZipCacheCodec(PUBLISHED)
    found = {
        ("uncompressed", 1.0): Method(ExactCodec()),
        ("fallback", 1.0): Method(FallbackCodec()),
        ("zipcache as published", 1.0): Method(published, pipeline=Pipeline(quantise=PUBLISHED)),
    }
    for tau in TAUS:
        low = Pipeline(attention=ZipVL(tau=tau, min_tokens=0), quantise=PUBLISHED)
        found["zipvl, rest in low bits", tau] = Method(published, pipeline=low)
        out = Pipeline(attention=ZipVL(tau=tau, min_tokens=0, rest="evict"), quantise=PUBLISHED)
        found["zipvl, rest evicted", tau] = Method(published, pipeline=out)
    for share in (0.5, 0.2):
        evict = Pipeline(evict=H2O(heavy=share / 2, recent=share / 2))
        found["h2o", share] = Method(ExactCodec(), pipeline=evict)
    return found


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about a scene."""

    images: tuple[Image, ...]
    question: str
    answer: str
    kind: str


@dataclass(slots=True)
class Tally:
    """What was found of one method on prompts of one kind."""

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    num_tokens: int = 0
    stored_bytes: int = 0
    stored_tokens: int = 0
    kept: list[float] = field(default_factory=list)
    important: list[list[float]] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)


def questions(num_pictures: int, num_videos: int, seed: int) -> list[Asked]:
    """Return a question about each of some scenes."""
    draw = np.random.default_rng([HELD_OUT, seed])
    scenes: list[Scene] = [picture(draw) for _ in range(num_pictures)]
    scenes += [video(draw) for _ in range(num_videos)]
    return [
        Asked(
            tuple(Image(*frame.shape[:2], frame.tobytes()) for frame in scene.frames),
            *scene.questions[0],
            scene.kinds[0],
        )
        for scene in scenes
    ]


def answer(model: Model, method: Method, asked: Asked, tally: Tally) -> str:
    """Return what the model says, and count what it took."""
    assert model.vision is not None
    ids: list[int] = []
    for token in encode_text(model.tokenizer, prompt_of(asked.question)):
        if token == model.vision.placeholder_id:
            for image in asked.images:
                ids += image_token_ids(image.digest, model.vision.num_tokens)
        else:
            ids.append(token)
    sequence = new_sequence(model, method, ids)
    num_blocks = (len(ids) - 1) // BLOCK_TOKENS
    begin = time.perf_counter()
    for _ in sequence.compute(num_blocks * BLOCK_TOKENS):
        pass
    tally.prefill_s.append(time.perf_counter() - begin)
    sequence.settle(sequence.seal(0, num_blocks))
    logits, _ = sequence.extend(ids[num_blocks * BLOCK_TOKENS :])
    if isinstance(sequence, SelectingSequence) and sequence.important is not None:
        tally.important.append(sequence.important.float().mean(1).tolist())
    tally.kept.append(sequence.kept_fraction)
    tally.stored_bytes += sum(sequence.layer_bytes)
    tally.stored_tokens += sequence.num_stored_tokens
    tally.num_tokens = max(tally.num_tokens, len(ids))
    said: list[int] = []
    end = model.tokenizer.convert_tokens_to_ids(END)
    while len(said) < MAX_ANSWER:
        token = int(logits.argmax())
        if token == end:
            break
        said.append(token)
        logits, _ = sequence.extend([token])
    return str(model.tokenizer.decode(said)).strip()


def measure(model: Model, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Return a row per method and kind of prompt."""
    per_token = model.spec.kv_bytes_per_token_bf16
    rows = []
    for (name, budget), method in methods().items():
        tallies = {"pictures": Tally(), "videos": Tally()}
        for one in asked:
            tally = tallies["videos" if len(one.images) > 1 else "pictures"]
            with model.images.hold(one.images):
                said = answer(model, method, one, tally)
            tally.right[one.kind].append(said == one.answer)
        for shown, tally in tallies.items():
            right = [r for kind in tally.right.values() for r in kind]
            if not right:
                continue
            row: dict[str, Any] = {
                "bench": "methods",
                "model": model.name,
                "method": name,
                "peer": False,
                "budget": budget,
                "shown": shown,
                "tokens": tally.num_tokens,
                "asked": len(right),
                "accuracy": round(sum(right) / len(right), 4),
                "ratio": round(tally.stored_tokens * per_token / tally.stored_bytes, 3),
                "kept": round(sum(tally.kept) / len(tally.kept), 4),
                "prefill_ms": round(1000 * median(tally.prefill_s), 2),
            }
            if method.codec.lossless:  # what is stored is whole; the running cache is what counts
                row["ratio"] = round(1 / row["kept"], 3)
            row["by_kind"] = {k: round(sum(v) / len(v), 4) for k, v in tally.right.items()}
            if tally.important:
                layers = np.array(tally.important)
                row["important"] = [round(float(r), 4) for r in layers.mean(0)]
                row["r"] = round(float(layers.mean()), 4)
                row["attention_cut"] = round(float(1 - (layers**2).mean()), 4)
            rows.append(row)
        print(f"{name} {budget:g}: {rows[-2:]}", file=sys.stderr)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="questions about held-out scenes")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(str(row.get(name, "-")) for name in COLUMNS))
    Console(width=110).print(table)


def spread(accuracy: float, asked: int) -> float:
    """Return the standard error of a share."""
    return math.sqrt(accuracy * (1 - accuracy) / asked)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of vision_model.py")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="20 pictures, 10 videos; not saved")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--no-save", action="store_true", help="leave results/ as it is")
    options = parser.parse_args()
    if options.quick:
        options.pictures, options.videos = 20, 10
    torch.set_num_threads(1)
    model = Model.load(str(options.model), dtype="float32", device="cpu")
    rows = measure(model, questions(options.pictures, options.videos, options.seed))
    if not (options.no_save or options.quick):
        facts = records.machine("transformers", "numba") | {"seed": options.seed}
        records.save("vision", rows, **facts)
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
