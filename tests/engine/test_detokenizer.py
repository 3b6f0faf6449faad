"""Streaming text: joined deltas are the decoded text, and stop strings never leak."""

import random
from itertools import pairwise
from typing import Any

import pytest

from kvstrata.engine import Detokenizer, Model
from tests.engine.conftest import build_tokenizer

TEXTS = {
    "english": "The cache holds  keys, and values.\n\nEach block is stored once .",
    "german": "Größere Blöcke überqueren die Straße; »natürlich« äöüß.",
    "chinese": "缓存保存键和值。每个块只存储一次，任何精度都可读取。",  # noqa: RUF001
    "emoji": "ok 👩‍👩‍👧‍👦🎉🏳️‍🌈 done 🇩🇪",
    "code": "def f(x):\n\treturn {'a': [x ** 2  for _ in range(3)]}  # näh\n",
}


def _stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("stop", [(), ("never appears", "\n\n\n")], ids=["no-stop", "stop"])
def test_deltas_joined_are_the_decoded_text(
    name: str, stop: tuple[str, ...], smollm2: Model
) -> None:
    ids = smollm2.tokenizer.encode(TEXTS[name])
    detokenizer = Detokenizer(smollm2.tokenizer, stop)
    deltas = _stream(detokenizer, ids)
    assert "".join(deltas) == TEXTS[name] == _decode(smollm2.tokenizer, ids)
    assert "\ufffd" not in "".join(deltas)
    assert detokenizer.emitted_chars == len(TEXTS[name])
    assert detokenizer.stopped is None


def test_random_tokens_with_broken_bytes_still_give_the_decoded_text(smollm2: Model) -> None:
    generator = random.Random(0)
    for _ in range(30):
        ids = [generator.randrange(0, 600) for _ in range(60)]
        deltas = _stream(Detokenizer(smollm2.tokenizer), ids)
        assert "".join(deltas) == _decode(smollm2.tokenizer, ids)


def test_special_tokens_give_no_text_and_cost_no_memory(smollm2: Model) -> None:
    ids = smollm2.tokenizer.encode("a b")
    detokenizer = Detokenizer(smollm2.tokenizer)
    deltas = _stream(detokenizer, [ids[0], *[2] * 5000, *ids[1:]])
    assert "".join(deltas) == "a b"


def test_a_character_cut_in_half_is_replaced_at_the_end() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode("a🎉")[:-1]
    assert _stream(Detokenizer(tokenizer), ids) == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize(
    ("text", "stop", "shown", "stopped"),
    [
        ("one END two", ("END",), "one ", "END"),
        ("aab", ("ab",), "a", "ab"),
        ("ababac", ("abac",), "ab", "abac"),
        ("xabc", ("abc", "b"), "xa", "b"),
        ("xabc", ("bc", "abc"), "x", "abc"),
        ("aEN", ("END",), "aEN", None),
        ("né🎉!", ("🎉",), "né", "🎉"),
        ("STOP", ("STOP",), "", "STOP"),
    ],
)
def test_stop_strings_end_the_text_however_it_is_cut(
    text: str, stop: tuple[str, ...], shown: str, stopped: str | None, smollm2: Model
) -> None:
    for tokenizer in (build_tokenizer(), smollm2.tokenizer):
        detokenizer = Detokenizer(tokenizer, stop)
        ids = tokenizer.encode(text, add_special_tokens=False)
        deltas = _stream(detokenizer, ids)
        assert ("".join(deltas), detokenizer.stopped) == (shown, stopped)
        assert detokenizer.emitted_chars == len(shown)
        assert detokenizer.push(ids[0]) == "" or stopped is None


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    tokenizer = build_tokenizer()
    detokenizer = Detokenizer(tokenizer, ("\n\nQ",))
    deltas = _stream(detokenizer, tokenizer.encode("a\nb\n\nA"))
    assert deltas == ["a", "", "\nb", "", "", "\n\nA", ""]
    shown = ["".join(deltas[:n]) for n in range(len(deltas) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
