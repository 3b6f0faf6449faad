"""What the nodes use, as their last reports told it: gauges of the gateway."""

import time
from collections.abc import Callable, Iterable

from kvstrata.protos.admin_pb2 import Gauge
from kvstrata.protos.inference_pb2 import NodeUse

KEPT_S = 60.0  # a worker that told nothing for so long may be gone
MAX_WORKERS = 256


class NodeUses:
    """The newest report of each worker.

    Args:
        now: A clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._uses: dict[tuple[str, str], tuple[float, NodeUse]] = {}

    def note(self, uses: Iterable[NodeUse]) -> None:
        """Take note of what a request's report tells."""
        for use in uses:
            self._uses.pop((use.node, use.worker), None)
            self._uses[use.node, use.worker] = self._now(), use
        while len(self._uses) > MAX_WORKERS:
            del self._uses[next(iter(self._uses))]

    def gauges(self) -> list[Gauge]:
        """Return the numbers of all workers that were heard of lately."""
        found = []
        for (node, worker), (told_at, use) in self._uses.items():
            if self._now() - told_at > KEPT_S:
                continue
            numbers: dict[str, float] = {
                "node_pool_bytes": use.pool_bytes,
                "node_pool_used_bytes": use.pool_used_bytes,
                "node_parked_sequences": use.parked,
                "node_expired_requests": use.expired,
            }
            if use.gpu_bytes:
                numbers |= {
                    "node_gpu_bytes": use.gpu_bytes,
                    "node_gpu_used_bytes": use.gpu_used_bytes,
                    "node_gpu_busy_ratio": use.gpu_busy,
                    "node_graph_passes": use.graph_passes,
                    "node_graph_failed_passes": use.graph_failed_passes,
                    "node_late_copies": use.late_copies,
                }
            labels = {"node": node, "worker": worker}
            found += [Gauge(name=n, value=v, labels=labels) for n, v in numbers.items()]
        return found
