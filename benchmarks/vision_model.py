"""A small vision-language model, trained here on synthetic pictures and videos (``vision_scenes``).

    python -P benchmarks/vision_model.py --out FOLDER

A LLaVA of transformers: a CLIP tower of 2 layers and a Llama of 5, 1.4 million parameters, with
a tokenizer whose words are those of the questions. Every scene is seen once, so the loss is that of
scenes not seen before; accuracy is on scenes of another seed. Resumes where it stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.append(str(Path(__file__).parent))  # `python -P` leaves it out, for the rooms' sake

from vision_scenes import CELL, SIDE, Scene, picture, video

PATCH = CELL  # what a cell shows is one token: a tower this small learns little else in minutes
IMAGE_TOKENS = (SIDE // PATCH) ** 2
IMAGE, END, PAD = "<image>", "<end>", "<pad>"
QUESTIONS = 8  # asked of each training scene, one after the other
VIDEO_SHARE = 4  # one batch in so many is of videos, of as many frames


def prompt_of(question: str) -> str:
    """Return what is asked about one picture or video."""
    return f"{IMAGE}\n{question}"


def build_tokenizer() -> Any:
    """Return a byte-level tokenizer to which each word of a question or answer is one token."""
    draw = np.random.default_rng(0)
    said = [
        f"{q} {a}\n"
        for _ in range(400)
        for s in (picture(draw), video(draw))
        for q, a in s.questions
    ]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        said,
        trainers.BpeTrainer(
            vocab_size=384,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    inner.add_special_tokens([AddedToken(t, special=True) for t in (PAD, END, IMAGE)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return the untrained model."""
    torch.manual_seed(seed)
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=96,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return transformers.LlavaForConditionalGeneration(config)


def build_processor() -> Any:
    """Return the image processor that belongs to the model."""
    size = {"height": SIDE, "width": SIDE}
    return transformers.CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def batch_of(scenes: Sequence[Scene], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Return pixels, ids and labels, of which only answers are learned, and the words of cells.

    ``words`` is int64 (frames * IMAGE_TOKENS, 2): what a cell shows, in two tokens that may be the
    same; padding where it shows nothing.
    """
    image, end = tokenizer.convert_tokens_to_ids(IMAGE), tokenizer.eos_token_id
    rows, labels = [], []
    for scene in scenes:
        ids = [image] * (IMAGE_TOKENS * len(scene.frames))
        said = [-100] * len(ids)
        for question, answer in scene.questions[:QUESTIONS]:
            asked = tokenizer.encode(f"\n{question}")
            told = [*tokenizer.encode(f" {answer}"), end]
            ids += asked + told
            said += [-100] * len(asked) + told
        rows.append(ids)
        labels.append(said)
    longest = max(map(len, rows))
    words = torch.full(
        (sum(len(s.frames) for s in scenes), IMAGE_TOKENS, 2), tokenizer.pad_token_id
    )
    for frame, held in enumerate(cells for scene in scenes for cells in scene.shown):
        for cell, name in held.items():
            said_here = [tokenizer.encode(f" {word}") for word in name.split()]
            words[frame, cell] = torch.tensor([said_here[0][0], said_here[-1][0]])
    pixels = np.stack([frame for scene in scenes for frame in scene.frames])
    return {
        "pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1,
        "input_ids": torch.tensor(
            [r + [tokenizer.pad_token_id] * (longest - len(r)) for r in rows]
        ),
        "labels": torch.tensor([r + [-100] * (longest - len(r)) for r in labels]),
        "words": words.flatten(0, 1),
    }


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of the answers, and that of naming what each cell shows by its feature alone.

    The latter aligns the tower with the words, as the first stage of LLaVA (arXiv:2304.08485) does
    with captions: without it, a model of this size guesses from the question for 1,000 updates.
    """
    words = batch.pop("words")
    found = model(**batch)
    rows = model.lm_head(model.model.language_model.norm(found.image_hidden_states))
    log_p = rows.log_softmax(-1)
    named = -log_p.gather(-1, words).mean(-1)
    empty = words[:, 0] == model.config.text_config.pad_token_id
    return found.loss, named[empty].mean() + named[~empty].mean()


def train(folder: Path, *, steps: int, batch: int, rate: float, seed: int, save_s: float) -> Any:
    """Train, or go on training, and return the model in eval mode."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    state = folder / "training.pt"
    first, losses = 0, list[float]()
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        first, losses = saved["step"], saved["losses"]
    model.train()
    began, saved_at = time.monotonic(), time.monotonic()
    for step in range(first, steps):
        scale = min(1.0, (step + 1) / 100, (steps - step) / (0.45 * steps))
        for group in optimiser.param_groups:
            group["lr"] = rate * scale
        draw = np.random.default_rng([seed, step])
        shows = step % VIDEO_SHARE == VIDEO_SHARE - 1
        scenes = (
            [video(draw) for _ in range(batch // 3)]
            if shows
            else [picture(draw) for _ in range(batch)]
        )
        loss, naming = loss_of(model, batch_of(scenes, tokenizer))
        optimiser.zero_grad()
        (loss + naming).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(round(float(loss.detach()), 4))
        if step % 50 < 2 or step == steps - 1:
            kind = "video" if shows else "picture"
            seconds = time.monotonic() - began
            print(
                f"{step} {kind} loss {losses[-1]}, of names {naming.item():.3f}, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if time.monotonic() - saved_at > save_s or step == steps - 1:
            folder.mkdir(parents=True, exist_ok=True)
            saved_at = time.monotonic()
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step + 1,
                    "losses": losses,
                },
                state,
            )
    return model.eval()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16, help="pictures an update")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def write(model: Any, folder: Path) -> None:
    """Write the model, its tokenizer and its processor, as transformers reads them."""
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    build_processor().save_pretrained(folder)


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    model = train(
        options.out,
        steps=options.steps,
        batch=options.batch,
        rate=options.rate,
        seed=options.seed,
        save_s=20,
    )
    write(model, options.out)
    print(json.dumps({"model": str(options.out), "parameters": model.num_parameters()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
