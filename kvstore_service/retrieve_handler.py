"""The handler of ``Retrieve``, which loads the search, and numpy with it, at its first call."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.store import BlockStore
from kvstrata.kvstore_service.tenants import Tenant
from kvstrata.kvstore_service.workload import Workload
from kvstrata.protos import kvstore_pb2 as pb

if TYPE_CHECKING:
    from kvstrata.kvstore_service.retrieval import Retrieval


class RetrieveHandler:
    """Answers ``Retrieve``.

    Args:
        store: What is searched.
        workload: Counts the calls.
        limits: What one request may ask for.
        max_bytes: Bound on the memory of remembered representatives.
        admit: Returns the caller, or refuses.
    """

    def __init__(
        self,
        store: BlockStore,
        workload: Workload,
        limits: StoreLimits,
        max_bytes: int,
        admit: Callable[[Any], Tenant],
    ) -> None:
        self._store = store
        self._workload = workload
        self._limits = limits
        self._max_bytes = max_bytes
        self._admit = admit
        self._retrieval: Retrieval | None = None

    async def __call__(self, request: pb.RetrieveRequest, context: Any) -> pb.RetrieveReply:
        """Find the blocks that answer queries best."""
        namespace = self._admit(context).namespace
        with self._workload.call():
            return await self._search().run(request, namespace, context.time_remaining())

    def _search(self) -> "Retrieval":
        if self._retrieval is None:
            from kvstrata.kvstore_service.retrieval import Retrieval

            self._retrieval = Retrieval(self._store, self._limits, self._max_bytes)
        return self._retrieval
