"""Which path a request takes, decided by what is cached of it."""

from dataclasses import dataclass

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.prefill_node.prefill import num_prompt_blocks
from kvstrata.prefill_node.read_plan import StoredBlock
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import WorkerInfo, store_failure
from kvstrata.protos.errors import KVStrataError
from kvstrata.protos.identity import BLOCK_TOKENS, CacheScope, block_hashes

LEASE_S = 10.0  # how long the blocks found wait for the node that fetches them


@dataclass(frozen=True, slots=True)
class Route:
    """What the router found and decided.

    Attributes:
        cached_blocks: The longest prefix in the store.
        pending_blocks: Blocks right after it that are being made for another request.
        stored: What is known of the cached blocks.
        num_blocks: Full blocks of the prompt.
        needs_prefill: Whether a prefill node computes the rest; else the decode node does.
        failure: Why the store could not be asked, or not in full; None if it could.
    """

    cached_blocks: int
    num_blocks: int
    needs_prefill: bool
    failure: str | None = None
    pending_blocks: int = 0
    stored: tuple[StoredBlock, ...] = ()


def cache_scope(task: Task, info: WorkerInfo) -> CacheScope:
    """Return the conditions under which the task's blocks mean anything."""
    return task.method.scope(
        model=info.fingerprint,
        kv_dtype=info.kv_dtype,
        salt=task.salt,
        prompt_ids=task.prompt_ids,
    )


class Router:
    """Sends long uncached suffixes to a prefill node, short ones straight to a decode node.

    What is being made for another request is not made again: the node that wants it attaches to it.

    Args:
        store: Asked once per request for the longest cached prefix.
        info: The served model, for the cache scope.
        direct_tokens: Uncached suffixes up to this length go straight to a decode node: a hop to
            another node costs more than it saves.
    """

    def __init__(self, store: StoreClient, info: WorkerInfo, direct_tokens: int = 256) -> None:
        self._store = store
        self._info = info
        self._direct_tokens = direct_tokens

    async def route(self, task: Task) -> Route:
        """Return the path for ``task``. A store that is gone raises nothing: nothing is cached."""
        num_blocks = num_prompt_blocks(len(task.prompt_ids), task.method)
        if not num_blocks:
            return Route(0, 0, needs_prefill=False)
        scope = cache_scope(task, self._info).digest()
        hashes = block_hashes(scope, task.prompt_ids[: num_blocks * BLOCK_TOKENS])
        try:
            found = await self._store.lookup(
                scope, hashes, lease_s=LEASE_S, retention=task.retention
            )
        except KVStrataError as error:
            return Route(0, num_blocks, needs_prefill=False, failure=store_failure(error))
        wanted = set(task.method.wanted)
        stored: list[StoredBlock] = []
        for block in found.blocks:
            if not wanted <= set(block.strata):
                break
            stored.append(StoredBlock(block.num_bytes, block.tier))
        cached = len(stored)
        pending = found.pending if cached == len(found.blocks) else 0
        uncached_tokens = (num_blocks - cached - pending) * BLOCK_TOKENS
        shareable = task.method.reads_all and uncached_tokens > self._direct_tokens
        incomplete = found.degraded and cached < num_blocks
        return Route(
            cached,
            num_blocks,
            needs_prefill=shareable,
            failure="store_degraded" if incomplete else None,
            pending_blocks=pending,
            stored=tuple(stored),
        )

    async def release(self, session: str, account: str) -> int:
        """End a session's hints; return how many blocks it has.

        Raises:
            KVStrataError: The store does not answer.
        """
        return await self._store.release(session, account=account)
