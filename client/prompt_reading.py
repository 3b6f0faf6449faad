"""The prompt of a command line: an argument, a file or stdin."""

import sys
from pathlib import Path

from kvstrata.client.request import ChatMessage, Prompt
from kvstrata.protos.errors import InvalidRequestError, MalformedMessageError


def as_prompt(text: str, *, chat: bool, system: str | None) -> Prompt:
    """Return the text as it is, or as a user's message."""
    if not chat and system is None:
        return text
    messages = [] if system is None else [ChatMessage("system", system)]
    return [*messages, ChatMessage("user", text)]


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt that was given, exactly one of argument, stdin (``-``) and file.

    Raises:
        InvalidRequestError: None of them, or several.
        MalformedMessageError: Not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise InvalidRequestError(
            "give one prompt" if prompt is None else "both a prompt and --file are given",
            "pass the text as an argument, - for stdin, or --file PATH",
        )
    if file is not None:
        return _decode(str(file), file.read_bytes())
    return _decode("stdin", sys.stdin.buffer.read()) if prompt == "-" else str(prompt)


def _decode(source: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedMessageError(
            f"{source} is not valid UTF-8 at byte {error.start}", "convert it to UTF-8"
        ) from None
