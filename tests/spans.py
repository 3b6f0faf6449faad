"""Recorded spans for tests, as trees of names."""

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

Tree = dict[str, Any]


class Recorder:
    """What has been recorded."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def finished(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.finished() if span.name == name]

    def span(self, name: str) -> ReadableSpan:
        (found,) = self.spans(name)
        return found

    def num_traces(self) -> int:
        return len({span.context.trace_id for span in self.finished()})

    def tree(self) -> Tree:
        """Return names below names; spans of one name below one parent are one."""
        known = {span.context.span_id for span in self.finished()}

        def below(parent: int | None) -> Tree:
            found: Tree = {}
            for span in self.finished():
                above = span.parent.span_id if span.parent else None
                if (above if above in known else None) == parent:
                    found.setdefault(span.name, {}).update(below(span.context.span_id))
            return found

        return below(None)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Record spans in memory for one test."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield Recorder(exporter)
    provider.shutdown()
