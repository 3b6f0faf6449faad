"""Claim: the papers' methods keep a vision-language model's answers with a fraction of its KV.

The model is the small one of ``vision_model.py``, trained on synthetic pictures and videos. Each
question about a held-out scene is a prompt of its own, which a running sequence answers as in a
node: the prompt's full blocks are computed, sealed and attended as they were sealed, the question
follows, and the right answer is teacher-forced. It counts if each of its tokens and its end are
the likeliest: then a greedy answer is right to the letter. ``perplexity``, ``kl`` and ``top1`` are
of those tokens, the latter two against the uncompressed cache. ``ratio`` is bf16 against what is
stored of the blocks, masks included; for H2O and its peers, which store everything and drop tokens
of the running cache alone, tokens against those kept. ``important`` is ZipVL's share of tokens per
layer; attention over those alone is a share r^2 of the operations. Rows are of pictures, and of
videos of two to four frames.
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
from methods_plot import draw_vision
from vision_model import END, prompt_of
from vision_scenes import Scene, picture, video

from kvstrata.engine.chat import encode_text
from kvstrata.engine.images import Image
from kvstrata.engine.model import Model
from kvstrata.engine.new_sequence import new_sequence
from kvstrata.engine.selecting_sequence import SelectingSequence
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.fallback import FallbackCodec
from kvstrata.methods.h2o import H2O, Seats
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import PUBLISHED, Method
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.identity import BLOCK_TOKENS, image_token_ids

HELD_OUT = 1 << 20  # the seed of scenes that training never draws
TAUS = (0.975, 0.96, 0.9)
BUDGETS = (0.5, 0.2)
SINKS = 4
PEERS = ("streaming", "random")
COLUMNS = (
    *("method", "budget", "shown", "tokens", "accuracy", "perplexity", "kl", "top1", "ratio"),
    *("kept", "r", "prefill_ms", "asked"),
)


@dataclass(frozen=True, slots=True)
class Chance(H2O):
    """A peer: tokens leave at random, but for the first and the newest, as many as H2O's."""

    seed: int = 0

    def keep(
        self, scores: torch.Tensor, positions: torch.Tensor, seats: Seats, *, decoding: bool = False
    ) -> torch.Tensor:
        """Return which of the held tokens stay; see ``H2O.keep``."""
        draw = torch.Generator().manual_seed(self.seed)
        return H2O.keep(
            self, torch.rand(scores.shape, generator=draw), positions, seats, decoding=decoding
        )


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
    for share in BUDGETS:
        half = share / 2
        for name, stage in (
            ("h2o", H2O(half, half)),
            ("h2o, with sinks", H2O(half, half, sinks=SINKS)),
            ("streaming", H2O(SINKS, share, sinks=SINKS)),
            ("random", Chance(half, half, sinks=SINKS)),
        ):
            found[name, share] = Method(ExactCodec(), pipeline=Pipeline(evict=stage))
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
    log_p: list[torch.Tensor] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
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


def ask(model: Model, method: Method, asked: Asked, tally: Tally) -> None:
    """Have the model answer, and count how well it did and what it took."""
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
    told = encode_text(model.tokenizer, f" {asked.answer}")
    rows = [logits]
    for token in told:
        rows.append(sequence.extend([token])[0])
    wanted = torch.tensor([*told, model.tokenizer.convert_tokens_to_ids(END)])
    log_p = torch.stack(rows).float().log_softmax(-1)
    tally.right[asked.kind].append(bool((log_p.argmax(-1) == wanted).all()))
    tally.nll += (-log_p.gather(-1, wanted[:, None])).flatten().tolist()
    tally.log_p.append(log_p)


def measure(model: Model, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Return a row per method and kind of prompt."""
    per_token = model.spec.kv_bytes_per_token_bf16
    rows = []
    reference: dict[str, torch.Tensor] = {}
    for (name, budget), method in methods().items():
        tallies = {"pictures": Tally(), "videos": Tally()}
        for one in asked:
            tally = tallies["videos" if len(one.images) > 1 else "pictures"]
            with model.images.hold(one.images):
                ask(model, method, one, tally)
        for shown, tally in tallies.items():
            right = [r for kind in tally.right.values() for r in kind]
            if not right:
                continue
            log_p = torch.cat(tally.log_p)
            told = reference.setdefault(shown, log_p)
            row: dict[str, Any] = {
                "bench": "methods",
                "model": model.name,
                "method": name,
                "peer": name in PEERS,
                "budget": budget,
                "shown": shown,
                "tokens": tally.num_tokens,
                "asked": len(right),
                "accuracy": round(sum(right) / len(right), 4),
                "perplexity": round(math.exp(sum(tally.nll) / len(tally.nll)), 4),
                "kl": round(float((told.exp() * (told - log_p)).sum(-1).mean()), 5),
                "top1": round(float((told.argmax(-1) == log_p.argmax(-1)).float().mean()), 4),
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
    Console(width=150).print(table)


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
        draw_vision(rows, records.FOLDER)
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
