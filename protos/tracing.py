"""Spans through client, gateway, nodes and store, and the headers that tie them together.

OpenTelemetry's API alone is needed for that; without a configured SDK nothing is recorded, and all
this costs a look at a global. Nothing that users wrote and no secret is an attribute: no prompt, no
token ids, no salt.

Contexts travel as W3C ``traceparent``, between processes in gRPC headers and in ``Task``.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvstrata.protos import call_context
from kvstrata.protos.errors import ConfigurationError, KVStrataError

REQUEST_ID_KEY = "kvstrata-request-id"
_MAX_REQUEST_ID_CHARS = 64
_SWITCHES = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_TRACES_EXPORTER",
)
_PROPAGATOR = TraceContextTextMapPropagator()
_KINDS = {
    "internal": trace.SpanKind.INTERNAL,
    "client": trace.SpanKind.CLIENT,
    "server": trace.SpanKind.SERVER,
}

Headers = tuple[tuple[str, str], ...]
Attribute = str | int | float | bool


class Span:
    """A piece of work in a trace; one of this class itself is of none, where tracing is off.

    A context manager; or ``end`` ends it.
    """

    traceparent = ""
    """Of whatever is done for it elsewhere; empty where tracing is off."""

    @property
    def headers(self) -> Headers:
        """The same for gRPC, and the request's id if there is one."""
        request_id = call_context.request_id.get()
        return ((REQUEST_ID_KEY, request_id),) if request_id else ()

    def set(self, **attributes: Attribute) -> None:
        """Add attributes."""

    def end(self, error: BaseException | None = None) -> None:
        """End it, as failed if there is an error. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(error)


NOTHING = Span()


class _Recorded(Span):
    """A span that is recorded."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self.context = trace.set_span_in_context(span)
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self.context)
        self.traceparent = carrier.get("traceparent", "")
        self._carrier = tuple(carrier.items())

    @property
    def headers(self) -> Headers:
        """See ``Span.headers``."""
        return (*super().headers, *self._carrier)

    def set(self, **attributes: Attribute) -> None:
        """See ``Span.set``."""
        for name, value in attributes.items():
            self._span.set_attribute(f"kvstrata.{name}", value)

    def end(self, error: BaseException | None = None) -> None:
        """See ``Span.end``."""
        if error is not None and not isinstance(error, GeneratorExit):
            code = error.code.name if isinstance(error, KVStrataError) else type(error).__name__
            self._span.set_status(trace.StatusCode.ERROR, code)
        self._span.end()


def headers() -> Headers:
    """Return what a call that is made now sends along: the request's id, and the current span."""
    request_id = call_context.request_id.get()
    sent = ((REQUEST_ID_KEY, request_id),) if request_id else ()
    if not is_on():
        return sent
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return (*sent, *carrier.items())


def is_on() -> bool:
    """Return whether spans are recorded: we or the application have configured an SDK."""
    provider = trace.get_tracer_provider()
    return not isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)


def start(
    name: str, kind: str = "internal", parent: str | None = None, **attributes: Attribute
) -> Span:
    """Start a span and return it. It is nobody's parent but by its headers or ``traceparent``.

    For work that yields, such as streams, because nothing has to be put back in the same task.

    Args:
        name: Of the work, the same for all of its kind.
        kind: "internal", "client" or "server".
        parent: A ``traceparent``; the current span without it, a new trace if it is empty or bad.
        attributes: Facts, under ``kvstrata.``.
    """
    if not is_on():
        return NOTHING
    around = None if parent is None else extract(parent)
    span = _Recorded(
        trace.get_tracer("kvstrata").start_span(name, context=around, kind=_KINDS[kind])
    )
    span.set(**attributes)
    return span


@contextlib.contextmanager
def current(
    name: str, kind: str = "internal", parent: str | None = None, **attributes: Attribute
) -> Iterator[Span]:
    """Run the body, which must not yield, within a span: what it starts are the span's children."""
    span = start(name, kind, parent, **attributes)
    if not isinstance(span, _Recorded):
        yield span
        return
    token = context.attach(span.context)
    try:
        with span:
            yield span
    finally:
        context.detach(token)


def record(name: str, parent: str | None, start_unix_s: float, seconds: float) -> None:
    """Record a span of work that was timed elsewhere; see ``start``."""
    if not is_on():
        return
    begin_ns = int(start_unix_s * 1e9)
    span = trace.get_tracer("kvstrata").start_span(
        name, context=None if parent is None else extract(parent), start_time=begin_ns
    )
    span.end(begin_ns + int(seconds * 1e9))


def extract(traceparent: str, tracestate: str = "") -> context.Context:
    """Return the context that a ``traceparent`` names; an empty one if it is none."""
    carrier = {"traceparent": traceparent, "tracestate": tracestate}
    return _PROPAGATOR.extract(carrier, context.Context())


def enter_call(method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Span:
    """Return the span of a call that a server has received, now current in the call's own task.

    Also lets ``call_context`` know the request's id that the caller sent. To be called in the task
    that gRPC makes for the call and nowhere else: nothing is put back, the task ends with the call.
    """
    sent = {key: value for key, value in metadata if isinstance(value, str)}
    request_id = sent.get(REQUEST_ID_KEY, "")
    if request_id:
        call_context.request_id.set(clean_request_id(request_id))
    if not is_on():
        return NOTHING
    around = extract(sent.get("traceparent", ""), sent.get("tracestate", ""))
    span = _Recorded(
        trace.get_tracer("kvstrata").start_span(method, context=around, kind=_KINDS["server"])
    )
    service, _, name = method.partition("/")
    for key, value in (("rpc.system", "grpc"), ("rpc.service", service), ("rpc.method", name)):
        span._span.set_attribute(key, value)
    if request_id:
        span.set(request_id=clean_request_id(request_id))
    context.attach(span.context)
    return span


def clean_request_id(text: str) -> str:
    """Return an id that a peer sent, fit for logs: up to 64 letters, digits, - and _."""
    return re.sub(r"[^A-Za-z0-9_-]", "", text)[:_MAX_REQUEST_ID_CHARS]


def trace_id() -> str:
    """Return the current trace's id in hex; empty outside of a trace."""
    if not is_on():
        return ""
    found = trace.get_current_span().get_span_context()
    return trace.format_trace_id(found.trace_id) if found.is_valid else ""


def configure_tracing(service: str) -> None:
    """Export spans if the environment says where to, by OpenTelemetry's own variables.

    ``OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317`` is enough. Does nothing where none of them
    is set, or where the application has configured an SDK.

    Raises:
        ConfigurationError: The environment asks for it, and the packages are not installed.
    """
    wanted = any(os.environ.get(name) not in (None, "", "none") for name in _SWITCHES)
    if not wanted or is_on():
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"tracing is asked for and needs {error.name}",
            "install kvstrata[otel], or unset OTEL_EXPORTER_OTLP_ENDPOINT",
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider: Any = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def flush_tracing() -> None:
    """Send what has been recorded, within a few seconds."""
    flush = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is not None:
        flush(5000)
