"""The metrics port: what ``Stats`` tells, in the words of Prometheus.

Nothing is counted here. A scrape asks the process's event loop for the ``StatsReply`` that
``kvctl stats`` would get, so the two never differ.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvstrata.kvstore_service.metric_help import HELP
from kvstrata.protos.admin_pb2 import Gauge, Histogram, StatsReply
from kvstrata.protos.credentials import ServerTls
from kvstrata.protos.errors import ConfigurationError

logger = logging.getLogger(__name__)

SCRAPE_S = 8.0  # Prometheus gives up after ten
Tell = Callable[[], Awaitable[StatsReply]]


class MetricsPort:
    """An HTTP port that answers ``GET /metrics``, in threads of its own.

    It needs no token and tells tenants' names, so keep it on the loopback or under mutual TLS.

    Args:
        listen: ``host:port``; port 0 takes a free one.
        prefix: Of every name, such as "kvstrata_store".
        tell: Asked at each scrape, in the event loop that makes this object.
        tls: Of the port; plaintext without it.

    Attributes:
        address: ``host:port`` with the real port.

    Raises:
        ConfigurationError: The port is taken, the address is not local, or a certificate is bad.
    """

    def __init__(self, listen: str, prefix: str, tell: Tell, tls: ServerTls | None = None) -> None:
        host, _, port = listen.rpartition(":")
        if tls:
            tls.credentials()  # tells a bad file by its name
        registry = CollectorRegistry()
        registry.register(_StatsCollector(prefix, tell, asyncio.get_running_loop()))
        ProcessCollector(registry=registry)
        try:
            self._server, self._thread = start_http_server(
                int(port),
                host.strip("[]"),
                registry,
                certfile=tls.cert if tls else None,
                keyfile=tls.key if tls else None,
                client_cafile=(tls.client_ca or None) if tls else None,
                client_auth_required=bool(tls and tls.client_ca),
            )
        except (OSError, OverflowError) as error:
            raise ConfigurationError(
                f"cannot listen at {listen} for metrics: {error}",
                "choose a free port (0 takes any) and a local address",
            ) from None
        self.address = f"{host}:{self._server.server_port}"

    async def close(self) -> None:
        """Close the port; a scrape that runs is answered first. Idempotent."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()
        await asyncio.to_thread(self._thread.join)


class _StatsCollector(Collector):
    """Runs in the threads of the port."""

    def __init__(self, prefix: str, tell: Tell, loop: asyncio.AbstractEventLoop) -> None:
        self._prefix = prefix
        self._tell = tell
        self._loop = loop

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the names are those of each scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield what is told; ``up`` alone, and 0, where nothing is told in time."""
        reply = None

        async def ask() -> StatsReply:
            async with asyncio.timeout(SCRAPE_S):
                return await self._tell()

        asked = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        with contextlib.suppress(Exception):
            reply = asked.result(SCRAPE_S)
        yield GaugeMetricFamily(
            f"{self._prefix}_up", "Whether the process answered this scrape.", int(bool(reply))
        )
        if reply is None:
            asked.cancel()
            logger.error("scrape not answered")
            return
        yield from families(self._prefix, reply)


def families(prefix: str, reply: StatsReply) -> Iterator[Metric]:
    """Yield every number of ``reply`` as a metric whose name begins with ``prefix``."""
    for name, counters in _by_name(reply.counters).items():
        labels = sorted({label for counter in counters for label in counter.labels})
        counted = CounterMetricFamily(f"{prefix}_{name}", HELP.get(name, name), labels=labels)
        for counter in counters:
            counted.add_metric([counter.labels.get(at, "") for at in labels], counter.value)
        yield counted
    for name, gauges in _by_name([*reply.gauges, *_gauges(reply)]).items():
        labels = sorted({label for gauge in gauges for label in gauge.labels})
        shown = GaugeMetricFamily(f"{prefix}_{name}", HELP.get(name, name), labels=labels)
        for gauge in gauges:
            shown.add_metric([gauge.labels.get(at, "") for at in labels], gauge.value)
        yield shown
    for name, histograms in _by_name(reply.histograms).items():
        labels = sorted({label for times in histograms for label in times.labels})
        timed = HistogramMetricFamily(f"{prefix}_{name}", HELP.get(name, name), labels=labels)
        for times in histograms:
            values = [times.labels.get(at, "") for at in labels]
            timed.add_metric(values, list(_cumulative(times)), times.sum_s)
        yield timed


def _gauges(reply: StatsReply) -> Iterator[Gauge]:
    """Yield what ``reply`` tells in fields of its own."""
    yield Gauge(name="pinned_blocks", value=reply.pinned_blocks)
    yield Gauge(name="pinned_bytes", value=reply.pinned_bytes)
    yield Gauge(name="in_flight_puts", value=reply.in_flight_puts)
    yield Gauge(name="uptime_seconds", value=reply.uptime_s)
    yield Gauge(name="healthy", value=reply.health == "ok")
    yield Gauge(name="draining", value=reply.health == "draining")
    for tier in reply.tiers:
        for name, value in (
            ("tier_up", tier.healthy),
            ("tier_blocks", tier.blocks),
            ("tier_bytes", tier.bytes),
            ("tier_capacity_bytes", tier.capacity_bytes),
            ("write_behind_bytes", tier.behind_bytes),
            ("write_behind_capacity_bytes", tier.max_behind_bytes),
        ):
            yield Gauge(name=name, labels={"tier": tier.tier}, value=value)


def _by_name(messages: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for message in messages:
        groups.setdefault(message.name, []).append(message)
    return groups


def _cumulative(times: Histogram) -> Iterator[tuple[str, float]]:
    total = 0
    for bound, count in zip([*map(str, times.bounds_s), "+Inf"], times.counts, strict=True):
        total += count
        yield bound, total
