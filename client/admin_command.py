"""What the subcommands of ``kvctl`` share: options, and printing for people or for programs."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvstrata.protos.errors import InvalidRequestError
from kvstrata.protos.identity import HASH_BYTES

Timeout = Annotated[float, typer.Option(help="Time limit in seconds.")]
Key = Annotated[str, typer.Argument(help="A block key as `kvctl ls` prints it.")]
Keys = Annotated[list[str], typer.Argument(help="Block keys as `kvctl ls` prints them.")]


def show(found: dict[str, Any], as_json: bool, draw: Callable[[dict[str, Any]], None]) -> None:
    """Print ``found`` as one JSON object, or as ``draw`` does."""
    if as_json:
        typer.echo(json.dumps(found))
    else:
        draw(found)


def parse_scope(text: str) -> bytes:
    """Return a scope from its hex digits; empty for none.

    Raises:
        InvalidRequestError: Not a scope.
    """
    try:
        scope = bytes.fromhex(text)
    except ValueError:
        scope = b"?"
    if len(scope) not in (0, HASH_BYTES):
        raise InvalidRequestError(
            f"not a scope (32 hex digits): {text[:80]!r}",
            "take the part of a block key before its dot",
        )
    return scope
