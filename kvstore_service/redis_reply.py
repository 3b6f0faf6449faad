"""Cutting the replies of Redis (RESP2) out of what a socket gave, values with one copy."""

import re
from collections.abc import Callable
from typing import Any

from redis.exceptions import InvalidResponse

_MAX_LINE_BYTES = 64 << 10
_MAX_ITEMS = 1 << 20
_MAX_DEPTH = 8
_NUMBER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_LINE_END = b"\r\n"


class ReplyParser:
    """Takes bytes as they come, and gives replies. hiredis is the reference, for all it accepts.

    Args:
        max_value_bytes: No longer value is accepted.
        parse_error: Makes an exception of an error reply.
    """

    def __init__(self, max_value_bytes: int, parse_error: Callable[[str], Exception]) -> None:
        self._max_value_bytes = max_value_bytes
        self._parse_error = parse_error
        self._rest = b""  # the begin of a line
        self._parts: list[memoryview] | None = None  # of the value that is being received
        self._missing = 0  # bytes of it
        self._ending = b""  # what came of the line end after it
        self._open: list[tuple[int, list[Any]]] = []  # arrays, with the items that each will have
        self._replies: list[Any] = []

    def feed(self, data: bytes) -> list[Any]:
        """Return the replies that are complete now; errors are exceptions among them.

        Raises:
            InvalidResponse: These are no replies, or a value is too long. Nothing may follow.
        """
        if self._rest:
            data, self._rest = self._rest + data, b""
        place, size = 0, len(data)
        while place < size:
            if self._parts is not None:
                place = self._read_value(data, place, self._parts)
                continue
            end = data.find(_LINE_END, place)
            if end < 0:
                self._rest = data[place:]
                if len(self._rest) > _MAX_LINE_BYTES:
                    raise InvalidResponse("a line without an end")
                break
            self._read_line(data[place:end])
            place = end + len(_LINE_END)
        replies, self._replies = self._replies, []
        return replies

    def _read_value(self, data: bytes, place: int, parts: list[memoryview]) -> int:
        """Take bytes of the value that is being received; return where they end."""
        end = min(place + self._missing, len(data))
        parts.append(memoryview(data)[place:end])
        self._missing -= end - place
        if self._missing:
            return end
        ending = data[end : end + len(_LINE_END) - len(self._ending)]
        self._ending += ending
        if len(self._ending) == len(_LINE_END):
            if self._ending != _LINE_END:
                raise InvalidResponse("a value longer than it said")
            self._parts, self._ending = None, b""
            self._close(b"".join(parts))
        return end + len(ending)

    def _read_line(self, line: bytes) -> None:
        kind, rest = line[:1], line[1:]
        if b"\n" in rest or b"\r" in rest:
            raise InvalidResponse("half a line end in a line")
        if kind == b"+":
            self._close(rest)
        elif kind == b"-":
            self._close(self._parse_error(rest.decode(errors="replace")))
        elif kind == b":":
            self._close(_number(rest))
        elif kind == b"$":
            self._begin_value(_number(rest))
        elif kind == b"*":
            self._begin_array(_number(rest))
        else:
            raise InvalidResponse("a reply of no known kind")

    def _begin_value(self, size: int) -> None:
        if size == -1:
            self._close(None)
        elif 0 <= size <= self._max_value_bytes:
            self._parts, self._missing = [], size
        else:
            raise InvalidResponse(f"a value of {size} bytes")

    def _begin_array(self, size: int) -> None:
        if size in (-1, 0):
            self._close([] if size == 0 else None)
        elif 0 < size <= _MAX_ITEMS and len(self._open) < _MAX_DEPTH:
            self._open.append((size, []))
        else:
            raise InvalidResponse(f"an array of {size} items")

    def _close(self, item: Any) -> None:
        """Take a complete item into the array that is open, or as a reply."""
        while self._open:
            size, items = self._open[-1]
            items.append(item)
            if len(items) < size:
                return
            self._open.pop()
            item = items
        self._replies.append(item)


def _number(text: bytes) -> int:
    number = int(text) if _NUMBER.fullmatch(text) else 1 << 63
    if not -(1 << 63) <= number < 1 << 63:
        raise InvalidResponse("a number that is none")
    return number
