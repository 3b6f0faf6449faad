"""How the store feels, in words for people and as statuses of the gRPC health service."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from grpc_health.v1 import health, health_pb2

from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tier import TierUsage
from kvstrata.kvstore_service.workload import Workload

logger = logging.getLogger(__name__)

WHOLE = "kvstrata.whole"
TIER_PREFIX = "kvstrata.tier."
LOOK_S = 2.0
_FULL = 0.9  # of the bound of what waits for a tier

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True, slots=True)
class Health:
    """How the store feels.

    Attributes:
        usages: Of each tier, nearest first.
        problems: Tier to what is wrong with it; empty when all is well.
        is_draining: Whether the store takes no more work.
    """

    usages: dict[str, TierUsage]
    problems: dict[str, str]
    is_draining: bool

    @property
    def text(self) -> str:
        """Return "ok", "degraded: <why>" or "draining"."""
        if self.is_draining:
            return "draining"
        why = "; ".join(f"{tier}: {problem}" for tier, problem in self.problems.items())
        return f"degraded: {why}" if why else "ok"


class StoreHealth:
    """Looks at the tiers, and lets the gRPC health service say what it saw.

    The service names of KVStore and Admin, and the empty one, are SERVING until the store drains:
    a degraded store serves. ``kvstrata.whole`` is SERVING only if nothing is wrong, and
    ``kvstrata.tier.<name>`` only if nothing is wrong with that tier, for probes that want to know.
    """

    def __init__(self, store: BlockStore, workload: Workload) -> None:
        self._store = store
        self._workload = workload
        self._was = "ok"

    async def look(self) -> Health:
        """Return how the store feels now."""
        usages = {tier.name: await tier.usage() for tier in self._store.tiers}
        problems = {}
        for name, usage in usages.items():
            waiting, bound = self._store.behind_bytes(name), self._store.max_behind_bytes
            if not usage.healthy:
                problems[name] = usage.detail or "not healthy"
            elif waiting > _FULL * bound:
                problems[name] = f"its backlog is full: {waiting} of {bound} bytes wait"
        return Health(usages, problems, self._workload.is_draining)

    async def watch(self, service: health.aio.HealthServicer) -> None:
        """Keep ``service`` up to date, and log changes. Never returns."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S * 5):
                    await self._tell(service, await self.look())
            await asyncio.sleep(LOOK_S)

    async def _tell(self, service: health.aio.HealthServicer, found: Health) -> None:
        for name in found.usages:
            status = NOT_SERVING if name in found.problems else SERVING
            await service.set(TIER_PREFIX + name, status)
        await service.set(WHOLE, SERVING if found.text == "ok" else NOT_SERVING)
        if found.text != self._was:
            self._was = found.text
            level = logging.INFO if found.text == "ok" else logging.WARNING
            logger.log(level, "health changed", extra={"health": found.text})
