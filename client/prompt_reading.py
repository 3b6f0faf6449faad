"""The prompt of a command line: an argument, a file or stdin, and the images that it shows."""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvstrata.client.request import ChatMessage, Prompt
from kvstrata.client.visuals import Visual
from kvstrata.protos.errors import (
    InvalidRequestError,
    MalformedMessageError,
    TextOnlyModelError,
)


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


def read_visuals(paths: Sequence[Path]) -> list[Visual]:
    """Return the picture of each file, and of each folder a video: its files in order of name."""
    return [
        sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
        if path.is_dir()
        else path
        for path in paths
    ]


def show_images(text: str, placeholder: str, num_images: int) -> str:
    """Return the text with a placeholder for each image: before it, where it has none.

    Raises:
        TextOnlyModelError: The model has no placeholder.
    """
    if not placeholder:
        raise TextOnlyModelError(
            "the served model reads text alone", "leave out --image, or serve one that sees"
        )
    return text if placeholder in text else f"{placeholder * num_images}\n{text}"


def _decode(source: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedMessageError(
            f"{source} is not valid UTF-8 at byte {error.start}", "convert it to UTF-8"
        ) from None
