"""Finding the blocks that answer a query: what ``Retrieve`` does (ReKV, arXiv 2503.00540).

Nothing here is on the way of Put and Get. Representatives are read from the frames of blocks that
are asked for, once, and kept in a bounded index.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.commit_rule import BASE, EXACT
from kvstrata.kvstore_service.config import StoreLimits
from kvstrata.kvstore_service.lower_reader import Piece
from kvstrata.kvstore_service.namespace import Namespace
from kvstrata.kvstore_service.representative_index import (
    Query,
    Representative,
    RepresentativeIndex,
    score,
    select,
)
from kvstrata.kvstore_service.request_check import parse_hashes
from kvstrata.kvstore_service.store import BlockStore, is_present
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.errors import (
    DeadlineError,
    InvalidRequestError,
    LimitError,
)
from kvstrata.protos.identity import HASH_BYTES, BlockKey, ScopeDigest

_BATCH = 256  # blocks looked up and scored without anybody else having a turn
_READERS = 4
_MAX_LISTED = 65_536  # keys of a tier that are looked through for those of one scope

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked request.

    Attributes:
        scope: Whose blocks.
        keys: Which, in order of time; all of the scope without any.
        queries: What to look for.
        top_k: Blocks wanted for each query, on top of ``sinks`` and ``recent``.
        chunk: Blocks that are taken together.
        sinks: First blocks, always taken.
        recent: Last blocks, always taken.
        cosine: Whether to compare directions only.
    """

    scope: ScopeDigest
    keys: Sequence[BlockKey]
    queries: list[Query]
    top_k: int
    chunk: int
    sinks: int
    recent: int
    cosine: bool


def parse_retrieval(request: pb.RetrieveRequest, limits: StoreLimits) -> Wanted:
    """Return the request, checked.

    Raises:
        InvalidRequestError: A name of the wrong size, no query, or one that is no vector.
        LimitError: More than the store takes, or ``top_k`` is no multiple of the chunk.
    """
    keys = parse_hashes(request.scope, request.block_hashes, limits.max_hashes)
    if len(request.scope) != HASH_BYTES:
        raise InvalidRequestError(
            f"scope must be {HASH_BYTES} bytes, got {len(request.scope)}", "send a scope's digest"
        )
    chunk = request.chunk_blocks or 1
    for name, count in (
        ("top_k", request.top_k),
        ("chunk_blocks", chunk),
        ("sink_blocks", request.sink_blocks),
        ("recent_blocks", request.recent_blocks),
    ):
        if count > limits.max_hashes:
            raise LimitError(
                f"{name} {count} exceeds the limit of {limits.max_hashes}", "ask for fewer blocks"
            )
    if request.top_k % chunk:
        raise LimitError(
            f"top_k {request.top_k} is no multiple of chunk_blocks {chunk}",
            "ask for whole chunks",
        )
    if len(request.queries) > limits.max_queries:
        raise LimitError(
            f"{len(request.queries)} queries exceed the limit of {limits.max_queries}",
            "send several requests",
        )
    if not request.queries:
        raise InvalidRequestError("a request without a query", "send a layer and a vector")
    if request.similarity not in pb.Similarity.values():
        raise InvalidRequestError(f"unknown similarity {request.similarity}", "use DOT or COSINE")
    return Wanted(
        scope=ScopeDigest(request.scope),
        keys=keys,
        queries=[_parse_query(query) for query in request.queries],
        top_k=request.top_k,
        chunk=chunk,
        sinks=request.sink_blocks,
        recent=request.recent_blocks,
        cosine=request.similarity == pb.SIMILARITY_COSINE,
    )


def _parse_query(query: pb.RetrieveQuery) -> Query:
    if not query.vector or len(query.vector) % 4:
        raise InvalidRequestError(
            f"{len(query.vector)} bytes are no float32 vector", "send 4 bytes a value"
        )
    vector = np.frombuffer(query.vector, "<f4")
    if not np.isfinite(vector).all():
        raise InvalidRequestError("a query has values that are no numbers", "send finite values")
    return query.layer, vector


class Retrieval:
    """Answers ``Retrieve`` over a store. One event loop owns it.

    Args:
        store: Where the blocks are.
        limits: What one request may ask for.
        max_bytes: Bound on the memory of remembered representatives.
    """

    def __init__(self, store: BlockStore, limits: StoreLimits, max_bytes: int) -> None:
        self._store = store
        self._limits = limits
        self.index = RepresentativeIndex(max_bytes)
        store.on_changed = self.index.forget

    async def run(
        self, request: pb.RetrieveRequest, namespace: Namespace, timeout_s: float | None
    ) -> pb.RetrieveReply:
        """Return what answers the queries; every guarantee is in ``kvstore.proto``.

        Args:
            request: As it came.
            namespace: Whose blocks.
            timeout_s: Until when somebody waits for the answer; the store's limit at most.

        Raises:
            DeadlineError: Reading representatives took longer.
            InvalidRequestError: As for ``parse_retrieval``; or a query's length fits no block.
        """
        wanted = parse_retrieval(request, self._limits)
        timeout_s = min(timeout_s or math.inf, self._limits.max_wait_ms / 1000)
        stored = namespace.keys(wanted.keys)
        search = _Search(self._store, self.index, wanted)
        try:
            async with asyncio.timeout(timeout_s):
                if not wanted.keys:
                    stored = await search.list_scope(namespace.scope(wanted.scope))
                await search.look_at(stored)
        except TimeoutError:
            raise DeadlineError(
                f"{search.num_done} of {len(stored)} blocks were looked at in {timeout_s:.1f} s",
                "ask again: what was read is remembered; or name fewer blocks",
            ) from None
        reply = search.reply(stored, names_wanted=not wanted.keys)
        chosen = sum(len(selection.ids) for selection in reply.selections)
        counters = self._store.counters
        counters.add(names.RETRIEVALS)
        counters.add(names.RETRIEVED_BLOCKS, chosen, result="chosen")
        counters.add(names.RETRIEVED_BLOCKS, len(reply.absent), result="absent")
        counters.add(names.RETRIEVED_BLOCKS, len(reply.unrepresented), result="unrepresented")
        return reply


class _Search:
    """One request while it runs."""

    def __init__(self, store: BlockStore, index: RepresentativeIndex, wanted: Wanted) -> None:
        self._store = store
        self._index = index
        self._wanted = wanted
        self._reading = asyncio.Semaphore(_READERS)
        self._present: list[bool] = []
        self._positions: list[int] = []
        self._scores: list[Scores] = []
        self._lengths: set[int] = set()
        self.num_done = 0
        self._degraded = self._truncated = False

    async def list_scope(self, scope: ScopeDigest) -> list[BlockKey]:
        """Return the keys of a scope in every tier, of a tier's most recently used ones."""
        found: dict[BlockKey, None] = {}
        for tier in self._store.tiers:
            try:
                keys = await tier.keys(_MAX_LISTED)
            except TierUnavailableError:
                self._degraded = True
                continue
            self._truncated |= len(keys) == _MAX_LISTED
            found |= dict.fromkeys(key for key in keys if key.scope == scope)
        return list(found)

    async def look_at(self, keys: Sequence[BlockKey]) -> None:
        """Find out for each block whether it is there, where it begins, and its scores."""
        for first in range(0, len(keys), _BATCH):
            batch = keys[first : first + _BATCH]
            presence, degraded = await self._store.locate(batch)
            self._degraded |= degraded
            entries = self._index.find(batch)
            loads = []
            for place, (key, entry, held) in enumerate(zip(batch, entries, presence, strict=True)):
                if not is_present(held):
                    entries[place] = None
                elif entry is None:
                    is_based = any(BASE in sizes for _, sizes in held)
                    loads.append((place, self._load(key, BASE if is_based else EXACT)))
            loaded = await asyncio.gather(*(load for _, load in loads))
            for (place, _), entry in zip(loads, loaded, strict=True):
                entries[place] = entry
            self._present += [entry is not None for entry in entries]
            self._positions += [entry.position if entry else 0 for entry in entries]
            self._lengths |= {e.values[0].size for e in entries if e is not None and e.layers}
            self._scores.append(score(entries, self._wanted.queries, cosine=self._wanted.cosine))
            self.num_done += len(batch)
            await asyncio.sleep(0)

    async def _load(self, key: BlockKey, stratum: int) -> Representative | None:
        """Read a block's representatives from its frame; None if it cannot be read."""
        self._index.expect(key)
        async with self._reading:
            found = (await self._store.read(key, [stratum]))[stratum]
        if not isinstance(found, Piece):
            self._degraded |= found == "tier_unavailable"
            return None
        entry = Representative.of(found.frame)
        self._index.add(key, entry)
        self._store.counters.add(names.REPRESENTATIVES_READ)
        return entry

    def reply(self, keys: Sequence[BlockKey], *, names_wanted: bool) -> pb.RetrieveReply:
        """Return the answer once all blocks were looked at."""
        self._check_lengths()
        wanted = self._wanted
        scores = (
            np.concatenate(self._scores, axis=1)
            if self._scores
            else np.empty((len(wanted.queries), 0))
        )
        present = np.array(self._present, bool)
        order = list(range(len(keys)))
        if names_wanted:
            order = [i for i in order if present[i]]
            order.sort(key=lambda i: (self._positions[i], keys[i].block_hash))
        scores, present = scores[:, order], present[order]
        selections = []
        for row in scores:
            ids = select(
                row,
                present,
                top_k=wanted.top_k,
                chunk=wanted.chunk,
                sinks=wanted.sinks,
                recent=wanted.recent,
            )
            with np.errstate(over="ignore"):
                selections.append(pb.RetrieveSelection(ids=ids, scores=row[ids].astype(np.float32)))
        unrepresented = present & np.isnan(scores).any(axis=0)
        return pb.RetrieveReply(
            selections=selections,
            block_hashes=b"".join(keys[i].block_hash for i in order) if names_wanted else b"",
            absent=np.flatnonzero(~present),
            unrepresented=np.flatnonzero(unrepresented),
            degraded=self._degraded,
            truncated=self._truncated,
        )

    def _check_lengths(self) -> None:
        for _, vector in self._wanted.queries:
            if self._lengths and all(len(vector) % length for length in self._lengths):
                length = math.gcd(*self._lengths)
                raise InvalidRequestError(
                    f"a query of {len(vector)} values fits no block: they have {length} a layer",
                    "send query heads * head_dim values, query heads a multiple of the KV heads",
                )
