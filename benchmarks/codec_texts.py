"""The texts that ``bench_codec.py`` measures on, cut into contexts with planted facts.

None of them is calibration text. ``technical`` and ``source`` come with Python; the others lie in
``texts/``, whose README says where they are from.
"""

import inspect
import pydoc_data.topics
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstrata.cluster.quality import plant_facts

FOLDER = Path(__file__).parent / "texts"
SOURCE_MODULES = ("argparse", "configparser", "fractions", "shelve")
BUNDLED = (
    "genesis",
    "luke",
    "alice",
    "play",
    "faq",
    "quotes",
    "german",
    "russian",
    "japanese",
    "french",
    "table",
)
# Facts are English sentences, so they are planted where they are no foreign body.
PLANTED = ("technical", "source", "genesis", "luke", "alice", "play", "faq", "quotes")
SPARE_TOKENS = 32  # where facts are cut in, tokens merge otherwise than counted
CHAT = "faq"


@dataclass(frozen=True, slots=True)
class Question:
    """A cue whose answer only the context tells."""

    cue: str
    answer: str


@dataclass(frozen=True, slots=True)
class Context:
    """A prompt, the text that follows it, and the facts planted in the prompt.

    Attributes:
        text: Name of the text.
        prompt: Token ids, all of whose KV is compressed.
        rest: Token ids of the continuation; the last is only predicted.
        questions: Empty where no facts were planted.
    """

    text: str
    prompt: list[int]
    rest: list[int]
    questions: tuple[Question, ...]


class TextTooShortError(ValueError):
    """A text has fewer tokens than a context of it needs."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text and how facts are planted in it.

    Attributes:
        name: For the tables.
        content: All of it.
        planted: Whether facts are planted.
        mark: What begins a line of its own in this text: "# " in source code.
    """

    name: str
    content: str
    planted: bool
    mark: str = ""

    def context(
        self, tokenizer: Any, num_prompt: int, num_rest: int, *, segment: int, seed: int
    ) -> Context:
        """Return piece number ``segment``; pieces do not overlap.

        Raises:
            TextTooShortError: The text ends before this piece does.
        """
        ids = tokenizer.encode(self.content, add_special_tokens=False, verbose=False)
        begins_with = tokenizer.encode("", verbose=False)
        size = num_prompt + num_rest + 1
        piece = ids[segment * size : (segment + 1) * size]
        if len(piece) < size:
            raise TextTooShortError(
                f"{self.name} has {len(ids)} tokens, {(segment + 1) * size} needed"
            )
        questions: tuple[Question, ...] = ()
        if self.planted:
            end = num_prompt - self._num_fact_tokens(tokenizer, seed)
            if end < num_prompt // 2:
                raise TextTooShortError(f"a prompt of {num_prompt} tokens is too short for facts")
            head, questions = self._plant(tokenizer.decode(piece[:end]), seed)
            head += tokenizer.decode(piece[end:])
            piece = tokenizer.encode(head, add_special_tokens=False, verbose=False)
        piece = [*begins_with, *piece][:size]
        return Context(self.name, piece[:num_prompt], piece[num_prompt:], questions)

    def _num_fact_tokens(self, tokenizer: Any, seed: int) -> int:
        lines = [f"{self.mark}{fact.statement}\n\n" for fact in plant_facts("", seed)[1]]
        return SPARE_TOKENS + sum(
            len(tokenizer.encode(line, add_special_tokens=False)) for line in lines
        )

    def _plant(self, head: str, seed: int) -> tuple[str, tuple[Question, ...]]:
        head, facts = plant_facts(head, seed)
        for fact in facts:
            head = head.replace(fact.statement, self.mark + fact.statement)
        return head, tuple(
            Question(fact.cue.replace("\n\n", f"\n\n{self.mark}"), f" {fact.digits}")
            for fact in facts
        )


def read_texts(tokenizer: Any) -> list[Text]:
    """Return all default texts, technical English first."""
    topics = pydoc_data.topics.topics
    technical = "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 3000)
    texts = [
        Text("technical", technical, planted=True),
        Text("source", _source(), planted=True, mark="# "),
    ]
    for name in BUNDLED:
        content = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
        if name == CHAT:
            content = _conversation(tokenizer, content)
        texts.append(Text(name, content, planted=name in PLANTED))
    return texts


def read_files(paths: Sequence[Path]) -> list[Text]:
    """Return texts of files: source code by its ``.py``, facts planted in all.

    Raises:
        OSError: A file cannot be read.
        UnicodeDecodeError: A file is not UTF-8.
    """
    return [
        Text(
            path.name,
            path.read_text(encoding="utf-8"),
            planted=True,
            mark="# " if path.suffix == ".py" else "",
        )
        for path in paths
    ]


def _source() -> str:
    modules = (__import__(name) for name in SOURCE_MODULES)
    return "\n\n".join(inspect.getsource(module) for module in modules)


def _conversation(tokenizer: Any, content: str) -> str:
    """Return questions and answers in the model's own chat format, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return content
    rendered: str = tokenizer.apply_chat_template(list(_turns(content)), tokenize=False)
    return rendered


def _turns(content: str) -> Iterator[dict[str, str]]:
    for pair in re.split(r"\n\n(?=Q: )", content):
        question, _, answer = pair.removeprefix("Q: ").partition("\n\nA: ")
        yield {"role": "user", "content": question.strip()}
        yield {"role": "assistant", "content": answer.strip()}
