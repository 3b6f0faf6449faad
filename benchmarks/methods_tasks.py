"""What is asked of a prompt of which less is kept: planted facts, lines, and passages to repeat.

Facts are those of ``bench_codec.py``. Lines are a list of names and numbers in the middle of a real
text, of which some are asked for. Passages are pieces of the prompt itself: given its beginning,
the model has to go on as the text did. A question counts where the uncompressed model is right.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from codec_texts import Context, Question, Text, TextTooShortError

COLOURS = ("amber", "blue", "coral", "green", "ivory", "olive", "pink", "red", "violet", "white")
ANIMALS = ("bear", "crane", "deer", "eagle", "frog", "goat", "horse", "lynx", "otter", "wolf")
LINES, ASKED = 24, 8
CUE_TOKENS, ANSWER_TOKENS, PASSAGES = 16, 4, 12


@dataclass(frozen=True, slots=True)
class Tasks:
    """A context, and how many of its questions are of which kind, in this order."""

    context: Context
    facts: int
    lines: int
    passages: int


def of_text(
    text: Text, tokenizer: Any, num_prompt: int, num_rest: int, *, segment: int, seed: int
) -> Tasks:
    """Return a piece of a text with facts and passages to ask for.

    Raises:
        TextTooShortError: The text ends before this piece does.
    """
    context = text.context(tokenizer, num_prompt, num_rest, segment=segment, seed=seed)
    passages = _passages(context.prompt, tokenizer, seed)
    asked = replace(context, questions=(*context.questions, *passages))
    return Tasks(asked, len(context.questions), 0, len(passages))


def with_lines(text: Text, tokenizer: Any, num_prompt: int, num_rest: int, *, seed: int) -> Tasks:
    """Return a piece of a text with a list in its middle, and lines of it to ask for.

    Raises:
        TextTooShortError: The text is too short.
    """
    draw = random.Random(seed)
    names = draw.sample([f"{c} {a}" for c in COLOURS for a in ANIMALS], LINES)
    numbers = {name: f"{draw.randrange(1000, 10_000)}" for name in names}
    listed = "".join(f"{text.mark}The {name}: number {numbers[name]}.\n" for name in names)
    lines = tokenizer.encode(f"\n\n{listed}\n", add_special_tokens=False)
    ids = tokenizer.encode(text.content, add_special_tokens=False, verbose=False)
    filler = num_prompt - len(lines)
    if filler < len(lines) or len(ids) < filler + num_rest + 1:
        raise TextTooShortError(f"{text.name} is too short for {num_prompt} tokens with a list")
    begins_with = tokenizer.encode("", verbose=False)
    head, tail = ids[: filler // 2], ids[filler // 2 :]
    piece = [*begins_with, *head, *lines, *tail][: num_prompt + num_rest + 1]
    asked = draw.sample(names, ASKED)
    questions = tuple(
        Question(f"\n\n{text.mark}The {name}: number", f" {numbers[name]}") for name in asked
    )
    context = Context(f"{text.name} lines", piece[:num_prompt], piece[num_prompt:], questions)
    return Tasks(context, 0, len(questions), 0)


def _passages(prompt: Sequence[int], tokenizer: Any, seed: int) -> list[Question]:
    """Return pieces of the prompt, their beginnings as cues."""
    draw = random.Random(seed)
    last = len(prompt) - 256 - CUE_TOKENS - ANSWER_TOKENS  # not what is recent anyway
    places = sorted(draw.sample(range(64, last), PASSAGES)) if last > 64 + PASSAGES else []
    questions = []
    for place in places:
        cue = tokenizer.decode(prompt[place : place + CUE_TOKENS])
        end = place + CUE_TOKENS + ANSWER_TOKENS
        answer = tokenizer.decode(prompt[place + CUE_TOKENS : end])
        if answer.strip():
            questions.append(Question(f"\n\n{cue}", answer))
    return questions
