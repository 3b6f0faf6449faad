"""The ``Admin`` service, one method per call; replies are dictionaries with stable keys."""

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstrata.client.connection import Endpoint
from kvstrata.client.request import MAX_UINT32
from kvstrata.client.validation import check_seconds
from kvstrata.protos import admin_pb2, admin_pb2_grpc, frame_pb2, kvstore_pb2
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials
from kvstrata.protos.errors import InvalidRequestError
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest

MISSES = "misses_total"
PAGE_SIZE = 1000


class Admin:
    """A connection to the admin service of a gateway or a store.

    Every method raises ``KVStrataError`` where the server cannot be reached or refuses.
    """

    def __init__(
        self, address: str, timeout_s: float, credentials: ClientCredentials = ANONYMOUS
    ) -> None:
        self._endpoint = Endpoint(address, timeout_s, timeout_s, credentials)
        self._channel = self._endpoint.open()
        self._stub: Any = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def stats(self) -> dict[str, Any]:
        """Return tiers, counters and health."""
        return stats_dict(self._call(self._stub.Stats, admin_pb2.StatsRequest()))

    def serving_status(self) -> str:
        """Return what the standard health service says, such as "SERVING"."""
        reply = self._call(self._health.Check, health_pb2.HealthCheckRequest())
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))

    def list_blocks(self, limit: int, scope: bytes = b"") -> dict[str, Any]:
        """Return the most recently used blocks, at most ``limit`` of them, or all if it is 0."""
        blocks: list[dict[str, Any]] = []
        token = ""
        while True:
            wanted = min(limit - len(blocks), PAGE_SIZE) if limit else PAGE_SIZE
            request = admin_pb2.ListBlocksRequest(page_size=wanted, page_token=token, scope=scope)
            reply = self._call(self._stub.ListBlocks, request)
            blocks += [listing_dict(block) for block in reply.blocks]
            token = reply.next_page_token
            if not token or (limit and len(blocks) >= limit):
                return {"blocks": blocks[: limit or None], "truncated": bool(token)}

    def inspect(self, key: BlockKey) -> dict[str, Any]:
        """Return everything about one block except its values."""
        reply = self._call(self._stub.Inspect, admin_pb2.InspectRequest(key=key_message(key)))
        headers = [header_dict(header) for header in reply.headers]
        return {**listing_dict(reply.block), "headers": headers}

    def evict(self, keys: Iterable[BlockKey], tier: str) -> dict[str, Any]:
        """Remove blocks (all if ``keys`` is empty) from a tier (all if empty)."""
        request = admin_pb2.EvictRequest(keys=[key_message(key) for key in keys], tier=tier)
        reply = self._call(self._stub.Evict, request)
        return {"evicted": reply.evicted, "skipped_pinned": reply.skipped_pinned}

    def drain(self, timeout_s: float) -> dict[str, Any]:
        """Stop the server from taking new work and wait for what runs, up to ``timeout_s``."""
        milliseconds = min(int(check_seconds("timeout", timeout_s) * 1000), MAX_UINT32)
        request = admin_pb2.DrainRequest(timeout_ms=milliseconds)
        reply = self._call(self._stub.Drain, request, timeout_s + self._endpoint.timeout_s)
        return {"drained": reply.drained, "in_flight": reply.in_flight}

    def close(self) -> None:
        """Close the connection; may be repeated."""
        self._channel.close()

    def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        limit_s = self._endpoint.time_limit(timeout_s)
        try:
            return method(request, timeout=limit_s, metadata=self._endpoint.metadata)
        except grpc.RpcError as error:
            raise self._endpoint.error(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def parse_key(text: str) -> BlockKey:
    """Return the block key that ``kvctl ls`` printed.

    Raises:
        InvalidRequestError: ``text`` is no block key.
    """
    try:
        return BlockKey.decode(text)
    except ValueError as error:
        raise InvalidRequestError(str(error), "copy a key from `kvctl ls`") from None


def key_message(key: BlockKey) -> kvstore_pb2.BlockKey:
    """Return ``key`` as a message."""
    return kvstore_pb2.BlockKey(scope=key.scope, block_hash=key.block_hash)


def stats_dict(reply: admin_pb2.StatsReply) -> dict[str, Any]:
    """Return ``reply`` with total hits and, per reason, misses."""
    misses: dict[str, int] = {}
    for counter in reply.counters:
        if counter.name == MISSES:
            reason = dict(counter.labels).get("reason", "unknown")
            misses[reason] = misses.get(reason, 0) + counter.value
    return {
        "health": reply.health,
        "uptime_s": reply.uptime_s,
        "tiers": {
            tier.tier: {
                "healthy": tier.healthy,
                "blocks": tier.blocks,
                "bytes": tier.bytes,
                "capacity_bytes": tier.capacity_bytes,
                "hits": tier.hits,
                "evictions": tier.evictions,
                "detail": tier.detail,
            }
            for tier in reply.tiers
        },
        "hits": sum(tier.hits for tier in reply.tiers),
        "misses": misses,
        "counters": [
            {"name": c.name, "labels": dict(sorted(c.labels.items())), "value": c.value}
            for c in reply.counters
        ],
        "pinned_blocks": reply.pinned_blocks,
        "pinned_bytes": reply.pinned_bytes,
        "in_flight_puts": reply.in_flight_puts,
    }


def listing_dict(block: admin_pb2.BlockListing) -> dict[str, Any]:
    """Return one line of a listing; ``strata`` maps a stratum's name to its bytes."""
    key = BlockKey(ScopeDigest(block.key.scope), BlockHash(block.key.block_hash))
    strata = {stratum_name(s.stratum): s.frame_bytes for s in block.strata}
    return {
        "key": key.encode(),
        "strata": strata,
        "bytes": sum(strata.values()),
        "tiers": list(block.tiers),
        "pinned": block.pinned,
    }


def header_dict(header: frame_pb2.FrameHeader) -> dict[str, Any]:
    """Return one stratum's header; ids and hashes are hex."""
    return {
        "stratum": stratum_name(header.stratum),
        "encoding_id": header.encoding_id.hex(),
        "codec": header.codec,
        "codec_version": header.codec_version,
        "profile": header.profile.hex(),
        "scope": header.scope.hex(),
        "block_hash": header.block_hash.hex(),
        "parent_hash": header.parent_hash.hex(),
        "rope": _enum_name(frame_pb2.RopeForm, header.rope, "ROPE_FORM_"),
        "kv_dtype": header.kv_dtype,
        "num_layers": header.num_layers,
        "num_kv_heads": header.num_kv_heads,
        "head_dim": header.head_dim,
        "first_position": header.first_position,
        "num_tokens": len(header.token_ids),
        "token_ids": list(header.token_ids),
        "layers": [s.layer for s in header.segments],
        "segment_bytes": sum(s.length for s in header.segments),
        "attachments": {a.name: a.length for a in header.attachments},
    }


def stratum_name(stratum: int) -> str:
    """Return "base", "mid", "fine" or "exact"; the number where it is none of them."""
    return _enum_name(frame_pb2.Stratum, stratum, "STRATUM_")


def _enum_name(enum: Any, value: int, prefix: str) -> str:
    name = enum.Name(value) if value in enum.values() else str(value)
    return str(name).removeprefix(prefix).lower()
