"""Logs: constant messages with fields, for people or for programs, and no secret in any of them."""

import ast
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.protos import call_context
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.logs import MASK, configure_logging, masked
from tests.test_rooms import FILES, ROOT

SERVERS = ("kvstore_service", "protos", "prefill_node", "decode_node")
SERVER_FILES = [
    *(path for path in FILES if path.parts[0] in SERVERS),
    *(Path("cluster") / f"{name}.py" for name in ("gateway", "processes", "local_stack")),
]
HEX = "5e" * 32


@pytest.fixture
def root() -> Iterator[None]:
    """Put the root logger back as pytest has it."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    logger.handlers = []
    yield
    logger.handlers, logger.level = handlers, level


def logged(form: str, message: str, extra: dict[str, Any], **options: Any) -> str:
    stream = io.StringIO()
    configure_logging("DEBUG", form, stream)
    logging.getLogger("kvstrata.test").warning(message, extra=extra, **options)
    return stream.getvalue()


def test_json_has_one_object_a_line(root: None) -> None:
    line = logged("json", "redis is down", {"url": "redis://h", "count": 3, "ratio": 0.5})
    assert line.count("\n") == 1
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", found.pop("at"))
    assert found == {
        "level": "WARNING",
        "logger": "kvstrata.test",
        "event": "redis is down",
        "url": "redis://h",
        "count": 3,
        "ratio": 0.5,
    }


def test_text_has_the_fields_behind_the_message(root: None) -> None:
    line = logged("text", "redis is down", {"url": "redis://h", "reason": "no answer"})
    assert line.endswith('WARNING kvstrata.test redis is down url=redis://h reason="no answer"\n')


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_break_of_a_value_makes_a_line_of_its_own(root: None, form: str) -> None:
    line = logged(form, "x", {"reason": "a\nb", "other": "c\r\nERROR forged"})
    assert line.count("\n") == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_secrets_are_masked_by_name_and_by_looks(root: None, form: str) -> None:
    secrets = {
        "token": "s3cret",
        "redis_password": "s3cret",
        "salt": b"s3cret",
        "salt_seed": "s3cret",
        "authorization": "s3cret",
        "url": "redis://user:s3cret@host:1/0",
        "header": "Bearer s3cret",
        "reason": f"key {HEX} is wrong",
        "error": ValueError("Authorization: Basic s3cret"),
    }
    harmless = {"token_ids": 3, "prompt_tokens": 5, "block_key": f"{'a' * 32}.{'b' * 32}"}
    line = logged(form, "redis://:s3cret@h failed", {**secrets, **harmless})
    assert "s3cret" not in line
    assert HEX not in line
    assert line.count(MASK) == len(secrets) + 1
    assert f"{'a' * 32}.{'b' * 32}" in line
    assert re.search(r'token_ids"?[=:] ?3', line)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_is_kept_and_masked(root: None, form: str) -> None:
    try:
        raise RuntimeError("redis://:s3cret@h")
    except RuntimeError:
        line = logged(form, "failed", {}, exc_info=True)
    assert "Traceback" in line
    assert "test_a_traceback_is_kept" in line
    assert "s3cret" not in line


def test_tenant_and_request_are_added_where_they_are_known(root: None) -> None:
    tokens = call_context.tenant.set("alice"), call_context.request_id.set("r1")
    try:
        found = json.loads(logged("json", "x", {}))
        assert (found["tenant"], found["request_id"]) == ("alice", "r1")
        assert json.loads(logged("json", "x", {"request_id": "own"}))["request_id"] == "own"
    finally:
        call_context.tenant.reset(tokens[0])
        call_context.request_id.reset(tokens[1])
    assert "tenant" not in json.loads(logged("json", "x", {}))


def test_level_and_format_come_from_the_environment(
    root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_LOG_LEVEL", "error")
    monkeypatch.setenv("KVSTRATA_LOG_FORMAT", "json")
    stream = io.StringIO()
    configure_logging(stream=stream)
    logging.getLogger("kvstrata").warning("not shown")
    logging.getLogger("kvstrata").error("shown")
    assert json.loads(stream.getvalue())["event"] == "shown"
    for level, form in (("LOUD", ""), ("", "xml")):
        with pytest.raises(ConfigurationError, match="unknown log"):
            configure_logging(level, form)


def test_a_value_that_json_has_not_is_text(root: None) -> None:
    found = json.loads(logged("json", "x", {"a": float("nan"), "b": {1: 2}, "c": None}))
    assert (found["a"], found["b"], found["c"]) == ("nan", "{1: 2}", None)
    assert len(json.loads(logged("json", "x", {"long": "y" * 9999}))["long"]) == 2000


@pytest.mark.parametrize("text", ["", "plain", "a.b", "https://host/path", "x" * 64, "0" * 63])
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize("path", SERVER_FILES, ids=str)
def test_messages_of_servers_are_constants(path: Path) -> None:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "logger"
        ):
            message = node.args[1 if node.func.attr == "log" else 0]
            where = f"{path}:{node.lineno}"
            assert isinstance(message, ast.Constant), f"{where}: what varies goes to `extra`"
            assert len(node.args) == (2 if node.func.attr == "log" else 1), where


TAKEN = {*vars(logging.makeLogRecord({})), "message", "asctime"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_field_has_the_name_of_one_that_every_record_has(path: Path) -> None:
    """Such a call raises KeyError instead of logging."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"extra", "told"}
        if named or (isinstance(node, ast.keyword) and node.arg == "extra"):
            for part in ast.walk(node.value):
                keys = part.keys if isinstance(part, ast.Dict) else []
                names = {key.value for key in keys if isinstance(key, ast.Constant)}
                assert not names & TAKEN, f"{path}:{part.lineno}: {names & TAKEN}"
