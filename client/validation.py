"""Checks of single values that come from a user; each returns the value it accepts."""

import math
import operator
from typing import Any

from kvstrata.protos.errors import (
    ConfigurationError,
    InvalidRequestError,
    LimitError,
    MalformedMessageError,
)

MAX_SECONDS = 1e8  # about three years; far beyond it gRPC's deadline overflows


def check_text(name: str, value: object) -> str:
    """Return ``value`` if it is text that UTF-8 can carry."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{name} is a {type(value).__name__}", "give text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MalformedMessageError(
            f"{name} is not valid Unicode: lone surrogate at character {error.start}",
            "decode the text with the right encoding before sending it",
        ) from None
    return value


def check_integer(name: str, value: object, lowest: int, highest: int) -> int:
    """Return ``value`` as an int within the range; NumPy integers pass, booleans do not."""
    index: Any = value
    try:
        number = operator.index(index)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InvalidRequestError(f"{name} is {_show(value)}, not an integer", "give an integer")
    if not lowest <= number <= highest:
        raise LimitError(
            f"{name} is {_show(number)}", f"give an integer from {lowest} to {highest}"
        )
    return number


def check_number(name: str, value: object, lowest: float, highest: float) -> float:
    """Return ``value`` as a finite float within the range."""
    number: Any = value
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(number)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not lowest <= number <= highest:  # false for NaN as well
        span = f"of at least {lowest:g}" if highest > 1e30 else f"from {lowest:g} to {highest:g}"
        raise LimitError(f"{name} is {_show(value)}", f"give a finite number {span}")
    return float(number)


def check_seconds(name: str, value: object) -> float:
    """Return ``value`` as a time limit: positive and finite, because every call ends some time."""
    try:
        seconds = check_number(name, value, 0.0, MAX_SECONDS)
    except LimitError:
        seconds = 0.0
    if not seconds:
        raise LimitError(
            f"{name} is {_show(value)}", f"give seconds above 0 and at most {MAX_SECONDS:.0f}"
        )
    return seconds


def check_address(address: object) -> str:
    """Return ``address`` if it can be a gRPC target such as "host:port" or "unix:/run/x.sock"."""
    if not isinstance(address, str) or not address.strip() or not address.isprintable():
        raise ConfigurationError(f"no address: {_show(address)}", 'give "host:port"')
    if address.startswith(("http://", "https://")):
        raise ConfigurationError(
            f"{address[:80]!r} is a web address, this client speaks gRPC",
            'give the gateway\'s gRPC address as "host:port"',
        )
    return address


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
