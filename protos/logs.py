"""Logs of every process: one line an event, for people or for programs, without secrets.

A message is a constant, what varies is in ``extra``::

    logger.warning("redis is down", extra={"url": url, "reason": reason})

    2026-11-28 12:00:00,250 WARNING kvstrata.kvstore_service.redis_connection redis is down url=...
    {"at": "2026-11-28T12:00:00.250+00:00", "level": "WARNING", "logger": "...", "event": "redis is
    down", "url": "...", "reason": "..."}

Within a call or a request, the tenant, the request's id and the trace's are added.
"""

import datetime
import json
import logging
import os
import re
import sys
from typing import Any, TextIO

from kvstrata.protos import call_context, tracing
from kvstrata.protos.errors import ConfigurationError

LEVEL_VARIABLE = "KVSTRATA_LOG_LEVEL"
FORMAT_VARIABLE = "KVSTRATA_LOG_FORMAT"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FORMATS = ("text", "json")
MASK = "***"
_MAX_VALUE_CHARS = 2000

_BUILT_IN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_SECRET_NAME = re.compile(
    r"(^|_)(token|tokens_file|password|passwd|secret|salt|seed|authorization|credentials?"
    r"|master|private_key|api_key)$",
    re.IGNORECASE,
)
_SECRET_VALUES = (
    (re.compile(r"(?<=://)[^/@\s]+(?=@)"), MASK),  # of a URL
    (re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"',]+"), rf"\1 {MASK}"),
    (re.compile(r"(?i)\b[0-9a-f]{64}\b"), MASK),  # a key, or the hash of a token
)


def configure_logging(level: str = "", form: str = "", stream: TextIO | None = None) -> None:
    """Send the logs of this process to ``stream``, stderr without it.

    Args:
        level: One of ``LEVELS``; ``KVSTRATA_LOG_LEVEL`` or INFO if empty.
        form: One of ``FORMATS``; ``KVSTRATA_LOG_FORMAT`` or text if empty.
        stream: Where to.

    Raises:
        ConfigurationError: Neither.
    """
    level = (level or os.environ.get(LEVEL_VARIABLE) or "INFO").upper()
    form = (form or os.environ.get(FORMAT_VARIABLE) or "text").lower()
    for value, known, what in ((level, LEVELS, "log level"), (form, FORMATS, "log format")):
        if value not in known:
            raise ConfigurationError(
                f"unknown {what} {value[:20]!r}", f"use one of {', '.join(known)}"
            )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)


class TextFormatter(logging.Formatter):
    """One line for people: the message, then the fields as ``name=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line without the traceback."""
        line = masked(super().formatMessage(record))
        told = "".join(f" {name}={_plain(value)}" for name, value in fields(record).items())
        return f"{line}{told}".replace("\n", "\\n")

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return the traceback, masked."""
        return masked(super().formatException(ei))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``at``, ``level``, ``logger``, ``event`` and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        told: dict[str, Any] = {
            "at": at.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": masked(record.getMessage()),
            **{name: _jsonable(value) for name, value in fields(record).items()},
        }
        if record.exc_info:
            told["traceback"] = masked(self.formatException(record.exc_info))
        return json.dumps(told, ensure_ascii=False)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what varies in an event, secrets masked, and whose work it was part of."""
    found = {
        name: MASK if _SECRET_NAME.search(name) else _masked_value(value)
        for name, value in vars(record).items()
        if name not in _BUILT_IN and not name.startswith("_")  # libraries' own
    }
    tenant = call_context.tenant.get()
    if tenant != call_context.DEFAULT_TENANT:
        found.setdefault("tenant", tenant)
    for name, value in (
        ("request_id", call_context.request_id.get()),
        ("trace_id", tracing.trace_id()),
    ):
        if value:
            found.setdefault(name, value)
    return found


def masked(text: str) -> str:
    """Return ``text`` without what looks like a secret: URL passwords, tokens, 32-byte keys.

    >>> masked("redis://:pw@h:1/0 Bearer abc")
    'redis://***@h:1/0 Bearer ***'
    """
    for pattern, mask in _SECRET_VALUES:
        text = pattern.sub(mask, text)
    return text


def _masked_value(value: object) -> object:
    if isinstance(value, bool | int | float) or value is None:
        return value
    return masked(str(value))[:_MAX_VALUE_CHARS]


def _jsonable(value: object) -> object:
    is_finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if is_finite else str(value)


def _plain(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or re.search(r"[\s\"]", text) else text
