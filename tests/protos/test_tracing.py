"""Spans: what is recorded, what ties processes together, and that nothing is done when off."""

import asyncio
import sys
from collections.abc import Iterator

import pytest
from opentelemetry import trace

from kvstrata.protos import call_context, tracing
from kvstrata.protos.errors import CapacityError, ConfigurationError
from kvstrata.protos.report import ReportClock
from tests.spans import Recorder, recorder

__all__ = ["recorder"]

TRACEPARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture
def request_id() -> Iterator[str]:
    token = call_context.request_id.set("r1")
    yield "r1"
    call_context.request_id.reset(token)


def test_nothing_is_recorded_or_sent_unless_configured(request_id: str) -> None:
    assert not tracing.is_on()
    with tracing.start("a", "client", attempt=1) as span, tracing.current("b") as inner:
        span.set(x=1)
        assert span.traceparent == inner.traceparent == tracing.trace_id() == ""
        assert span.headers == tracing.headers() == (("kvstrata-request-id", "r1"),)
    tracing.record("c", TRACEPARENT, 1.0, 2.0)
    assert tracing.start("a") is tracing.NOTHING


def test_spans_nest_by_the_current_one_or_by_a_traceparent(recorder: Recorder) -> None:
    with tracing.current("outer", request_id="r") as outer:
        with tracing.current("inner"):
            assert tracing.trace_id() == outer.traceparent.split("-")[1]
        tracing.start("elsewhere", "server", parent=TRACEPARENT).end()
        tracing.start("lost", parent="no traceparent").end()
    tracing.record("timed", outer.traceparent, 100.0, 2.5)
    assert recorder.tree() == {"outer": {"inner": {}, "timed": {}}, "elsewhere": {}, "lost": {}}
    assert recorder.span("outer").attributes == {"kvstrata.request_id": "r"}
    parent = recorder.span("elsewhere").parent
    assert parent is not None
    assert f"{parent.trace_id:032x}-{parent.span_id:016x}" in TRACEPARENT
    assert recorder.span("lost").parent is None
    timed = recorder.span("timed")
    assert (timed.start_time, timed.end_time) == (100 * 10**9, 1025 * 10**8)


def test_an_error_is_told_by_its_name_alone(recorder: Recorder) -> None:
    for error in (CapacityError("s3cret"), RuntimeError("s3cret")):
        with pytest.raises(type(error)), tracing.current("fails"):
            raise error
    with pytest.raises(GeneratorExit), tracing.start("closed"):
        raise GeneratorExit
    told = [span.status.description for span in recorder.spans("fails")]
    assert told == ["RESOURCE_EXHAUSTED", "RuntimeError"]
    assert recorder.span("closed").status.is_unset
    assert "s3cret" not in "".join(span.to_json() for span in recorder.finished())


async def test_a_span_that_yields_is_nobodys_parent_by_accident(recorder: Recorder) -> None:
    async def stream():  # type: ignore[no-untyped-def]
        with tracing.start("stream", "client"):
            yield 1
            yield 2

    async for _ in stream():
        with tracing.current("body"):
            await asyncio.sleep(0)
    assert recorder.tree() == {"stream": {}, "body": {}}


async def test_a_call_goes_on_with_what_its_caller_sent(recorder: Recorder) -> None:
    async def serve() -> None:
        metadata = (("traceparent", TRACEPARENT), ("kvstrata-request-id", "r-1\n\x00forged" * 9))
        with tracing.enter_call("KVStore/Get", metadata):
            assert call_context.request_id.get() == ("r-1forged" * 9)[:64]
            with tracing.current("work"):
                pass

    await asyncio.create_task(serve())
    assert call_context.request_id.get() == ""
    span = recorder.span("KVStore/Get")
    assert span.parent is not None
    assert span.kind is trace.SpanKind.SERVER
    assert span.attributes is not None
    assert span.attributes["rpc.method"] == "Get"
    assert recorder.tree() == {"KVStore/Get": {"work": {}}}


def test_stages_of_a_report_are_spans(recorder: Recorder) -> None:
    with tracing.start("request") as span:
        clock = ReportClock("decode", span.traceparent)
        with clock.stage("fetch"):
            pass
        clock.add("decode", 10.0, 1.0)
    assert recorder.tree() == {"request": {"decode.fetch": {}, "decode.decode": {}}}
    assert [stage.stage for stage in clock.report.stages] == ["fetch", "decode"]


def test_exporting_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigurationError, match="tracing is asked for") as caught:
        tracing.configure_tracing("x")
    assert "kvstrata[otel]" in caught.value.remedy
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    tracing.configure_tracing("x")
    assert not tracing.is_on()
