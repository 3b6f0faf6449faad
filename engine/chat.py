"""Text and chat messages to token ids.

Not covered: a message whose text spells a special token (``<|im_end|>``) is tokenised as that
token, as in transformers; the gateway decides whether to let such text in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of ``text``, with the special tokens that the tokenizer adds by its own rule.

    Raises:
        ValueError: ``text`` is not valid Unicode (a lone surrogate).
    """
    _check_unicode(text)
    ids: list[int] = tokenizer.encode(text, verbose=False)
    return ids


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the ids of a conversation, ending where the assistant's reply begins.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        messages: Each with the keys ``role``, one of ``ROLES``, and ``content``, a text.

    Raises:
        ValueError: No chat template, no messages, an unknown role, a content that is not a text,
            or a conversation that the template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template; send a plain prompt instead")
    if not messages:
        raise ValueError("messages must hold at least one message")
    for index, message in enumerate(messages):
        _check_message(index, message)
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:  # A template is a program: it may raise anything.
        raise ValueError(f"the model's chat template refuses the messages: {error}") from error
    return ids


def _check_message(index: int, message: Mapping[str, str]) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{index}].role must be one of {', '.join(ROLES)}, not {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"messages[{index}].content must be a text, not {type(content).__name__}")
    _check_unicode(content)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: {error}") from error
