from pathlib import Path

import pytest
from codec_texts import BUNDLED, FOLDER, PLANTED, Text, TextTooShortError, read_files, read_texts

from kvstrata.cluster.quality import FACTS_PER_CONTEXT
from tests.engine.conftest import build_tokenizer

TOKENIZER = build_tokenizer()
TEXT = "\n\n".join(f"Paragraph {i} of a text without facts in it." for i in range(400))


def test_there_are_eight_kinds_and_more_and_their_files_are_small() -> None:
    texts = {text.name: text for text in read_texts(TOKENIZER)}
    assert {"technical", "source", "genesis", "play", "faq", "german", "russian", "japanese"} <= {
        *texts
    }
    assert set(BUNDLED) | {"technical", "source"} == set(texts)
    assert set(PLANTED) == {name for name, text in texts.items() if text.planted}
    sizes = [(FOLDER / f"{name}.txt").stat().st_size for name in BUNDLED]
    assert max(sizes) <= 60_000
    assert sum(sizes) < 600_000
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{name}.txt`" in readme for name in BUNDLED)


def test_english_texts_are_long_enough_for_eight_thousand_tokens() -> None:
    for text in read_texts(TOKENIZER):
        assert len(text.content) > (30_000 if text.planted else 10_000), text.name


@pytest.mark.parametrize("mark", ["", "# "])
def test_facts_are_asked_in_the_words_that_the_prompt_has(mark: str) -> None:
    text = Text("t", TEXT, planted=True, mark=mark)
    context = text.context(TOKENIZER, 1024, 64, segment=0, seed=3)
    assert (len(context.prompt), len(context.rest)) == (1024, 65)
    prompt = TOKENIZER.decode(context.prompt)
    assert len(context.questions) == FACTS_PER_CONTEXT
    for question in context.questions:
        assert question.cue.startswith(f"\n\n{mark}The access code")
        assert prompt.count(f"{question.cue.strip()}{question.answer}.") == 1


def test_contexts_repeat_and_segments_do_not_overlap() -> None:
    text = Text("t", TEXT, planted=False)
    first, again, second = (
        text.context(TOKENIZER, 256, 64, segment=segment, seed=0) for segment in (0, 0, 1)
    )
    assert first == again
    joined = TOKENIZER.decode([*first.prompt, *first.rest, *second.prompt, *second.rest])
    assert TEXT.startswith(joined)
    planted = Text("t", TEXT, planted=True)
    assert planted.context(TOKENIZER, 1024, 9, segment=0, seed=1) != planted.context(
        TOKENIZER, 1024, 9, segment=0, seed=2
    )


def test_a_text_or_a_prompt_that_is_too_short_is_said() -> None:
    with pytest.raises(TextTooShortError, match="t has 9 tokens, 321 needed"):
        Text("t", "too short", planted=False).context(TOKENIZER, 256, 64, segment=0, seed=0)
    with pytest.raises(TextTooShortError, match="a prompt of 256 tokens is too short for facts"):
        Text("t", TEXT, planted=True).context(TOKENIZER, 256, 64, segment=0, seed=0)


def test_files_are_read_as_prose_or_as_source_by_their_suffix(tmp_path: Path) -> None:
    for name in ("a.md", "b.py"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    assert [t.mark for t in read_files([tmp_path / "a.md", tmp_path / "b.py"])] == ["", "# "]
