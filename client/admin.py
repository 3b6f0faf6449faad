"""The ``Admin`` service, one method per call; replies are dictionaries with stable keys."""

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstrata.client.connection import Endpoint
from kvstrata.client.request import MAX_UINT32
from kvstrata.client.validation import check_seconds
from kvstrata.protos import admin_pb2, admin_pb2_grpc, frame_pb2, kvstore_pb2, retention_pb2
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

    def inspect(self, key: BlockKey, tokens: bool = False) -> dict[str, Any]:
        """Return everything about one block except its values.

        With ``tokens`` also how each layer keeps its 64 tokens: a byte of saliency each, and the
        masks of escapes, mid and dropped tokens, a hexadecimal number a KV head, of K, then of V.
        """
        request = admin_pb2.InspectRequest(key=key_message(key), tokens=tokens)
        reply = self._call(self._stub.Inspect, request)
        headers = [header_dict(header) for header in reply.headers]
        found = {**listing_dict(reply.block), "headers": headers}
        if tokens:
            found["layers"] = [layer_dict(layer) for layer in reply.layers]
            found["tokens_unknown"] = reply.tokens_unknown
        return found

    def explain(self, request: admin_pb2.ExplainRequest) -> admin_pb2.ExplainReply:
        """Return what became of the blocks of a prompt."""
        reply: admin_pb2.ExplainReply = self._call(self._stub.Explain, request)
        return reply

    def pin(self, keys: Iterable[BlockKey], ttl_s: float) -> dict[str, Any]:
        """Exempt blocks from eviction for ``ttl_s``, or the server's limit if that is less."""
        wanted = list(keys)
        milliseconds = min(int(check_seconds("ttl", ttl_s) * 1000), MAX_UINT32)
        request = kvstore_pb2.PinRequest(keys=map(key_message, wanted), ttl_ms=milliseconds)
        missing = [key_of(key).encode() for key in self._call(self._stub.Pin, request).missing]
        return {"pinned": len(wanted) - len(missing), "missing": missing}

    def unpin(self, keys: Iterable[BlockKey]) -> dict[str, Any]:
        """End pins."""
        wanted = list(keys)
        self._call(self._stub.Unpin, kvstore_pb2.UnpinRequest(keys=map(key_message, wanted)))
        return {"unpinned": len(wanted)}

    def move(self, keys: Iterable[BlockKey], source: str, target: str) -> dict[str, Any]:
        """Copy blocks into tier ``target``, and remove them from ``source`` if that is named."""
        request = admin_pb2.MoveRequest(
            keys=[key_message(key) for key in keys], source=source, target=target
        )
        reply = self._call(self._stub.Move, request)
        problems = {key_of(p.key).encode(): p.reason for p in reply.problems}
        return {"moved": reply.moved, "problems": problems}

    def verify(
        self, keys: Iterable[BlockKey], tier: str, repair: bool, timeout_s: float
    ) -> Iterator[dict[str, Any]]:
        """Yield what was checked so far, each time with the damage found since; then the end."""
        request = admin_pb2.VerifyRequest(
            keys=[key_message(key) for key in keys], tier=tier, repair=repair
        )
        limit_s = self._endpoint.time_limit(timeout_s)
        try:
            replies = self._stub.Verify(request, timeout=limit_s, metadata=self._endpoint.metadata)
            for reply in replies:
                yield verify_dict(reply)
        except grpc.RpcError as error:
            raise self._endpoint.error(error) from None

    def quota(self, tenant: str = "", limits: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Return limits and use of one tenant or all, after setting ``limits``, by their names."""
        request = admin_pb2.QuotaRequest(tenant=tenant, **(limits or {}))  # type: ignore[arg-type]
        reply = self._call(self._stub.Quota, request)
        fields = [field.name for field in admin_pb2.TenantQuota.DESCRIPTOR.fields]
        return {"tenants": [{name: getattr(t, name) for name in fields} for t in reply.tenants]}

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


def key_of(message: kvstore_pb2.BlockKey) -> BlockKey:
    """Return the key in a message."""
    return BlockKey(ScopeDigest(message.scope), BlockHash(message.block_hash))


def layer_dict(layer: admin_pb2.LayerTokens) -> dict[str, Any]:
    """Return how one layer keeps its tokens; masks in hex, token 0 in the lowest bit."""
    masks = {"escape": layer.escape, "mid": layer.mid, "dropped": layer.dropped}
    return {
        "layer": layer.layer,
        "saliency": list(layer.saliency),
        **{name: [f"{mask:016x}" for mask in rows] for name, rows in masks.items()},
    }


def verify_dict(reply: admin_pb2.VerifyReply) -> dict[str, Any]:
    """Return one report of a verification."""
    fields = (
        *("checked_strata", "checked_bytes", "checked_blocks", "total_blocks"),
        *("num_damaged", "num_undecryptable", "done"),
    )
    return {
        **{name: getattr(reply, name) for name in fields},
        "damaged": [
            {
                "key": key_of(damage.key).encode(),
                "stratum": stratum_name(damage.stratum),
                "tier": damage.tier,
                "what": damage.what,
            }
            for damage in reply.damaged
        ],
        "unavailable": list(reply.unavailable),
    }


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
                "behind_bytes": tier.behind_bytes,
            }
            for tier in reply.tiers
        },
        "hits": sum(tier.hits for tier in reply.tiers),
        "misses": misses,
        "counters": [
            {"name": c.name, "labels": dict(sorted(c.labels.items())), "value": c.value}
            for c in reply.counters
        ],
        "times": [
            {
                "name": h.name,
                "labels": dict(sorted(h.labels.items())),
                "count": sum(h.counts),
                "sum_s": h.sum_s,
                "p50_s": quantile(h, 0.5),
                "p99_s": quantile(h, 0.99),
            }
            for h in reply.histograms
        ],
        "gauges": [
            {"name": g.name, "labels": dict(sorted(g.labels.items())), "value": g.value}
            for g in reply.gauges
        ],
        "pinned_blocks": reply.pinned_blocks,
        "pinned_bytes": reply.pinned_bytes,
        "in_flight_puts": reply.in_flight_puts,
    }


def quantile(times: admin_pb2.Histogram, share: float) -> float | None:
    """Return the upper bound of the bucket that holds the quantile, in seconds.

    None without observations, and beyond the last bound, where nothing is known.
    """
    rank = share * sum(times.counts)
    if not rank:
        return None
    for bound_s, count in zip(times.bounds_s, times.counts, strict=False):
        rank -= count
        if rank <= 0:
            return bound_s
    return None


def listing_dict(block: admin_pb2.BlockListing) -> dict[str, Any]:
    """Return one line of a listing; ``strata`` maps a stratum's name to its bytes."""
    key = key_of(block.key)
    strata = {stratum_name(s.stratum): s.frame_bytes for s in block.strata}
    return {
        "key": key.encode(),
        "strata": strata,
        "bytes": sum(strata.values()),
        "tiers": list(block.tiers),
        "pinned": block.pinned,
        **_retention_dict(block),
    }


def _retention_dict(block: admin_pb2.BlockListing) -> dict[str, Any]:
    """Return what hints say of a block; nothing without any."""
    if not block.sessions:
        return {}
    priority = _enum_name(retention_pb2.Priority, block.priority, "PRIORITY_")
    keep_s = block.keep_ms / 1000
    return {"retention": {"priority": priority, "sessions": block.sessions, "keep_s": keep_s}}


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
