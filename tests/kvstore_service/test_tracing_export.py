"""A store process that exports its spans, and logs under their ids, as the environment says."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.testing import sample_block
from kvstrata.protos import tracing
from kvstrata.protos.identity import ScopeDigest
from tests.spans import Recorder, recorder

__all__ = ["recorder"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what is exported to it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.services.add(names["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    made, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield made, f"http://127.0.0.1:{port}"
    await server.stop(None)


async def test_a_store_exports_spans_under_the_clients_trace(
    collector: tuple[Collector, str], recorder: Recorder, scope: ScopeDigest
) -> None:
    made, endpoint = collector
    command = [
        *(sys.executable, "-P", "-m", "kvstrata.kvstore_service"),
        *("--log-format", "json", "--log-level", "debug"),
    ]
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    address = json.loads(process.stdout.readline())["address"]
    async with StoreClient(address, timeout_s=60) as client:
        with tracing.current("mine") as span:
            await client.put([sample_block(scope)])
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.to_thread(process.communicate, timeout=240)
    assert process.returncode == 0
    assert made.services == {"kvstrata-store"}
    (put,) = (s for s in made.spans if s.name == "KVStore/Put")
    assert f"{put.trace_id.hex()}-{put.parent_span_id.hex()}" in span.traceparent
    assert {a.key: a.value.string_value for a in put.attributes}["kvstrata.tenant"] == "default"
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    events = [line["event"] for line in lines]
    assert "store serves" in events
    assert "store stopped" in events
