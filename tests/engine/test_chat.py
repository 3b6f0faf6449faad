"""Chat messages and texts to token ids."""

from typing import Any

import pytest

from kvstrata.engine import Model, encode_text, render_chat
from tests.engine.conftest import build_tokenizer


def test_a_conversation_ends_where_the_reply_begins(smollm2: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  ö"}]
    text = smollm2.tokenizer.decode(render_chat(smollm2.tokenizer, messages))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi  ö<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role must be one of"),
        ([{"content": "x"}], "role must be one of"),
        ([{"role": "user"}], "content must be a text, not NoneType"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
    ],
)
def test_wrong_messages_are_refused(messages: list[Any], message: str, smollm2: Model) -> None:
    with pytest.raises(ValueError, match=message):
        render_chat(smollm2.tokenizer, messages)


def test_a_tokenizer_without_a_template_is_named_as_the_reason() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        render_chat(build_tokenizer(), [{"role": "user", "content": "x"}])


def test_a_template_that_refuses_the_messages_raises_a_value_error() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        render_chat(tokenizer, [{"role": "user", "content": "x"}])


def test_text_is_encoded_whole_by_the_tokenizers_own_rule(smollm2: Model) -> None:
    text = "word " * 9000
    assert smollm2.tokenizer.decode(encode_text(smollm2.tokenizer, text)) == text
    with pytest.raises(ValueError, match="not valid Unicode"):
        encode_text(smollm2.tokenizer, "\udfff")
